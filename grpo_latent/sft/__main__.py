"""python -m grpo_latent.sft model.path=… data.train_files=… data.format=parquet trainer.output_dir=… [overrides]

Exit codes: 0 done, 2 something is wrong with config, data or checkpoint (one message says what), 1 anything else.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grpo_latent.errors import ConfigError, GrpoLatentError
from grpo_latent.sft.run import run_sft
from grpo_latent.sft.settings import SFTSettings


def run(config: DictConfig) -> int:
    """The exit code of one run."""
    try:
        try:
            resolved = OmegaConf.to_container(config, resolve=True)
        except OmegaConfBaseException as error:
            raise ConfigError(
                "the config does not resolve",
                where="config",
                got=str(error).splitlines()[0],
                expected="a value for each ??? and each ${…}",
                fix="Set model.path, data.train_files and trainer.output_dir on the command line.",
            ) from error
        result = run_sft(SFTSettings.from_dict(resolved))
    except GrpoLatentError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    metrics = "  ".join(f"{name} {value:.3g}" for name, value in result.metrics.items())
    print(f"sft: {result.steps} steps in {result.seconds:.1f} s  {metrics}\nmodel: {result.model_path}")
    return 0


@hydra.main(config_path="pkg://grpo_latent.config", config_name="sft", version_base=None)
def main(config: DictConfig) -> None:
    code = run(config)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
