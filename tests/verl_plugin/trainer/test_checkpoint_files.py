"""The tracker never names an incomplete checkpoint, whatever was killed when."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from folder_cases import without_manifest
from omegaconf import OmegaConf
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from grpo_latent.common import files
from grpo_latent.common.best_checkpoint import BEST_FILE, STATE_FILE, Best, read_best
from grpo_latent.common.manifest import no_manifest, read_manifest, write_manifest
from grpo_latent.errors import CheckpointError, ConfigError
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.trainer import checkpoint
from grpo_latent.verl_plugin.trainer import trainer as trainer_module
from grpo_latent.verl_plugin.trainer.guards import Guards
from grpo_latent.verl_plugin.trainer.trainer import LatentPPOTrainer
from grpo_latent.verl_plugin.worker.parts import PartDigests


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


def test_saving_over_the_only_checkpoint_leaves_no_step_in_the_tracker(tmp_path):
    make(tmp_path, 3, tracker=3)
    checkpoint.make_room(tmp_path, 3, resumed_from=0)
    assert checkpoint.read_tracker(tmp_path) is None
    assert (tmp_path / checkpoint.TRACKER_FILE).read_text() == "-1"


def test_a_lost_tracker_is_told_from_none_yet(tmp_path):
    """Otherwise a run would begin anew, over checkpoints that it has."""
    make(tmp_path, 3, 6)
    assert checkpoint.read_tracker(tmp_path) is None, "half of a save"
    write_manifest(tmp_path / "global_step_3")
    checkpoint.begin_tracker(tmp_path)
    assert checkpoint.read_tracker(tmp_path) is None, "killed between manifest and tracker"
    (tmp_path / checkpoint.TRACKER_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"{checkpoint.TRACKER_FILE}.*Write 3 into it"):
        checkpoint.read_tracker(tmp_path)
    checkpoint.write_tracker(tmp_path, 3)
    checkpoint.begin_tracker(tmp_path)
    assert checkpoint.read_tracker(tmp_path) == 3


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
    """Half of a save, of step 8, is not one of those kept: a killed run has as many as another."""
    make(tmp_path, 2, 4, 6, 8, tracker=6)
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.glob("global_step_*")) == [
        "global_step_4",
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
    alarm = {"patience": 1, "stop": stops}
    trainer = stub_trainer(tmp_path, -1 if stops else 1, alarm, monkeypatch)
    copied = []

    def on_save(trainer, global_step, checkpoint_dir, async_save):
        state = json.loads((Path(checkpoint_dir) / STATE_FILE).read_text())
        bad = state["alarms"]["bad_in_a_row"]
        is_listed = STATE_FILE in read_manifest(checkpoint_dir)
        named = checkpoint.read_tracker(tmp_path)
        copied.append((global_step, bad["vanished"], is_listed, named))

    trainer.checkpoint_callback = SimpleNamespace(on_save=on_save)
    if not stops:
        trainer._save_checkpoint()
        assert copied == [] and checkpoint.read_tracker(tmp_path) is None, "not logged yet"
    log(trainer, 3, {"latent/frac_rollouts": 0.0})
    log(trainer, 4, {"latent/frac_rollouts": 0.0})
    expected = [(3, 1, True, 3)] + [(4, 2, True, 4)] * stops
    assert copied == expected, "each save once"
    assert trainer.total_training_steps == (4 if stops else 9)


SCORE = "val-core/x/acc/mean@1"


def test_a_better_validation_between_saves_is_saved_while_the_rollout_sleeps(
    tmp_path, monkeypatch
):
    trainer = stub_trainer(tmp_path, 9, {}, monkeypatch)
    for step, score in ((3, 0.5), (4, 0.4), (5, 0.6)):
        log(trainer, step, {"latent/frac_rollouts": 1.0, SCORE: score})
    assert trainer.asked == ["sleep", "save 3", "update 3", "sleep", "save 5", "update 5"]
    assert read_best(tmp_path) == Best(5, 0.6, SCORE, "global_step_5")
    assert [path.name for path in tmp_path.glob("global_step_*")] == ["global_step_5"]
    assert trainer.said == []


def collapse(trainer, steps):
    """Steps of verl's loop, each saved, whose reward is gone from step 5 on."""
    logged = {}
    for step in steps:
        trainer.global_steps = step
        trainer._save_checkpoint()
        reward = 0.6 if step < 5 else 0.0
        metrics = {"critic/score/mean": reward, "rewards/standard_error": 0.02}
        log(trainer, step, metrics)
        logged[step] = metrics
    return logged


def log(trainer, step, metrics):
    """The end of a step of verl's loop."""
    trainer.global_steps = step
    trainer._compute_metrics(None, metrics, {}, step, 0)
    trainer.logger.log(data=metrics, step=step)


def test_a_rollback_loads_the_last_good_step_and_saves_it_as_this_one(tmp_path, monkeypatch):
    alarm = {"patience": 2, "start_steps": 1, "rollback": True, "rollback_lr_factor": 0.25}
    trainer = stub_trainer(tmp_path, 1, alarm, monkeypatch)
    tracked = []
    trainer.actor_rollout_wg.load_checkpoint = lambda local_path, del_local_after_load: (
        tracked.append(checkpoint.read_tracker(tmp_path)),
        trainer.asked.append(f"load {Path(local_path).parent.name}"),
    )
    logged = collapse(trainer, range(3, 7))
    expected = ["sleep", "load global_step_4", "scale 0.25", "save 6", "update 6"]
    assert trainer.asked == ["save 3", "save 4", "save 5", "save 6", *expected]
    assert tracked == [5], "a kill while it goes back takes step 6 again, and goes back again"
    assert checkpoint.read_tracker(tmp_path) == 6
    assert logged[6]["latent/rolled_back_to"] == 4.0 and logged[6]["latent/lr_factor"] == 0.25
    assert "latent/rolled_back_to" not in logged[5] and logged[5]["latent/rollbacks"] == 0.0
    assert [(step, line.kind) for step, line in trainer.said] == [(6, "reward"), (6, "rollback")]
    state = json.loads((tmp_path / "global_step_6" / STATE_FILE).read_text())
    assert state["good_steps"] == [3, 4, 6] and state["rollbacks"] == 1
    assert trainer.total_training_steps == 9, "training goes on"


@pytest.mark.parametrize("last_step, kept", [(4, [4]), (5, [4, 5]), (6, [6]), (7, [6, 7])])
def test_what_may_be_gone_back_to_is_not_pruned(tmp_path, monkeypatch, last_step, kept):
    """One checkpoint is to be kept: the last, and the good one while the last is bad."""
    alarm = {"patience": 2, "start_steps": 1, "rollback": True}
    trainer = stub_trainer(tmp_path, 1, alarm, monkeypatch)
    trainer.config.trainer.max_actor_ckpt_to_keep = 1
    trainer.actor_rollout_wg.load_checkpoint = lambda **kwargs: None
    collapse(trainer, range(3, last_step + 1))
    names = {path.name for path in tmp_path.glob("global_step_*")}
    assert names == {f"global_step_{step}" for step in kept}


def test_a_run_that_has_nothing_to_go_back_to_ends(tmp_path, monkeypatch):
    alarm = {"patience": 2, "start_steps": 1, "rollback": True}
    trainer = stub_trainer(tmp_path, 9, alarm, monkeypatch)
    metrics = {"critic/score/mean": 0.6, "rewards/standard_error": 0.02}
    for step, reward in ((3, 0.6), (4, 0.0), (5, 0.0)):
        log(trainer, step, metrics | {"critic/score/mean": reward})
    assert trainer.asked == ["sleep", "save 5", "update 5"] and trainer.total_training_steps == 5
    assert "no good checkpoint" in str(trainer.said[-1][1])


@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_run_that_may_go_back_saves_its_start(tmp_path, monkeypatch, is_resumed):
    trainer = stub_trainer(tmp_path, 9, {"rollback": True}, monkeypatch)
    trainer.global_steps, trainer.is_resumed = 1, is_resumed
    announced = []
    trainer.checkpoint_callback = SimpleNamespace(
        on_save=lambda trainer, global_step, **kwargs: announced.append(global_step)
    )
    trainer.on_train_begin()
    assert trainer.asked == ([] if is_resumed else ["save 0"])
    if not is_resumed:
        assert announced == [0] and trainer.guards.last_good.name == "global_step_0"
        assert checkpoint.read_tracker(tmp_path) == 0


@pytest.mark.parametrize("mode", ["auto", "resume_path"])
def test_what_follows_the_tracker_is_done_again_on_resume(tmp_path, monkeypatch, mode):
    """A kill may have come right after it; a step that is gone back to has nothing to follow."""
    trainer = stub_trainer(tmp_path, 1, {}, monkeypatch)
    for step, score in ((3, 0.5), (4, 0.4), (5, 0.6)):
        trainer.global_steps = step
        trainer._save_checkpoint()
        log(trainer, step, {"latent/frac_rollouts": 1.0, SCORE: score})
    (tmp_path / BEST_FILE).unlink()
    resumed = stub_trainer(tmp_path, 1, {}, monkeypatch)
    resumed.config.trainer.max_actor_ckpt_to_keep = 1
    resumed.config.trainer.resume_mode = mode
    resumed.config.trainer.resume_from_path = str(tmp_path / "global_step_5")
    called = []
    resumed.checkpoint_callback = SimpleNamespace(
        on_save=lambda global_step, **kwargs: called.append(global_step)
    )
    monkeypatch.setattr(PPOTrainerSync, "_load_checkpoint", lambda self: None)
    resumed.global_steps = 5
    resumed._load_checkpoint()
    assert read_best(tmp_path) == Best(5, 0.6, SCORE, "global_step_5") and resumed.is_resumed
    assert called == ([5] if mode == "auto" else [])
    kept = {path.name for path in tmp_path.glob("global_step_*")}
    assert kept == (
        {"global_step_5"} if mode == "auto" else {f"global_step_{n}" for n in (3, 4, 5)}
    )
    [(_, line)] = resumed.said
    assert str(line).startswith("resumed from global_step_5: weights, optimizer")


def test_a_resumed_run_says_that_nothing_could_be_compared(tmp_path, monkeypatch):
    trainer = stub_trainer(tmp_path, 1, {}, monkeypatch)
    trainer._save_checkpoint()
    log(trainer, 3, {"latent/frac_rollouts": 1.0})
    folder = without_manifest(tmp_path / "global_step_3")
    monkeypatch.setattr(PPOTrainerSync, "_load_checkpoint", lambda self: None)
    trainer.config.trainer.resume_mode = "auto"
    trainer._load_checkpoint()
    _, *lines = [str(line) for _, line in trainer.said]
    assert lines == [f"resume: {no_manifest(folder)}"]


def stub_trainer(root, save_freq, alarm, monkeypatch):
    """A trainer at step 3 with all that saves and logs, and nothing that trains.

    `asked` is what it has asked of workers and rollout, `said` the lines with their steps.
    """
    monkeypatch.setattr(trainer_module, "step_metrics", lambda batch: {})
    monkeypatch.setattr(PPOTrainerSync, "_compute_metrics", lambda *args: None)
    trainer = LatentPPOTrainer.__new__(LatentPPOTrainer)
    settings = {
        "default_local_dir": str(root),
        "default_hdfs_dir": None,
        "save_freq": save_freq,
        "val_only": False,
        "project_name": "p",
        "experiment_name": "e",
    }
    actor = {"checkpoint": {"load_contents": ["model", "optimizer", "extra"]}}
    trainer.config = OmegaConf.create({"trainer": settings, "actor_rollout_ref": {"actor": actor}})
    trainer.options = LatentOptions(output_dir=str(root), alarm=alarm)
    trainer.guards = Guards(trainer.options, trainer.config.trainer)
    trainer.global_steps, trainer.total_training_steps, trainer.resumed_from = 3, 9, 0
    trainer.is_resumed = False
    asked, parts = [], []
    trainer.asked = asked

    def save(folder, remote, step, **kwargs):
        asked.append(f"save {step}")
        Path(folder).mkdir(parents=True)
        (Path(folder) / "fsdp_config.json").write_text('{"world_size": 1}')
        parts.append(PartDigests(folder, 0))

    trainer.actor_rollout_wg = SimpleNamespace(
        save_checkpoint=save,
        scale_learning_rate=lambda factor: asked.append(f"scale {factor:g}"),
        digest_parts=lambda: [parts[-1].result()],
        check_parts=lambda folder, entries: None,
        world_size=1,
    )
    trainer.checkpoint_manager = SimpleNamespace(
        sleep_replicas=lambda: asked.append("sleep"),
        update_weights=lambda step: asked.append(f"update {step}"),
    )
    trainer.checkpoint_callback = SimpleNamespace(on_save=lambda **kwargs: None)
    trainer.train_dataloader = SimpleNamespace(state_dict=dict)
    said = trainer.said = []
    trainer.reporter = SimpleNamespace(
        report=lambda *args: None,
        say=lambda lines, step, total: said.extend((step, line) for line in lines),
    )
    trainer._pending = trainer._saved_step = None
    trainer._dump_futures = []
    trainer.logger = SimpleNamespace(log=lambda *args: None, logger={})
    return trainer
