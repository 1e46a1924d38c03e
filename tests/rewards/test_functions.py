"""Loading reward functions: what is wrong with a file is said before the run starts."""

import sys
import textwrap

import pytest

from grpo_latent.errors import ConfigError
from grpo_latent.rewards import functions
from grpo_latent.rewards.functions import (
    FunctionSpec,
    load_function,
    source_digest,
    specs_from_config,
)

GOOD = (
    "def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs): "
    "return 1.0\n"
)


@pytest.fixture
def write(tmp_path):
    def write(code, name="mine.py"):
        (tmp_path / name).write_text(textwrap.dedent(code))
        return str(tmp_path / name)

    return write


def test_loads_a_file_and_a_package_module(write):
    code = (
        GOOD
        + "def other(data_source, solution_str, ground_truth, extra_info, scale): return scale\n"
    )
    function = load_function(FunctionSpec(write(code), "other", kwargs={"scale": 2}))
    assert function("x", "", "", {}, scale=2) == 2
    assert load_function(FunctionSpec("pkg://reward.digits")).__module__ == "reward.digits"


def test_the_digest_is_of_the_file_however_it_is_named(write):
    module = FunctionSpec("pkg://reward.digits")
    file = load_function(module).__globals__["__file__"]
    assert (
        source_digest(module)
        == source_digest(FunctionSpec(file))
        != source_digest(FunctionSpec(write(GOOD)))
    )


def test_files_with_dataclasses_load(write):
    code = "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int' = 1\n" + GOOD
    assert load_function(FunctionSpec(write(code)))


@pytest.mark.parametrize(
    "code, name, message",
    [
        ("", "compute_score", r"no function 'compute_score'.*functions \[\]"),
        ("def score(): return 1", "compute_score", r"functions \['score'\]"),
        ("compute_score = 1.0", "compute_score", "no function"),
        (
            "def compute_score(text): return 1.0",
            "compute_score",
            r"cannot be called.*compute_score\(text\)",
        ),
        (
            "def compute_score(data_source, solution_str, ground_truth): return 1.0",
            "compute_score",
            "extra_info",
        ),
        (
            "def compute_score(a, solution_str, ground_truth, extra_info): return 1.0",
            "compute_score",
            "cannot be called",
        ),
        ("def compute_score(:", "compute_score", "fails to import.*SyntaxError"),
        ("import no_such_package", "compute_score", "fails to import.*no_such_package"),
        ("raise SystemExit(0)", "compute_score", "fails to import.*SystemExit"),
    ],
)
def test_malformed_files(write, code, name, message):
    with pytest.raises(ConfigError, match=message):
        load_function(FunctionSpec(write(code), name))


def test_missing_files(tmp_path, write):
    for path in (str(tmp_path / "none.py"), str(tmp_path)):
        with pytest.raises(ConfigError, match="no such reward file"):
            load_function(FunctionSpec(path))
    with pytest.raises(ConfigError, match="ends in .py"):
        load_function(FunctionSpec(write(GOOD, "reward.txt")))
    with pytest.raises(ConfigError, match="fails to import"):
        load_function(FunctionSpec("pkg://reward.no_such_module"))


def test_kwargs_that_the_function_does_not_take(write):
    path = write(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None): return 1.0"
    )
    with pytest.raises(ConfigError, match="cannot be called.*scale"):
        load_function(FunctionSpec(path, kwargs={"scale": 2}))


def test_specs_from_config():
    specs = specs_from_config(
        [
            {"path": "reward/accuracy.py", "weight": 2},
            {"path": "reward/format.py", "name": "ilvr", "kwargs": {"a": 1}},
            {"path": "pkg://reward.digits", "term": "task", "name": None, "weight": None},
        ]
    )
    assert [(s.term, s.name, s.weight, s.kwargs) for s in specs] == [
        ("accuracy", "compute_score", 2, {}),
        ("ilvr", "ilvr", 1.0, {"a": 1}),
        ("task", "compute_score", 1.0, {}),
    ]
    assert (
        FunctionSpec("pkg://reward.digits").term == FunctionSpec("../x/digits.py").term == "digits"
    )


@pytest.mark.parametrize(
    "entries, message",
    [
        ([], "no reward function.*custom_reward_function.path"),
        ([{"name": "f"}], r"functions\[0\]"),
        (["reward/digits.py"], "not a reward function"),
        ([{"path": "a.py", "weigth": 1}], r"unknown key.*weigth"),
        ([{"path": ""}], "needs a file"),
        ([{"path": "a.py", "weight": "1"}], "weight: wrong type"),
        ([{"path": "a.py", "weight": float("nan")}], "weight: not a number; got nan"),
        ([{"path": "a.py", "weight": True}], "weight: wrong type"),
        ([{"path": "a.py"}, {"path": "b/a.py"}], r"same name in the log.*\['a'\]"),
    ],
)
def test_malformed_configs(entries, message):
    with pytest.raises(ConfigError, match=message):
        specs_from_config(entries)


def test_a_module_without_a_file_has_no_digest():
    with pytest.raises(ConfigError, match="pkg://sys: a reward function without a file"):
        source_digest(FunctionSpec("pkg://sys", "exit"))


def test_a_reward_file_imports_its_neighbours(tmp_path, monkeypatch):
    """As it may where Python runs it; two neighbours of one name would be one module."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(functions, "_neighbourhoods", [])
    for name, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "neighbour_of_reward.py").write_text(f"VALUE = {value}")
        (tmp_path / name / "reward.py").write_text(
            "from neighbour_of_reward import VALUE\n"
            "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
            "    return VALUE\n"
        )
    function = load_function(FunctionSpec(str(tmp_path / "a/reward.py")))
    assert function("", "", "") == 1.0
    load_function(FunctionSpec(str(tmp_path / "a/reward.py")))
    with pytest.raises(ConfigError, match="b/reward.py: two reward files have neighbours of one"):
        load_function(FunctionSpec(str(tmp_path / "b/reward.py")))
    del sys.modules["neighbour_of_reward"]
