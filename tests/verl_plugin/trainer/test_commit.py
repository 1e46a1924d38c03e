"""What a checkpoint is compared with before it is loaded, and what follows a step's log.

Files and stand-ins: the order within real training is `benchmarks/kills.py`'s.
"""

from types import SimpleNamespace

import pytest
import torch
from folder_cases import WritesMarker, without_manifest

from grpo_latent.common import manifest
from grpo_latent.errors import CheckpointError
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.trainer.commit import CommittingLogger, check_checkpoint
from grpo_latent.verl_plugin.trainer.commit import write_manifest as write
from grpo_latent.verl_plugin.worker.parts import PartDigests, share_of

WORLD_SIZE = 2


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of two ranks."""
    actor = tmp_path / "actor"
    (actor / "huggingface").mkdir(parents=True)
    for rank in range(WORLD_SIZE):
        for stem in ("model", "optim", "extra_state"):
            torch.save({"rank": rank}, actor / f"{stem}_world_size_2_rank_{rank}.pt")
    (actor / "fsdp_config.json").write_text('{"world_size": 2}')
    (actor / "huggingface" / "config.json").write_text("{}")
    torch.save({"num_yielded": 3}, tmp_path / "data.pt")
    (tmp_path / "guards.json").write_text("{}")
    write(tmp_path, [PartDigests(actor, rank).result() for rank in range(WORLD_SIZE)])
    return tmp_path


def check(folder, world_size=WORLD_SIZE, **options):
    """As the trainer does; its workers are loops over ranks."""
    options = LatentOptions(**options)

    def check_parts(actor, entries):
        for rank in range(world_size):
            share = share_of(entries, rank, world_size)
            manifest.check_files(actor, share, options.verify_digests)

    workers = SimpleNamespace(world_size=world_size, check_parts=check_parts)
    return check_checkpoint(folder, workers, options)


def test_a_whole_checkpoint_is_passed_in_silence(folder):
    assert check(folder) == []
    assert len(manifest.read_manifest(folder)) == 3 * WORLD_SIZE + 5


PARTS = [
    "data.pt",
    "guards.json",
    "actor/fsdp_config.json",
    "actor/model_world_size_2_rank_0.pt",
    "actor/optim_world_size_2_rank_1.pt",
    "actor/extra_state_world_size_2_rank_1.pt",
    "actor/huggingface/config.json",
    "actor/huggingface/manifest.json",
]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("is_deleted", [True, False], ids=["deleted", "flipped"])
def test_each_part_that_is_missing_or_changed_is_named(folder, name, is_deleted):
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if not is_deleted:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=f"{name}: a part of the checkpoint"):
        check(folder)


def test_a_part_that_nobody_listed_is_refused(folder):
    (folder / "actor" / "optim_world_size_2_rank_2.pt").touch()
    with pytest.raises(CheckpointError, match="rank_2.pt: a file that is no part"):
        check(folder)


@pytest.mark.parametrize("world_size", [1, 3])
def test_what_another_number_of_ranks_saved_is_compared_whole_and_said(folder, world_size):
    [note] = check(folder, world_size)
    assert note.startswith(f"saved by 2 ranks, goes on with {world_size}: weights, optimizer")
    assert {1: "those of rank 1 are left out", 3: "those of rank 2 as this start"}[
        world_size
    ] in note
    path = folder / "actor" / "optim_world_size_2_rank_1.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="optim_world_size_2_rank_1.pt: a part of the"):
        check(folder, world_size)


@pytest.mark.parametrize("text", ["", "[]", '{"world_size": "two"}'])
def test_an_unreadable_number_of_ranks_is_named(folder, text):
    (without_manifest(folder) / "actor" / "fsdp_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="fsdp_config.json: the number of ranks"):
        check(folder)


def test_without_a_manifest_that_is_said_and_the_data_position_is_still_needed(folder):
    assert check(without_manifest(folder)) == [manifest.no_manifest(folder)]
    (folder / "data.pt").unlink()
    with pytest.raises(CheckpointError, match="data.pt: a part of the checkpoint is missing"):
        check(folder)


def test_digests_left_out_are_said(folder):
    path = folder / "actor" / "model_world_size_2_rank_0.pt"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert check(folder, verify_digests=False) == [manifest.not_compared(folder)]


def test_a_data_position_that_would_run_code_is_refused(folder, tmp_path):
    marker = tmp_path / "marker"
    torch.save({"num_yielded": WritesMarker(marker)}, without_manifest(folder) / "data.pt")
    with pytest.raises(CheckpointError, match="data.pt: .*latent.trust_pickles=true"):
        check(folder)
    assert not marker.exists()
    check(folder, trust_pickles=True)


def test_the_commit_follows_all_loggers(tmp_path):
    seen = []
    tracking = SimpleNamespace(
        log=lambda data, step, backend: seen.append(("log", step)), logger={}, finish="finish"
    )
    logger = CommittingLogger(tracking, lambda: seen.append("commit"), begins_after=0)
    logger.log(data={"a": 1.0}, step=3)
    assert seen == [("log", 3), "commit"] and logger.finish == "finish"


def test_tensorboard_shows_steps_once_after_a_kill(tmp_path):
    """The killed run has logged steps 1 to 4 and committed 2."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    def run(begins_after, last):
        adapter = SimpleNamespace(writer=SummaryWriter(str(tmp_path)))
        tracking = SimpleNamespace(
            log=lambda data, step, backend: adapter.writer.add_scalar("a", data["a"], step),
            logger={"tensorboard": adapter},
        )
        logger = CommittingLogger(tracking, lambda: None, begins_after)
        for step in range(begins_after + 1, last + 1):
            logger.log({"a": float(step)}, step)
        logger.flush()
        return adapter

    killed = run(0, 4)
    run(2, 5)
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("a")
    assert [event.step for event in events] == [1, 2, 3, 4, 5]
    assert killed.writer is not None
