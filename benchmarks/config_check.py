"""`python benchmarks/config_check.py`: how many mistakes of a training config are named before Ray starts.

Each mistake of `config_mistakes.py` is set on a config that can be trained, as hydra sets it; then
come the checks of `grpo_latent.train`. It is named where one of our errors ends them whose message
has the key. Prints those that are not, the figure, and what the checks cost on a config in order.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

sys.path.insert(0, str(Path(__file__).parent))

from config_mistakes import MISTAKES, WITH_FILES, is_named  # noqa: E402
from result_file import write_result  # noqa: E402

from grpo_latent.common.paths import check_output_folder  # noqa: E402
from grpo_latent.data.embedded import digits  # noqa: E402
from grpo_latent.errors import GrpoLatentError  # noqa: E402
from grpo_latent.latent.mechanisms import LVR  # noqa: E402
from grpo_latent.models import tiny  # noqa: E402
from grpo_latent.models.loading import save_latent_model  # noqa: E402
from grpo_latent.train import check, resolve_paths, set_environment  # noqa: E402

REWARD = (
    "def compute_score(data_source, solution_str, ground_truth, extra_info):\n    return 1.0\n"
)
NUM_ROWS = 40


def write_inputs(folder: Path) -> None:
    """A tiny model, rows, a reward and a checkpoint of step 5, as far as the checks look."""
    model, tokenizer, processor = tiny.tiny_qwen2_5_vl(digits.WORDS)
    mechanism = LVR.from_tokens(tokenizer.get_vocab(), steps=2, max_spans=1)
    mechanism.attach(model)
    save_latent_model(folder / "model", model, tokenizer, processor, mechanism)
    rows = digits.to_rows(digits.generate(2 * NUM_ROWS, stream="rl", seed=0), "rl")
    digits.write_verl_parquet(folder / "train.parquet", rows[:NUM_ROWS])
    digits.write_verl_parquet(folder / "val.parquet", rows[NUM_ROWS:])
    (folder / "reward.py").write_text(REWARD)
    checkpoints = folder / "run" / "checkpoints"
    (checkpoints / "global_step_5").mkdir(parents=True)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("5")


def usable(folder: Path) -> DictConfig:
    """A config that passes, of the inputs in `folder`."""
    overrides = (
        f"actor_rollout_ref.model.path={folder}/model",
        f"data.train_files={folder}/train.parquet",
        f"data.val_files={folder}/val.parquet",
        f"reward.custom_reward_function.path={folder}/reward.py",
        f"latent.output_dir={folder}/run",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
    )
    with initialize_config_module("grpo_latent.config", version_base=None):
        return compose("grpo", overrides=list(overrides))


def with_overrides(config: DictConfig, mistake: str, folder: Path | None = None) -> DictConfig:
    """A copy of the config with the overrides of a row, applied as hydra does."""
    changed = deepcopy(config)
    text = mistake.partition(" => ")[0].replace("{folder}", str(folder))
    parsed = OverridesParser.create().parse_overrides(_split(text))
    with open_dict(changed):
        for override in parsed:
            OmegaConf.update(changed, override.key_or_group, override.value(), merge=True)
    return changed


def _split(text: str) -> list[str]:
    """At spaces in front of a further key=value."""
    parts: list[str] = []
    for word in text.split(" "):
        if "=" in word or not parts:
            parts.append(word)
        else:
            parts[-1] += f" {word}"
    return parts


def check_values(config: DictConfig) -> None:
    """What the config alone tells."""
    from grpo_latent.verl_plugin.trainer.config_check import check_config

    check_output_folder(OmegaConf.select(config, "latent.output_dir"), "latent.output_dir")
    check_config(config)


def check_start(config: DictConfig) -> None:
    """Everything that `grpo_latent.train` checks before Ray starts, in its order."""
    from grpo_latent.verl_plugin.rewards.start_check import check_rewards
    from grpo_latent.verl_plugin.trainer.data_check import check_data

    check_output_folder(OmegaConf.select(config, "latent.output_dir"), "latent.output_dir")
    resolve_paths(config)
    check(config)
    check_data(config)
    check_rewards(config)


def verdict(checks: Callable[[DictConfig], None], config: DictConfig, mistake: str) -> str:
    """Empty where the mistake is named; else what happened."""
    try:
        checks(config)
    except GrpoLatentError as error:
        return "" if is_named(mistake, str(error)) else f"does not name the key: {error}"
    except Exception as error:
        return f"a traceback: {type(error).__name__}: {error}"
    return "passes"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        config = usable(folder)
        set_environment(config, folder)
        start = time.process_time()
        check_values(config)
        first = time.process_time() - start
        start = time.process_time()
        check_values(config)
        cost = time.process_time() - start
        check_start(deepcopy(config))
        found = {
            mistake: verdict(check_values, with_overrides(config, mistake), mistake)
            for mistakes in MISTAKES.values()
            for mistake in mistakes
        }
        found |= {
            mistake: verdict(check_start, with_overrides(config, mistake, folder), mistake)
            for mistake in WITH_FILES
        }
    missed = {mistake: said for mistake, said in found.items() if said}
    for mistake, said in missed.items():
        print(f"{mistake}: {said}")
    print(f"{len(found) - len(missed)} of {len(found)} mistakes named")
    write_result(options.json, {"mistakes": len(found), "named": len(found) - len(missed)})
    print(f"the check of a config in order: {cost:.2f} CPU s, {first:.2f} the first time")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
