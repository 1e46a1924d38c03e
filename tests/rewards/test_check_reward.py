"""The checker finds each fault that it names, and none in the project's own functions."""

import subprocess
import sys

import pytest

from grpo_latent.check_reward import main
from grpo_latent.rewards.check import check_function
from grpo_latent.rewards.functions import FunctionSpec

SIGNATURE = (
    "def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):\n"
)
JUDGE = "    good = f'<answer> {ground_truth} </answer>' in solution_str\n"


def check(tmp_path, body, header="", timeout_s=60.0):
    file = tmp_path / "mine.py"
    file.write_text(header + SIGNATURE + body)
    return check_function(FunctionSpec(str(file)), timeout_s=timeout_s)


def test_nothing_is_wrong_with_a_sound_function(tmp_path):
    body = (
        "    if ground_truth is None: raise ValueError('no answer')\n"
        + JUDGE
        + "    return float(good)\n"
    )
    report = check(tmp_path, body)
    assert report.problems == [] and report.warnings == []
    assert len(report.rows) >= 20


@pytest.mark.parametrize("name", ["accuracy", "format", "digits"])
def test_the_projects_own_functions_pass(name):
    assert check_function(FunctionSpec(f"pkg://reward.{name}"), timeout_s=60.0).problems == []


@pytest.mark.parametrize(
    "body, header, problem",
    [
        (
            "    return float(solution_str.split('<answer>')[1].startswith(' 4'))\n",
            "",
            "raised an exception: IndexError",
        ),
        ("    return solution_str\n", "", "wrong type"),
        ("    return random.random()\n", "import random\n", "not deterministic"),
        ("    seen.append(1)\n    return len(seen) % 2\n", "seen = []\n", "not deterministic"),
        (
            "    extra_info['latent']['num_spans'] = 0\n    return len(solution_str)\n",
            "",
            "changed its extra_info",
        ),
        (
            "    return 1 / len(solution_str) if solution_str else float('nan')\n",
            "",
            "empty: returned nan",
        ),
    ],
)
def test_problems(tmp_path, body, header, problem):
    report = check(tmp_path, body, header)
    assert any(problem in p for p in report.problems), report.problems


def test_an_exception_is_told_in_one_line_with_the_users_line(tmp_path):
    (tmp_path / "beside.py").write_text("def parse(text):\n    return int(text, base=10)\n")
    report = check(tmp_path, "    return parse('a\\nb' * 500)\n", "from beside import parse\n")
    name, said = report.problems[0].split(": raised an exception: ")
    assert said.startswith("ValueError: invalid literal for int() with base 10: ")
    assert said.endswith(f"({tmp_path / 'beside.py'}:2)")
    assert "\n" not in said and len(said) < 200 + len(str(tmp_path))


def test_a_file_that_fails_to_import_is_told_in_one_line(tmp_path):
    report = check(tmp_path, "    return 1.0\n", "import json\njson.loads('[1,\\n2')\n")
    (problem,) = report.problems
    assert "got JSONDecodeError: Expecting ',' delimiter" in problem and "\n" not in problem
    assert f"({tmp_path / 'mine.py'}:2); expected a file that imports" in problem


def test_a_function_that_does_not_return_is_a_problem(tmp_path):
    body = "    time.sleep(90 if len(solution_str) > 9999 else 0)\n    return len(solution_str)\n"
    report = check(tmp_path, body, "import time\n", timeout_s=1.0)
    assert any("100k characters: did not return" in p for p in report.problems), report.problems
    (opened,) = (p for p in report.problems if p.startswith("100k opened tags: did not return"))
    assert opened.endswith("look for the closing one first")


def test_equal_scores_are_no_news_where_calls_failed(tmp_path):
    report = check(tmp_path, "    return 1.0 if solution_str else len(None)\n")
    assert report.problems and not any("always" in w for w in report.warnings)


@pytest.mark.parametrize(
    "body, header, warning",
    [
        ("    return 1.0\n", "", "always 1.0"),
        (JUDGE + "    return -float(good)\n", "", "the right answer scores -1.0, the wrong one"),
        (
            "    time.sleep(0.15 if not solution_str else 0)\n    return len(solution_str)\n",
            "import time\n",
            "slow on",  # and on others, where the machine is
        ),
        (JUDGE + "    return float(good)\n", "", "ground_truth is None"),
    ],
)
def test_warnings(tmp_path, body, header, warning):
    report = check(tmp_path, body, header)
    assert report.problems == []
    assert any(warning in w for w in report.warnings), report.warnings


def test_exit_codes_and_output(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # no text that one looks for is broken to fit that
    assert main(["pkg://reward.digits"]) == 0
    assert "nothing wrong" in capsys.readouterr().out
    (tmp_path / "bad.py").write_text(SIGNATURE + "    return [1]\n")
    assert main([str(tmp_path / "bad.py")]) == 2
    assert "wrong type" in capsys.readouterr().out
    assert main([str(tmp_path / "absent.py")]) == 2
    assert "no such reward file" in capsys.readouterr().out


def test_as_a_command(tmp_path):
    (tmp_path / "short.py").write_text("def compute_score(text): return 1.0\n")
    command = [sys.executable, "-m", "grpo_latent.check_reward", str(tmp_path / "short.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "cannot be called" in done.stdout
