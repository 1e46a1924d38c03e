"""Runs SFT: python -m grpo_latent.sft model.path=… data.train_files=… trainer.output_dir=…

`grpo_latent.common.command` says what the exit codes mean.
"""

from __future__ import annotations

import sys

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grpo_latent.common.command import config_command
from grpo_latent.errors import ConfigError
from grpo_latent.sft.run import check_sft, run_sft
from grpo_latent.sft.settings import SFTSettings


def read_settings(config: DictConfig) -> SFTSettings:
    """Builds the settings of a composed config; raises `ConfigError` by the key's name."""
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
    assert isinstance(resolved, dict), "a DictConfig resolves to a dict"
    return SFTSettings.from_dict({str(key): value for key, value in resolved.items()})


def check_only(config: DictConfig) -> None:
    for line in check_sft(read_settings(config)):
        print(line)
    print("nothing is wrong; nothing was trained or written")


@config_command("sft", check_only)
def main(config: DictConfig) -> None:
    result = run_sft(read_settings(config))
    if result.bad_boxes.report():
        print(result.bad_boxes.report())
    metrics = "  ".join(f"{name} {value:.3g}" for name, value in result.metrics.items())
    print(
        f"sft: {result.steps} steps in {result.seconds:.1f} s  {metrics}\n"
        f"model: {result.model_path}"
    )


if __name__ == "__main__":
    sys.exit(main())
