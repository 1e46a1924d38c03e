"""What `benchmarks/corruptions.py` damages: folders as the toolkit writes them, and how each is read.

A reader gives all that was read, so that two readings can be compared; what it raises or reports
is an error that names a file, or a defect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from grpo_latent.common import manifest
from grpo_latent.common.best_checkpoint import Best, read_best, write_best
from grpo_latent.common.pickles import without_code
from grpo_latent.data.embedded import digits
from grpo_latent.eval.dumps import read_dump, write_step
from grpo_latent.eval.journal import Journal, PhaseBatch
from grpo_latent.eval.scoring import Outcome
from grpo_latent.latent.mechanisms import LVR
from grpo_latent.models import tiny
from grpo_latent.models.loading import load_latent_model, save_latent_model
from grpo_latent.sft.resuming import checked
from grpo_latent.trajectory import PositionKind, Trajectory
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.trainer import checkpoint
from grpo_latent.verl_plugin.trainer.commit import DATA_FILE, check_checkpoint, write_manifest
from grpo_latent.verl_plugin.trainer.guards import Guards
from grpo_latent.verl_plugin.worker.parts import PartDigests, share_of

WORLD_SIZE = 2
STEPS = (3, 14)  # an older checkpoint beside the newest
KINDS = [PositionKind.START, PositionKind.LATENT, PositionKind.FORCED, PositionKind.TEXT]


@dataclass(frozen=True)
class Case:
    """One kind of folder.

    Attributes:
        write: makes it, of a seed: two seeds have the same files with other contents.
        read: all that is read of it. Raises what is wrong, or the first of what it would report.
        foreign: names of files that the folder has no place for and that would be read.
    """

    write: Callable[[Path, int], None]
    read: Callable[[Path], Any]
    foreign: tuple[str, ...] = ()


def write_model(folder: Path, seed: int) -> None:
    model, tokenizer, processor = tiny.tiny_qwen2_5_vl(digits.WORDS)
    mechanism = LVR.from_tokens(tokenizer.get_vocab(), steps=2, max_spans=1, head="mlp")
    torch.manual_seed(seed)
    mechanism.attach(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(torch.randn(()))
    save_latent_model(folder, model, tokenizer, processor, mechanism)


def read_model(folder: Path) -> Any:
    loaded = load_latent_model(folder)
    processor = loaded.processor
    assert processor is not None
    return (
        loaded.model.state_dict(),
        loaded.model.config.to_dict(),
        loaded.tokenizer.get_vocab(),
        loaded.tokenizer.chat_template,
        processor.to_dict(),
        loaded.mechanism.to_dict(),
        loaded.eos_ids,
    )


def _states(seed: int) -> dict[str, dict]:
    generator = torch.Generator().manual_seed(seed)
    parameter = torch.nn.Parameter(torch.randn(64, 8, generator=generator))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.square().sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    rng = {"cpu": generator.get_state(), "numpy": np.random.RandomState(seed).get_state()}
    return {
        "model": {"weight": parameter.detach()},
        "optim": optimizer.state_dict(),
        "extra_state": {"lr_scheduler": scheduler.state_dict(), "rng": rng},
    }


def _guards(root: Path) -> Guards:
    trainer = SimpleNamespace(default_local_dir=str(root), save_freq=1, val_only=False)
    return Guards(LatentOptions(), OmegaConf.create(vars(trainer)))


def write_rl(root: Path, seed: int) -> None:
    """Checkpoints of two steps and two ranks, in verl's layout."""
    guards = _guards(root)
    for step in STEPS:
        folder = root / f"{checkpoint.STEP_PREFIX}{step}"
        actor = folder / "actor"
        write_model(actor / "huggingface", 100 * seed + step)
        for rank in range(WORLD_SIZE):
            for stem, state in _states(1000 * seed + 10 * step + rank).items():
                torch.save(state, actor / f"{stem}_world_size_{WORLD_SIZE}_rank_{rank}.pt")
        (actor / "fsdp_config.json").write_text(f'{{"world_size": {WORLD_SIZE}}}')
        torch.save({"num_yielded": step, "seed": seed}, folder / DATA_FILE)
        guards.best = Best.of_step(step, 0.5 + seed / 10, "val-core/x/acc/mean@1")
        guards.save(folder)
        write_manifest(folder, [PartDigests(actor, rank).result() for rank in range(WORLD_SIZE)])
        checkpoint.write_tracker(root, step)
    write_best(root, guards.best)


def read_rl(root: Path) -> Any:
    """As a run resumes, less its workers: each rank's files are compared and loaded here."""
    trainer = {"resume_mode": "auto", "default_local_dir": str(root)}
    best = read_best(root)
    folder = checkpoint.resume_folder(OmegaConf.create(trainer))
    if folder is None:
        return "from the start"
    actor = folder / "actor"

    def check_parts(place: str, entries: manifest.Entries) -> None:
        for rank in range(WORLD_SIZE):
            manifest.check_files(place, share_of(entries, rank, WORLD_SIZE))

    workers = SimpleNamespace(world_size=WORLD_SIZE, check_parts=check_parts)
    check_checkpoint(folder, workers, LatentOptions())
    with without_code():
        paths = sorted([*actor.glob("*.pt"), folder / DATA_FILE])
        states = {path.name: torch.load(path, weights_only=False) for path in paths}
    guards = _guards(root)
    guards.load(folder)
    return (
        folder.name,
        states,
        guards.alarms.state(),
        guards.best,
        best,
        read_model(actor / "huggingface"),
    )


def write_sft(folder: Path, seed: int) -> None:
    """A checkpoint of the Hugging Face Trainer."""
    checkpoint_folder = folder / "checkpoint-3"
    write_model(checkpoint_folder, seed)
    states = _states(seed)
    names = {"optim": "optimizer.pt", "extra_state": "rng_state.pth", "model": "scheduler.pt"}
    for stem, name in names.items():
        torch.save(states[stem], checkpoint_folder / name)
    (checkpoint_folder / "trainer_state.json").write_text(f'{{"global_step": 3, "seed": {seed}}}')
    manifest.write_manifest(checkpoint_folder)


def read_sft(folder: Path) -> Any:
    place = checked(folder / "checkpoint-3", verify_digests=True)
    with without_code():
        paths = sorted([*place.glob("*.pt"), *place.glob("*.pth")])
        states = {path.name: torch.load(path, weights_only=False) for path in paths}
    return states, (place / "trainer_state.json").read_text(), read_model(place)


def _trajectory(generator: torch.Generator) -> Trajectory:
    kinds = torch.tensor([int(kind) for kind in KINDS])
    return Trajectory(
        torch.randint(0, 9, (3,), generator=generator),
        torch.randint(0, 9, (4,), generator=generator),
        kinds,
        torch.randn(1, 8, generator=generator),
        torch.randn(4, generator=generator),
        torch.zeros(4),
        "eos",
    )


def write_dumps(folder: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for step in (1, 2):
        records: list[dict] = []
        tensors: dict[str, torch.Tensor] = {}
        for idx in range(16):
            name = f"{idx // 4}/{idx % 4}"
            trajectory = _trajectory(generator)
            kinds = [int(PositionKind.PROMPT)] * 3 + trajectory.kinds.tolist()
            records.append(
                {
                    "step": step,
                    "id": name,
                    "ground_truth": "7",
                    "text": f"answer {idx}",
                    "stop_reason": "eos",
                    "reward": float(torch.rand((), generator=generator)),
                    "reward_terms": {},
                    "prompt_ids": trajectory.prompt_ids.tolist(),
                    "token_ids": trajectory.token_ids.tolist(),
                    "kinds": kinds,
                    "response_mask": [1, 0, 0, 1],
                    "rollout_log_probs": trajectory.rollout_log_probs.tolist(),
                }
            )
            tensors[name] = trajectory.latents
        write_step(folder, step, records, tensors)


def read_dumps(folder: Path) -> Any:
    dump = read_dump(folder)
    for problem in dump.problems:
        raise problem
    return [
        (item.step, item.group_id, item.text, item.reward, item.trajectory.__getstate__())
        for item in dump.trajectories
    ]


PHASES = ("own", "shuffle")


def _batch(seed: int, phase: str, idx: int) -> PhaseBatch:
    """What an evaluation computes, and computes again where the journal has lost it."""
    generator = torch.Generator().manual_seed(100 * seed + 10 * idx + len(phase))
    score = float(torch.rand((), generator=generator))
    trajectories = [_trajectory(generator), None] if phase == "own" else ()
    outcomes = [[Outcome(1.0, score, "7")], [Outcome(0.0, 0.0)]]
    return PhaseBatch(outcomes, 8, 0.5, trajectories=trajectories)


def write_journal(folder: Path, seed: int) -> None:
    journal = Journal(folder, {"checkpoint": "model", "seed": seed})
    for phase in PHASES:
        for idx in range(2):
            journal.save(phase, idx, _batch(seed, phase, idx))


def read_journal(folder: Path) -> Any:
    """What an evaluation of seed 0 goes on from."""
    journal = Journal(folder, {"checkpoint": "model", "seed": 0})
    found = {}
    for phase in PHASES:
        for idx in range(2):
            batch = journal.load(phase, idx) or _batch(0, phase, idx)
            rows = [None if t is None else t.__getstate__() for t in batch.trajectories]
            found[phase, idx] = ([list(map(vars, g)) for g in batch.outcomes], rows)
    return found


CASES = {
    "SFT's model": Case(write_model, read_model, ("adapter_config.json", "model-2.safetensors")),
    "SFT's checkpoint": Case(write_sft, read_sft, ("checkpoint-3/scaler.pt",)),
    "RL's checkpoint": Case(
        write_rl,
        read_rl,
        (
            "global_step_14/actor/extra_state_world_size_2_rank_2.pt",
            "global_step_14/actor/huggingface/adapter_config.json",
        ),
    ),
    "rollout dumps": Case(write_dumps, read_dumps, ("step_3.safetensors",)),
    "evaluation's journal": Case(write_journal, read_journal),
}
