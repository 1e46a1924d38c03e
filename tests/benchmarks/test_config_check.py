"""Each mistake of `benchmarks/config_mistakes.py` is named before Ray starts, and none is imagined.

`make test` takes a few of each kind, `make test-long` all. Does not cover mistakes that only
weights show.
"""

import sys
from copy import deepcopy
from pathlib import Path

import pytest
from drawn import REPEAT, drawing

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import config_check  # noqa: E402
from config_mistakes import MISTAKES, WITH_FILES, key_of  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs")
    config_check.write_inputs(path)
    return path


@pytest.fixture(scope="module")
def usable(folder):
    return config_check.usable(folder)


def test_there_are_enough_of_them_and_each_is_there_once():
    every = [mistake for mistakes in MISTAKES.values() for mistake in mistakes]
    assert len(every) >= 150 and len(set(every)) == len(every)
    assert key_of("+a.b=1 c.d=2") == "a.b" and key_of("a=1 => c") == "c"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_are_named(usable, kind):
    assert not_named(usable, MISTAKES[kind]) == {}


def test_some_mistakes_of_each_kind_are_named(usable):
    drawn = drawing()
    some = [
        mistake
        for mistakes in MISTAKES.values()
        for mistake in drawn.sample(mistakes, min(len(mistakes), 3))
    ]
    assert not_named(usable, some) == {}, REPEAT


def not_named(usable, mistakes):
    """What is said of each mistake that is not named."""
    said = {
        mistake: config_check.verdict(
            config_check.check_values, config_check.with_overrides(usable, mistake), mistake
        )
        for mistake in mistakes
    }
    return {mistake: found for mistake, found in said.items() if found}


def test_what_files_decide_is_named(usable, folder):
    config_check.check_start(deepcopy(usable))
    said = {
        mistake: config_check.verdict(
            config_check.check_start, config_check.with_overrides(usable, mistake, folder), mistake
        )
        for mistake in WITH_FILES
    }
    assert {mistake: found for mistake, found in said.items() if found} == {}


def test_a_mistake_that_passes_is_counted(usable):
    passed = config_check.verdict(lambda config: None, usable, "trainer.save_freq=0")
    assert passed == "passes"

    def broken(config):
        raise ZeroDivisionError

    assert "a traceback" in config_check.verdict(broken, usable, "trainer.save_freq=0")
