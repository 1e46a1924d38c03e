"""A tiny training run: checkpoint, data, reward and config, and ways to compare two of them."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import ray
import torch
from engine_helpers import make_checkpoint
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from safetensors.torch import load_file

import grpo_latent.train  # noqa: F401  (lets hydra find verl's configs)
from grpo_latent.verl_plugin.boot.registration import verify

REWARD = (Path(__file__).parents[2] / "benchmarks" / "tiny_reward.py").read_text()


def clean_environment() -> dict[str, str]:
    """This process's, without what names a plug-in or a Ray; where a Ray's files lie stays."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("VERL_", "RAY_")) or name == "RAY_TMPDIR"
    }
    # Ray's own niceness is 15: on a busy machine such workers starve
    return clean | {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}


def write_inputs(folder: Path, **checkpoint) -> Path:
    """Writes model, reward, and parquets of 10 and 3 rows.

    With 4 rows a step the epochs wrap after two steps.

    Args:
        checkpoint: as for `make_checkpoint`.
    """
    import pandas as pd
    from PIL import Image

    make_checkpoint(folder / "model", **checkpoint)
    rng = np.random.default_rng(0)
    for name, count, offset in (("train", 10, 0), ("val", 3, 100)):
        rows = []
        for i in range(count):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (28, 28 + 14 * (i % 2), 3), dtype=np.uint8)).save(
                buffer, "PNG"
            )
            rows.append(
                {
                    "data_source": "tiny",
                    "prompt": [
                        {
                            "role": "user",
                            "content": "read red ? <image>" if i % 3 else "read <image>",
                        }
                    ],
                    "images": [{"bytes": buffer.getvalue(), "path": None}],
                    "ability": "test",
                    "reward_model": {"style": "rule", "ground_truth": str(i % 10)},
                    "extra_info": {"index": offset + i, "split": name},
                }
            )
        pd.DataFrame(rows).to_parquet(folder / f"{name}.parquet")
    (folder / "reward.py").write_text(REWARD)
    return folder


def overrides(inputs: Path, output: Path, *more: str) -> list[str]:
    return [
        f"actor_rollout_ref.model.path={inputs / 'model'}",
        f"data.train_files={inputs / 'train.parquet'}",
        f"data.val_files={inputs / 'val.parquet'}",
        f"reward.custom_reward_function.path={inputs / 'reward.py'}",
        f"latent.output_dir={output}",
        "latent.dump_every=1",
        "latent.replay_logp_gap_bound=1e-4",
        "data.train_batch_size=4",
        "data.max_prompt_length=64",
        "data.max_response_length=12",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "actor_rollout_ref.actor.use_kl_loss=true",
        "actor_rollout_ref.actor.shuffle=true",
        "trainer.total_training_steps=6",
        "trainer.save_freq=3",
        "trainer.test_freq=3",
        *more,
    ]


def make_config(inputs: Path, output: Path, *more: str):
    with initialize_config_module("grpo_latent.config", version_base=None):
        config = compose("grpo", overrides=overrides(inputs, output, *more))
    OmegaConf.resolve(config)
    return config


def snapshot(output: Path, copy: Path) -> None:
    """Copies a run's folder while the run goes on, which may be about to rename a file."""
    shutil.copytree(output, copy, ignore=shutil.ignore_patterns(".*.part"))


def train_here(config, monkeypatch, before_fit=None):
    """What verl's TaskRunner does, in this process."""
    import transfer_queue as tq
    from verl.trainer.main_ppo import TaskRunnerV1
    from verl.trainer.ppo.v1 import get_trainer_cls

    verify("test")
    monkeypatch.setenv(
        "VERL_FILE_LOGGER_PATH", str(Path(config.latent.output_dir) / "metrics.jsonl")
    )
    runner = TaskRunnerV1.__ray_actor_class__()
    config.transfer_queue.enable = True
    tq.init(config.transfer_queue)
    runner.config = config
    try:
        runner.trainer = get_trainer_cls(config.trainer.v1.trainer_mode)(config=config)
        runner.trainer.init()
        runner.init_agent_loop_manager()
        if before_fit:
            before_fit(runner.trainer)
        runner.trainer.fit(runner.agent_loop_manager)
    finally:
        tq.close()
        for actor in ray.util.list_named_actors():
            ray.kill(ray.get_actor(actor))
        pool = getattr(getattr(runner, "trainer", None), "resource_pool_manager", None)
        for group in (
            pg for p in (pool.resource_pool_dict.values() if pool else ()) for pg in p.pgs or ()
        ):
            ray.util.remove_placement_group(group)
    return runner.trainer


def metrics_of(output: Path) -> dict[int, dict]:
    """Metrics by step, without times and memory."""
    unstable = ("timing", "perf/", "actor/perf")
    lines = (output / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert len(set(steps)) == len(steps), f"a step is logged twice: {steps}"
    data = {json.loads(line)["step"]: json.loads(line)["data"] for line in lines}
    return {
        step: {k: v for k, v in d.items() if not k.startswith(unstable)}
        for step, d in data.items()
    }


def states_of(output: Path, step: int) -> dict:
    """All states of model, optimizer, scheduler and generators in the checkpoint of `step`.

    Of all ranks.
    """
    files = sorted((output / "checkpoints" / f"global_step_{step}" / "actor").glob("*.pt"))
    return {path.name: torch.load(path, weights_only=False) for path in files}


def differences(a, b, where="") -> list[str]:
    """Places where two nested structures differ, tensors and arrays to the bit."""
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{where}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [d for key in a for d in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{where}: length"]
        return [
            d
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for d in differences(x, y, f"{where}[{i}]")
        ][:5]
    if isinstance(a, torch.Tensor):
        a, b = (t.to_local() if hasattr(t, "to_local") else t for t in (a, b))
        return [] if torch.equal(a, b) else [where]
    if isinstance(a, np.ndarray):
        return [] if np.array_equal(a, b) else [where]
    return [] if a == b else [f"{where}: {a} != {b}"]


def assert_equal_runs(first: Path, second: Path, steps, checkpoint: int) -> None:
    """Bit-identical rollouts and metrics over `steps`, and all state at `checkpoint`."""
    assert differences(states_of(first, checkpoint), states_of(second, checkpoint)) == []
    first_metrics, second_metrics = metrics_of(first), metrics_of(second)
    for step in steps:
        assert (
            differences(first_metrics[step], second_metrics[step], f"metrics of step {step}") == []
        )
        names = [f"rollouts/step_{step}.{suffix}" for suffix in ("jsonl", "safetensors")]
        texts = [(output / names[0]).read_text() for output in (first, second)]
        assert texts[0] == texts[1] and texts[0]
        latents = [load_file(output / names[1]) for output in (first, second)]
        assert differences(*latents, f"latents of step {step}") == []
        assert sum(tensor.shape[0] for tensor in latents[0].values()) > 0
