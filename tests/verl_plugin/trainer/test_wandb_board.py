"""What is drawn for wandb at the end of a run never costs the run.

Another process draws, without a device; a warning at most.
"""

import json
import sys
from types import SimpleNamespace

import pytest

from grpo_latent.errors import TrainingError
from grpo_latent.verl_plugin.trainer import wandb_board
from grpo_latent.verl_plugin.trainer.wandb_board import Board, draw_apart


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "grpo"
    folder.mkdir()
    (folder / "config.yaml").write_text("trainer:\n  device: cuda\n")
    (folder / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "data": {"critic/score/mean": 0.5}}) + "\n"
    )
    return folder


def test_the_page_is_drawn_by_a_process_that_sees_no_device(run_folder, monkeypatch):
    run, calls = wandb_board.subprocess.run, []

    def watched(command, **options):
        calls.append(options["env"]["CUDA_VISIBLE_DEVICES"])
        return run(command, **options)

    monkeypatch.setattr(wandb_board.subprocess, "run", watched)
    html, tables = draw_apart(run_folder)
    assert calls == [""] and "<title>" in html and "grpo" in html
    assert (
        tables["latent/groups"]["rows"] == []
        and "disagreement" in tables["latent/groups"]["columns"]
    )


def stand_in_python(tmp_path, monkeypatch, script):
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("kill -9 $$", "exit code -9"),  # as the system does where memory is short
        ("echo 'DataError: nothing to inspect' >&2; exit 1", "DataError: nothing to inspect"),
        ("exec sleep 60", "took too long"),
    ],
)
def test_a_page_that_cannot_be_drawn_is_a_warning(
    run_folder, tmp_path, monkeypatch, caplog, script, problem
):
    stand_in_python(tmp_path, monkeypatch, script)
    with pytest.raises(TrainingError, match=problem):
        draw_apart(run_folder, timeout_s=2)
    monkeypatch.setattr(wandb_board, "draw_apart", lambda folder: draw_apart(folder, timeout_s=2))
    Board(run_folder, seed=0).log_page(7)
    assert problem in caplog.text and f"python -m grpo_latent.inspect {run_folder}" in caplog.text


def test_wandbs_own_failures_are_warnings_too(run_folder, monkeypatch, caplog):
    pytest.importorskip("wandb")

    def refuse(*args, **kwargs):
        raise RuntimeError("no space left")

    monkeypatch.setattr("wandb.run", SimpleNamespace(log=refuse, summary={}))
    board = Board(run_folder, seed=0)
    board.log_rollouts(1, [{"response_mask": [1], "text": "7"}], [{"num_spans": 1}])
    assert "no space left" in caplog.text and "they are in the dump" in caplog.text


def test_the_run_says_in_its_summary_where_it_ran(run_folder, monkeypatch):
    pytest.importorskip("wandb")
    run = SimpleNamespace(log=lambda *args, **kwargs: None, summary={})
    monkeypatch.setattr("wandb.run", run)
    board = Board(run_folder, seed=7)
    for step in (1, 2):
        board.log_rollouts(step, [{"response_mask": [1], "text": "7"}], [{"num_spans": 1}])
    assert run.summary["provenance"]["seed"] == 7 and run.summary["provenance"]["processor"]
