"""The paths that `benchmarks/mechanisms.py` times decode the same, on fewer rows; it asserts that itself."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import mechanisms  # noqa: E402


@pytest.mark.long
@pytest.mark.parametrize("section", mechanisms.SECTIONS)
def test_paths_decode_the_same(monkeypatch, section):
    monkeypatch.setattr(mechanisms, "SLOT_ROWS", 2)
    monkeypatch.setattr(mechanisms, "NUM_ROWS", 4)
    _, paths = mechanisms.SECTIONS[section]()
    assert len(paths) > 1
