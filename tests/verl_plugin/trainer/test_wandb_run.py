"""A resumed training goes on in its run of wandb: ids in files, and the real wandb, offline."""

import os

import pytest
from omegaconf import OmegaConf
from verl.utils.tracking import Tracking

from grpo_latent.common.step_folders import STEP_PREFIX, TRACKER_FILE
from grpo_latent.verl_plugin.trainer.wandb_run import ID_FILE, continue_run


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A start of training in `tmp_path`, whatever the one before left; the id of its run."""
    for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.setenv(name, "")  # so that what a start sets is undone

    def run(logger=("wandb",), **trainer):
        for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
            del os.environ[name]
        values = {"logger": list(logger), "resume_mode": "auto", "resume_from_path": None}
        values |= {"default_local_dir": str(tmp_path / "checkpoints")} | trainer
        continue_run(OmegaConf.create({"trainer": values}), tmp_path)
        run_id = os.environ.setdefault("WANDB_RUN_ID", "")
        os.environ.setdefault("WANDB_RESUME", "")
        return run_id

    return run


def save(folder, step):
    (folder / "checkpoints" / f"{STEP_PREFIX}{step}").mkdir(parents=True)
    (folder / "checkpoints" / TRACKER_FILE).write_text(str(step))


def test_a_resumed_training_has_the_id_of_its_start(tmp_path, start):
    first = start()
    assert len(first) == 8 and (tmp_path / ID_FILE).read_text() == first
    second = start()
    assert second != first, "nothing was saved: this is a new beginning"
    save(tmp_path, 3)
    assert start() == second and os.environ["WANDB_RESUME"] == "allow"
    assert start(resume_mode="disable") != second


def test_a_branch_from_an_older_step_is_a_run_of_its_own(tmp_path, start):
    first = start()
    save(tmp_path, 3)
    older = str(tmp_path / "checkpoints" / f"{STEP_PREFIX}3")
    branch = start(resume_mode="resume_path", resume_from_path=older)
    assert branch != first and start() == branch


def test_the_users_own_id_stays_and_other_loggers_get_none(tmp_path, start, monkeypatch):
    assert start(logger=("console", "file")) == "" and not (tmp_path / ID_FILE).exists()
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    trainer = {"logger": "wandb", "resume_mode": "auto", "default_local_dir": str(tmp_path)}
    continue_run(OmegaConf.create({"trainer": trainer}), tmp_path)
    assert os.environ["WANDB_RUN_ID"] == "mine" and not (tmp_path / ID_FILE).exists()


def test_verl_begins_that_very_run(tmp_path, start, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb.teardown()  # a process reads the environment once, maybe for another test
    run_id = start()
    tracking = Tracking("project", "run", ["wandb"], config={"trainer": {}})
    try:
        assert wandb.run.id == run_id
    finally:
        tracking.finish()
