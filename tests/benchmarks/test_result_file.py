"""How benchmarks write what they found: the command, where it ran, and the numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from result_file import command_line, write_result  # noqa: E402


def test_a_file_names_command_machine_and_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # wherever it was started from
    monkeypatch.setattr(
        sys, "argv", [str(ROOT / "benchmarks" / "step.py"), "--steps", "3", "a b=1"]
    )
    write_result(tmp_path / "new" / "found.json", {"ratio": 0.5}, seed=7)
    found = json.loads((tmp_path / "new" / "found.json").read_text())
    assert found["command"] == "python benchmarks/step.py --steps 3 'a b=1'"
    assert found["provenance"]["seed"] == 7 and found["provenance"]["versions"]["torch"]
    assert found["ratio"] == 0.5


def test_nothing_is_written_without_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_result(None, {"ratio": 0.5})
    assert not list(tmp_path.iterdir())


def test_a_script_outside_is_named_without_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "mine.py")])
    assert command_line() == "python mine.py"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.long
def test_weights_arrive_both_ways(tmp_path):
    """The benchmark compares what arrived with what was sent."""
    script = [sys.executable, "benchmarks/weights.py", "--megabytes=4", "--repeats=1"]
    path = tmp_path / "weights.json"
    subprocess.run([*script, "--json", path], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    found = json.loads(path.read_text())
    assert {*found["medians"]} == {"mapped", "store"} and found["megabytes"] == 4
