"""Which checkpoint of a run's folder is read: the newest that counts, whatever else lies there."""

import json

import pytest

from grpo_latent.inspect.run import read_run, run_folders
from grpo_latent.latent.mechanisms import LATENT_CONFIG_FILE


def make_run(folder, *names, tracker=None):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("trainer:\n  total_epochs: 1\n")
    for name in names:
        saved = folder / "checkpoints" / name / "actor" / "huggingface"
        saved.mkdir(parents=True)
        (saved / LATENT_CONFIG_FILE).write_text("{}")
    if tracker is not None:
        (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(tracker)
    return folder


@pytest.mark.parametrize("parent", ["global_step_7", "runs"])
def test_the_newest_step_counts_wherever_the_run_lies(tmp_path, parent):
    names = (
        "global_step_5",
        "global_step_10",
        "global_step_20",
        "global_step_9_best",
        "global_step_99_best",
    )
    run = read_run(make_run(tmp_path / parent / "grpo", *names))
    assert run.checkpoint.parts[-3] == "global_step_20" and run.problems == []


def test_half_of_a_save_is_not_read(tmp_path):
    run = read_run(make_run(tmp_path / "grpo", "global_step_5", "global_step_10", tracker="5"))
    assert run.checkpoint.parts[-3] == "global_step_5" and run.problems == []


def test_half_of_the_first_save_is_not_read(tmp_path):
    run = read_run(make_run(tmp_path / "grpo", "global_step_5", tracker="-1"))
    assert run.checkpoint is None and run.problems == []


@pytest.mark.parametrize(
    ("tracker", "problem"), [("10_best", "not a step"), ("9", "the checkpoint is gone")]
)
def test_a_broken_tracker_is_shown_and_the_newest_is_read(tmp_path, tracker, problem):
    run = read_run(make_run(tmp_path / "grpo", "global_step_5", "global_step_10", tracker=tracker))
    assert run.checkpoint.parts[-3] == "global_step_10"
    assert len(run.problems) == 1 and problem in str(run.problems[0])


def test_a_recipes_folder_stands_for_the_runs_in_it(tmp_path):
    """As `outputs/quickstart` lies: data, SFT with a log of its own, the run, evaluations."""
    recipe = tmp_path / "quickstart"
    (recipe / "sft" / "model").mkdir(parents=True)
    (recipe / "sft" / "metrics.jsonl").write_text("")
    run = make_run(recipe / "grpo", "global_step_5")
    assert run_folders(recipe) == [run] and run_folders(run) == [run]
    other = make_run(tmp_path / "text" / "direct" / "grpo")
    assert run_folders(tmp_path / "text") == [other]  # two folders below
    assert run_folders(tmp_path / "text" / "direct") == [other]
    assert run_folders(recipe / "sft") == [recipe / "sft"]


def test_evaluations_beside_a_run_are_of_its_checkpoints_and_its_start(tmp_path):
    recipe = tmp_path / "quickstart"
    run = make_run(recipe / "grpo")
    (run / "config.yaml").write_text(
        "actor_rollout_ref: {model: {path: /gone/quickstart/sft/model}}"
    )
    for name, checkpoint in (
        ("evaluation_sft", "/gone/quickstart/sft/model"),
        ("evaluation_grpo", "/gone/quickstart/grpo/checkpoints/global_step_5/actor/huggingface"),
        ("evaluation_other", "/gone/quickstart/stage1/model"),
    ):
        report = {"checkpoint": checkpoint, "greedy": {}, "ablations": {"own": 0.5}}
        (recipe / f"{name}.json").write_text(json.dumps(report))
    assert sorted(read_run(run).evaluations) == ["evaluation_grpo.json", "evaluation_sft.json"]
