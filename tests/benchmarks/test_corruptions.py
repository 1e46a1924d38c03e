"""A sample of `benchmarks/corruptions.py`: damage to any file is named, or changes nothing that is read.

All of it: `make test-kill`.
"""

import random
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import corruptions  # noqa: E402
from corruption_cases import CASES  # noqa: E402


def test_damage_is_named_or_harmless(tmp_path):
    seed = random.randrange(10**6)  # another sample each time; a failure says which
    found = corruptions.grid(tmp_path, seed, num=50)
    assert len(found) >= 40
    missed = [
        f"{damage}: {said}"
        for damage, said in found
        if said not in (corruptions.NAMED, corruptions.HARMLESS)
    ]
    assert not missed, (seed, missed)


def test_what_is_not_noticed_is_told(tmp_path):
    """The verdict itself: a reader that compares nothing is found out."""
    case = CASES["evaluation's journal"]
    case.write(tmp_path, 0)
    blind = corruptions.Case(case.write, lambda folder: len(list(folder.iterdir())))
    expected = blind.read(tmp_path)
    assert corruptions.verdict(blind, tmp_path, {"own.00000.json"}, expected) == "harmless"
    (tmp_path / "own.00000.json").unlink()
    said = corruptions.verdict(blind, tmp_path, {"own.00000.json"}, expected)
    assert said.startswith("read as something else")

    def crash(folder):
        raise KeyError("x")

    said = corruptions.verdict(corruptions.Case(case.write, crash), tmp_path, {"a"}, expected)
    assert said.startswith("KeyError")


@pytest.mark.parametrize("kind", corruptions.CONTENTS)
def test_each_kind_of_damage_changes_the_content(kind):
    content = b"one\ntwo\nthree\n"
    for seed in range(20):
        damaged = corruptions.CONTENTS[kind](content, random.Random(seed))
        assert damaged != content
