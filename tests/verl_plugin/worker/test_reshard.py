"""What one number of ranks has saved, another one loads: exactly, and goes on as if uninterrupted.

On gloo, without Ray. Through the trainer, with its event line: trainer/test_adapter_training.py.
"""

import os
import shutil
import sys
from pathlib import Path

import engine_helpers as helpers
import pytest
import torch
import torch.multiprocessing as mp
from test_two_ranks import actor_loss, rank_batch
from torch.distributed.tensor import DTensor

from grpo_latent.errors import CheckpointError
from grpo_latent.verl_plugin.worker.adapters import full_tensor

pytestmark = [pytest.mark.slow, pytest.mark.long]
STEPS = 2  # before the save, and after it
LORA = dict(lora=dict(lora_rank=4), lora_trains=["latents", "lm_head"])
BPTT = {"name": "recompute", "recompute": {"gradient": "bptt"}}
# lr: updates of Adam's first steps are as large for a gradient of rounding as for one of loss
RUNS = {"whole": dict(lr=1e-4), "lora": dict(lr=1e-4, treatment=BPTT, **LORA)}


def make_engine(folder, name, world_size):
    """Of four ranks two have copies of the others' shards, where adapters train."""
    fsdp_size = 2 if (name, world_size) == ("lora", 4) else -1
    return helpers.make_engine(folder, micro=2, fsdp_size=fsdp_size, **RUNS[name])


def train(engine, batch, num_steps=STEPS):
    """Global loss of each step."""
    losses = []
    for _ in range(num_steps):
        with engine.train_mode(disable_auto_offload=True):
            engine.optimizer_zero_grad()
            output = engine.forward_backward_batch(batch.clone(), actor_loss())
            engine.optimizer_step()
            engine.lr_scheduler_step()
        loss = torch.tensor(sum(output["loss"]))
        torch.distributed.all_reduce(loss)
        losses.append(loss.item() / torch.distributed.get_world_size())
    return losses


def whole_state(engine):
    """Weights, optimizer and schedule, gathered."""
    state = {name: full_tensor(t).clone() for name, t in engine.module.state_dict().items()}
    for number, values in engine.optimizer.state_dict()["state"].items():
        state |= {f"{number}.{key}": full_tensor(v).clone() for key, v in values.items()}
    schedule = engine.lr_scheduler.state_dict()
    return state, {key: schedule[key] for key in ("last_epoch", "_last_lr", "_step_count")}


def work(rank, world_size, store, folder, out, saves, loads):
    """Saves after some steps and goes on; then goes on from what others have saved."""
    sys.path.insert(0, os.path.dirname(os.path.dirname(__file__)))
    torch.set_num_threads(1)
    helpers.start_process_group(rank, world_size, store)
    out = Path(out)
    batch = rank_batch(folder, rank, world_size)
    for name in RUNS:
        if saves:
            engine = make_engine(folder, name, world_size)
            train(engine, batch)
            engine.save_checkpoint(f"{out}/{name}{world_size}", global_step=STEPS)
            keep(rank, out, name, world_size, "saved", (whole_state(engine), train(engine, batch)))
        for saved in loads:
            again = make_engine(folder, name, world_size)
            torch.manual_seed(99 + rank)
            before = torch.get_rng_state()
            again.load_checkpoint(f"{out}/{name}{saved}")
            is_own = torch.equal(torch.get_rng_state(), before)
            assert is_own == (rank >= saved), "a rank takes the generators of its number, if any"
            keep(rank, out, name, world_size, saved, (whole_state(again), train(again, batch)))
    torch.distributed.destroy_process_group()


def keep(rank, out, name, world_size, what, result):
    if rank == 0:
        torch.save(result, out / f"{name}_{world_size}_{what}.pt")


def spawn(world_size, folder, out, saves=True, loads=()):
    store = str(out / f"store{world_size}{len(loads)}")
    arguments = (world_size, store, folder, str(out), saves, loads)
    if world_size == 1:  # no process more than needed
        work(0, *arguments)
    else:
        mp.spawn(work, arguments, nprocs=world_size)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the model, and of what `work` kept: 2 to 1, 4 to 2 and 1 to 2."""
    out = tmp_path_factory.mktemp("runs")
    folder = helpers.make_checkpoint(out / "model", head="mlp")
    spawn(1, folder, out)
    spawn(4, folder, out)
    spawn(2, folder, out, loads=(4, 1))
    spawn(1, folder, out, saves=False, loads=(2,))
    return out


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_of_another_number_of_ranks_is_gone_on_from(name, runs):
    """All weights, or adapters: what was saved, and the losses of an uninterrupted run."""
    saved = {n: torch.load(runs / f"{name}_{n}_saved.pt") for n in (1, 2, 4)}
    losses = [losses for _, losses in saved.values()]
    assert abs(losses[0][0] - losses[0][1]) > 1e-4, "the tolerance is one"
    for before, now in ((2, 1), (4, 2), (1, 2)):
        state, schedule = saved[before][0]
        loaded, resumed = torch.load(runs / f"{name}_{now}_{before}.pt")
        assert loaded[0].keys() == state.keys() and len(state) > 60
        assert all(torch.equal(loaded[0][key], tensor) for key, tensor in state.items())
        assert loaded[1] == schedule and schedule["last_epoch"] == STEPS
        for uninterrupted in losses:
            torch.testing.assert_close(resumed, uninterrupted, rtol=0, atol=1e-6)


# ---- what does not belong together --------------------------------------------------------------


def change(path, edit):
    with torch.serialization.safe_globals([]):
        state = torch.load(path, weights_only=False)
    edit(state)
    torch.save(state, path)


def drop_tensor(state):
    del state["lm_head.weight"]


def swap_shard(state):
    """Of another rank: it says so itself."""
    name = "model.language_model.norm.weight"
    spec = state[name]._spec
    state[name] = DTensor(state[name].to_local()[:-1], spec, requires_grad=False)


def one_step_more(state):
    for values in state["state"].values():
        values["step"] += 1


def another_rate(state):
    state["param_groups"][0]["lr"] = 0.5


def later(state):
    state["lr_scheduler"]["last_epoch"] += 1


@pytest.mark.parametrize(
    ("stem", "edit", "match"),
    [
        ("model", drop_tensor, "lm_head.weight.*on one of ranks 0 and 1 alone"),
        ("model", swap_shard, "norm.weight: rank 1 has"),
        ("optim", one_step_more, "step 2.0 on rank 0, 3.0 on rank 1"),
        ("optim", another_rate, "param_groups that differ"),
        ("extra_state", later, "schedules at different steps"),
    ],
)
def test_files_of_different_saves_are_named(stem, edit, match, runs, gloo, tmp_path):
    actor = runs / "whole2"
    shutil.copytree(actor, tmp_path / "actor")
    engine = helpers.make_engine(str(runs / "model"))
    change(tmp_path / "actor" / f"{stem}_world_size_2_rank_1.pt", edit)
    with pytest.raises(
        CheckpointError, match=f"{stem}_world_size_.*different checkpoints.*{match}"
    ):
        engine.load_checkpoint(str(tmp_path / "actor"))


def test_missing_damaged_and_foreign_files_are_named(runs, gloo, tmp_path):
    actor = runs / "whole2"
    shutil.copytree(actor, tmp_path / "actor")
    engine = helpers.make_engine(str(runs / "model"))
    path = tmp_path / "actor" / "optim_world_size_2_rank_1.pt"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=f"{path.name}: not a readable file"):
        engine.load_checkpoint(str(tmp_path / "actor"))
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{path.name}: a part of the checkpoint is missing"):
        engine.load_checkpoint(str(tmp_path / "actor"))
    adapted = helpers.make_engine(str(runs / "model"), lora=dict(lora_rank=4))
    with pytest.raises(CheckpointError, match="of another model.*base_model.*LoRA"):
        adapted.load_checkpoint(str(actor))
    engine.load_checkpoint(str(actor))
