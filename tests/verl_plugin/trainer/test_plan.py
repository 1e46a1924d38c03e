"""`train --check`: what it says, what it refuses, and that it leaves nothing behind. Without Ray."""

import shutil
import sys

import pytest
import tiny_run
import torch
from omegaconf import OmegaConf

from grpo_latent import train
from grpo_latent.common.step_folders import TRACKER_FILE
from grpo_latent.errors import CheckpointError, RewardError
from grpo_latent.verl_plugin.rewards.start_check import check_rewards
from grpo_latent.verl_plugin.trainer.commit import write_manifest
from grpo_latent.verl_plugin.trainer.plan import check_resume, plan
from grpo_latent.verl_plugin.worker.parts import PartDigests


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny_run.write_inputs(tmp_path_factory.mktemp("inputs"))


def write_checkpoint(root, step, world_size=1):
    """A checkpoint as a run of `world_size` ranks would leave it, with the tracker's word."""
    folder = root / f"global_step_{step}"
    (folder / "actor").mkdir(parents=True)
    for rank in range(world_size):
        torch.save({}, folder / "actor" / f"model_world_size_{world_size}_rank_{rank}.pt")
    (folder / "actor" / "fsdp_config.json").write_text(f'{{"world_size": {world_size}}}')
    torch.save({"num_yielded": step}, folder / "data.pt")
    (folder / "guards.json").write_text("{}")
    parts = [PartDigests(folder / "actor", rank).result() for rank in range(world_size)]
    write_manifest(folder, parts)
    (root / TRACKER_FILE).write_text(str(step))
    return folder


@pytest.fixture
def commanded(inputs, tmp_path, monkeypatch, capfd):
    """Runs `train --check` with overrides: exit code, stdout, stderr."""
    monkeypatch.setattr(train, "set_environment", lambda config, folder: None)
    monkeypatch.chdir(tmp_path)

    def run(*more):
        arguments = tiny_run.overrides(inputs, tmp_path / "out", *more)
        monkeypatch.setattr(sys, "argv", ["train", "--check", *arguments])
        code = train.main()
        return code, *capfd.readouterr()

    return run


def test_a_usable_config_is_told_and_nothing_is_written(commanded, tmp_path):
    code, said, _ = commanded("latent.preflight.num_prompts=0")
    assert code == 0 and list(tmp_path.iterdir()) == []
    assert "10 to train on, 3 held out" in said and "6 steps, from the model on" in said
    assert "4 prompts x 4 trajectories" in said and "nothing was started" in said
    assert "reward.py:compute_score (called on one right answer before the start; odd" in said
    assert "shuffle decides, with an accuracy of guessing of 0 (latent.usage.chance)" in said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train_batch_size=0", "ConfigError: data.train_batch_size: out of range; got 0"),
        ("actor_rollout_ref.model.path=/nowhere", "CheckpointError: /nowhere"),
        ("data.train_batch_size=64", "a batch larger than the data"),
        ("latent.output_dir=/dev/null/x", "a file is where a folder should be"),
    ],
)
def test_what_cannot_run_ends_with_two(commanded, override, message):
    code, _, errors = commanded(override)
    assert code == 2 and message in errors


def test_the_checkpoint_to_resume_is_read_whole(inputs, tmp_path):
    config = tiny_run.make_config(inputs, tmp_path)
    assert check_resume(config) == []
    folder = write_checkpoint(tmp_path / "checkpoints", 3)
    assert check_resume(config) == []
    (line,) = [line for line in plan(config) if line.startswith("run")]
    assert "6 steps, 3 taken: resumes weights, optimizer, learning-rate schedule" in line
    assert "place in the data, alarms and best score" in line
    part = next((folder / "actor").glob("*.pt"))
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=f"{part.name}.*has changed"):
        check_resume(config)
    shutil.rmtree(folder)
    write_checkpoint(tmp_path / "checkpoints", 3, world_size=2)
    [note] = check_resume(config)
    assert note.startswith("saved by 2 ranks, goes on with 1: ")


FAILING = {
    "raises": ("return extra_info['missing']", "exception"),
    "hands back a text": ("return 'good'", "type"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_reward_is_called_on_a_row_before_anything_starts(inputs, tmp_path, name):
    body, kind = FAILING[name]
    signature = "def compute_score(data_source, solution_str, ground_truth, extra_info):"
    (tmp_path / "bad.py").write_text(f"{signature}\n    {body}\n")
    custom = f"reward.custom_reward_function.path={tmp_path / 'bad.py'}"
    config = tiny_run.make_config(inputs, tmp_path, custom)
    with pytest.raises(RewardError, match=r"train\.parquet row 0") as caught:
        check_rewards(config)
    assert caught.value.kind == kind
    config.latent.reward.on_error = "drop"
    (note,) = check_rewards(config)
    assert "train.parquet row 0" in note


def test_a_reward_is_given_the_row_that_it_will_be_given(inputs, tmp_path):
    (tmp_path / "asks.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
        "    assert data_source == 'tiny' and ground_truth == '0' and extra_info['index'] == 0\n"
        "    assert ground_truth in solution_str and extra_info['latent']['num_spans'] == 1\n"
        "    return 1.0\n"
    )
    custom = f"reward.custom_reward_function.path={tmp_path / 'asks.py'}"
    assert check_rewards(tiny_run.make_config(inputs, tmp_path, custom)) == []


def test_a_judge_is_not_asked_before_it_is_there(inputs, tmp_path):
    config = tiny_run.make_config(inputs, tmp_path)
    OmegaConf.update(config, "reward.reward_model.enable", True)
    (note,) = check_rewards(config)
    assert "judge" in note
