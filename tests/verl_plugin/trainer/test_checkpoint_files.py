"""The tracker never names an incomplete checkpoint, whatever was killed when."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from grpo_latent.common import files
from grpo_latent.errors import CheckpointError, ConfigError
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.trainer import checkpoint
from grpo_latent.verl_plugin.trainer import trainer as trainer_module
from grpo_latent.verl_plugin.trainer.latent_watch import STATE_FILE, AlarmSettings, LatentWatch
from grpo_latent.verl_plugin.trainer.trainer import LatentPPOTrainer


def make(root, *steps, tracker=None):
    for step in steps:
        (root / f"global_step_{step}" / "actor").mkdir(parents=True)
    if tracker is not None:
        checkpoint.write_tracker(root, tracker)


def test_a_half_written_save_is_ignored_and_then_replaced(tmp_path):
    make(tmp_path, 3, 6, tracker=3)  # killed while 6 was written
    (tmp_path / "global_step_6" / "actor" / "stale").touch()
    assert checkpoint.read_tracker(tmp_path) == 3
    checkpoint.make_room(tmp_path, 6, resumed_from=3)
    assert not (tmp_path / "global_step_6").exists() and checkpoint.read_tracker(tmp_path) == 3


def test_saving_over_the_newest_checkpoint_first_points_back(tmp_path):
    make(tmp_path, 3, 6, tracker=6)  # resumed from 3 by resume_path, trains 4..6 anew
    checkpoint.make_room(tmp_path, 6, resumed_from=3)
    assert checkpoint.read_tracker(tmp_path) == 3 and not (tmp_path / "global_step_6").exists()


def test_saving_over_the_only_checkpoint_leaves_no_tracker(tmp_path):
    make(tmp_path, 3, tracker=3)
    checkpoint.make_room(tmp_path, 3, resumed_from=0)
    assert checkpoint.read_tracker(tmp_path) is None


def test_tracker_is_replaced_whole(tmp_path, monkeypatch):
    """A kill before the rename leaves the old content."""
    make(tmp_path, 3, 6, tracker=3)

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_tracker(tmp_path, 6)
    assert checkpoint.read_tracker(tmp_path) == 3


@pytest.mark.parametrize(
    "content, match", [("", "not a step"), ("six", "not a step"), ("9", "checkpoint is gone")]
)
def test_a_broken_tracker_is_named(tmp_path, content, match):
    make(tmp_path, 3)
    (tmp_path / checkpoint.TRACKER_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=match):
        checkpoint.read_tracker(tmp_path)


def test_pruning_keeps_the_newest_and_the_one_in_use(tmp_path):
    make(tmp_path, 2, 4, 6, 8, tracker=6)
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.glob("global_step_*")) == [
        "global_step_6",
        "global_step_8",
    ]
    checkpoint.prune(tmp_path, None)
    checkpoint.prune(tmp_path, 1)
    assert (tmp_path / "global_step_6").is_dir()


def test_a_folder_that_was_kept_under_another_name_is_neither_pruned_nor_counted(tmp_path):
    make(tmp_path, 10, 20, 30, tracker=30)
    for name in ("global_step_20_best", "global_step_old"):
        (tmp_path / name).mkdir()
    checkpoint.prune(tmp_path, 2)
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {
        "global_step_20",
        "global_step_30",
        "global_step_20_best",
        "global_step_old",
    }


def trainer_config(tmp_path, **values):
    return OmegaConf.create(
        {"resume_mode": "resume_path", "default_local_dir": str(tmp_path), **values}
    )


def test_a_run_resumes_from_the_trackers_step_or_from_the_folder_that_it_is_given(tmp_path):
    make(tmp_path, 3, 6, tracker=3)
    assert (
        checkpoint.resume_folder(trainer_config(tmp_path, resume_mode="auto"))
        == tmp_path / "global_step_3"
    )
    assert checkpoint.resume_folder(trainer_config(tmp_path, resume_mode="disable")) is None
    given = trainer_config(tmp_path, resume_from_path=f"{tmp_path}/global_step_6/")
    assert str(checkpoint.resume_folder(given)) == f"{tmp_path}/global_step_6"


@pytest.mark.parametrize("name", ["global_step_6_best", "global_step_9", "actor", None])
def test_resuming_from_what_is_no_steps_folder_is_refused(tmp_path, name):
    """verl takes the step from the path's end, and dies in `int`."""
    make(tmp_path, 6)
    (tmp_path / "global_step_6_best").mkdir()
    (tmp_path / "global_step_6" / "actor").mkdir(exist_ok=True)
    path = (
        None
        if name is None
        else str(tmp_path / ("global_step_6/actor" if name == "actor" else name))
    )
    with pytest.raises(ConfigError, match="trainer.resume_from_path"):
        checkpoint.resume_folder(trainer_config(tmp_path, resume_from_path=path))


@pytest.mark.parametrize(
    "stops", [False, True], ids=["saved by verl's step", "stopped by an alarm"]
)
def test_callbacks_get_a_checkpoint_whose_step_is_counted(tmp_path, monkeypatch, stops):
    """A callback that copies the folder copies the counters that a resumed run needs."""
    trainer = stub_trainer(tmp_path, save_freq=-1 if stops else 1)
    copied = []

    def on_save(trainer, global_step, checkpoint_dir, async_save):
        state = json.loads((Path(checkpoint_dir) / STATE_FILE).read_text())
        copied.append((global_step, state["bad_in_a_row"]["vanished"], state["is_step_counted"]))

    trainer.checkpoint_callback = SimpleNamespace(on_save=on_save)
    trainer.watch.alarm = AlarmSettings(patience=1, stop=stops)
    for name in ("step_metrics", "scalars"):
        monkeypatch.setattr(trainer_module, name, lambda values: {})
    monkeypatch.setattr(PPOTrainerSync, "_compute_metrics", lambda *args: None)
    if not stops:
        trainer._save_checkpoint()
        assert copied == [] and checkpoint.read_tracker(tmp_path) == 3, "not logged yet"
    trainer._compute_metrics(None, {"latent/frac_rollouts": 0.0}, {}, 3, 0)
    trainer._compute_metrics(None, {"latent/frac_rollouts": 0.0}, {}, 3, 0)
    assert copied == [(3, 1, True)] + [(3, 2, True)] * stops, "each save once"


def stub_trainer(root, save_freq):
    """A trainer at step 3 with all that saves and logs, and nothing that trains."""
    trainer = LatentPPOTrainer.__new__(LatentPPOTrainer)
    settings = {
        "default_local_dir": str(root),
        "default_hdfs_dir": None,
        "save_freq": save_freq,
    }
    trainer.config = OmegaConf.create({"trainer": settings})
    trainer.options = LatentOptions(output_dir=str(root))
    trainer.watch = LatentWatch(trainer.config, trainer.options)
    trainer.global_steps, trainer.total_training_steps, trainer.resumed_from = 3, 9, 0
    trainer.actor_rollout_wg = SimpleNamespace(save_checkpoint=lambda *args, **kwargs: None)
    trainer.train_dataloader = SimpleNamespace(state_dict=dict)
    trainer.reporter = SimpleNamespace(report=lambda *args: None, alarm=lambda *args: None)
    trainer._unannounced = None
    return trainer
