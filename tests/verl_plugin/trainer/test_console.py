"""One line a step on the console, everything else in the log."""

import subprocess
import sys

import pytest
from rich.console import Console

from grpo_latent.verl_plugin.trainer.console import StepPrinter
from grpo_latent.verl_plugin.trainer.console_line import Report, short_line

CODE = """
import os, sys
from grpo_latent.verl_plugin.trainer.console import StepPrinter, output_to_file
from grpo_latent.verl_plugin.trainer.console_line import Report
from pathlib import Path
with output_to_file(Path(sys.argv[1])) as console:
    print("from print"); os.system("echo from a child"); os.write(2, b"from C\\n")
    with StepPrinter(console) as on_report:
        on_report(Report("validation", 0, 2, {"val-core/x/acc/mean@1": 0.5}))
        for step in (1, 2):
            on_report(Report("validation", step, 2, {"val-core/x/acc/mean@1": 0.5}))
            on_report(Report("step", step, 2, {"critic/score/mean": 0.25, "val-core/x/acc/mean@1": 0.5}))
print("back")
"""


def test_console_and_log_are_apart(tmp_path):
    log = tmp_path / "new" / "train.log"
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CODE, str(log)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        steps = ["step 0/2  held-out 0.500"] + [
            f"step {s}/2  reward 0.250  held-out 0.500" for s in (1, 2)
        ]
        assert lines == [*steps, "back"]
    assert sorted(log.read_text().split("\n")) == sorted(
        ["", *["from C", "from a child", "from print"] * 2]
    )


def test_silence_before_the_first_step_is_explained_now_and_then(capsys):
    printer = StepPrinter(Console(highlight=False, soft_wrap=True))
    for seconds in (0.5, 9.5, 10.2, 10.7, 39.0, 41.0, 300.0, 301.0):
        printer.wait(seconds)
    said = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["10 s", "41 s", "300 s"]


def test_the_line_of_a_step():
    metrics = {
        "critic/score/mean": 0.75,
        "val-core/a/acc/mean@1": 0.5,
        "val-core/b/acc/mean@1": 1.0,
        "actor/kl_loss": 0.01234,
        "actor/entropy": 1.5,
        "latent/steps_mean": 2.0,
        "latent/replay_logp_gap_max": 2e-6,
        "timing_s/step": 3.21,
    }
    line = short_line(Report("step", 7, 60, metrics))
    assert line == (
        "step 7/60  reward 0.750  held-out 0.750  kl 0.0123  entropy 1.500  latent 2.0  gap 2.0e-06  3.2 s"
    )


@pytest.mark.parametrize(
    ("share", "shown"), [(0.0, ""), (0.25, "  silent 0.25"), (1.0, "  silent 1.00")]
)
def test_silent_is_the_share_of_groups_without_signal_in_this_step(share, shown):
    metrics = {"critic/score/mean": 0.5, "frac_reward_zero_std": share, "actor/silent_steps": 3.0}
    assert short_line(Report("step", 7, 60, metrics)) == f"step 7/60  reward 0.500{shown}"
