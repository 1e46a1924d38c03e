from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf

from grpo_latent.common.settings import build, check_choice, section
from grpo_latent.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Inner:
    rank: int = 4
    names: tuple[str, ...] = ("a",)


@dataclass(frozen=True)
class Outer:
    path: str
    rows: int = 1
    rate: float = 0.5
    is_on: bool = False
    limit: int | None = None
    kind: Literal["x", "y"] = "x"
    files: tuple[str, ...] = ()
    clamp: tuple[float, float] | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


def test_values_take_the_form_of_their_fields():
    values = {
        "path": "p",
        "rate": 2,
        "files": "one",
        "clamp": [-1.5, 3],
        "inner": {"names": ["b", "c"]},
    }
    built = build(Outer, values, "outer")
    assert built == Outer("p", rate=2, files=("one",), clamp=(-1.5, 3), inner=Inner(4, ("b", "c")))
    assert isinstance(built.rate, int), "a number stays as it was given"
    assert build(Outer, values, "outer") == build(Outer, OmegaConf.create(values), "outer")
    assert build(Inner, None, "inner") == build(Inner, {}, "inner") == Inner()
    assert build(Outer, {"path": "p"}, "outer", given={"inner": Inner(9)}).inner.rank == 9


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"path": "p", "rowz": 1},
            r"outer: unknown key; got \['rowz'\]; expected among \['rows'\] of method m",
        ),
        ({"path": "p", "zzzz": 1}, r"unknown key.*'clamp', 'files', 'inner'"),
        ({}, "outer: missing value; got no path.*Set outer.path=… on the command line"),
        ({"path": "???"}, "missing value"),
        ([1], "outer: not a section"),
        ({"path": None}, "outer.path: wrong type; got None; expected str"),
        ({"path": 3}, "outer.path: wrong type"),
        ({"path": "p", "rows": 1.0}, "outer.rows: wrong type; got 1.0; expected int"),
        ({"path": "p", "rows": True}, "outer.rows: wrong type"),
        ({"path": "p", "rows": "many"}, "outer.rows: wrong type; got 'many'"),
        ({"path": "p", "rate": "0.1"}, "outer.rate: wrong type"),
        ({"path": "p", "rate": False}, "outer.rate: wrong type"),
        ({"path": "p", "is_on": 1}, "outer.is_on: wrong type"),
        ({"path": "p", "limit": "x"}, r"outer.limit: wrong type; got 'x'; expected int \| None"),
        (
            {"path": "p", "kind": "z"},
            r"outer.kind: wrong type; got 'z'; expected typing.Literal\['x', 'y'\]",
        ),
        ({"path": "p", "files": ["a", 1]}, r"outer.files\[1\]: wrong type; got 1; expected str"),
        ({"path": "p", "files": None}, "outer.files: wrong type"),
        ({"path": "p", "clamp": [1.0]}, "outer.clamp: wrong length; got .*expected 2 values"),
        ({"path": "p", "more": [1]}, "outer.more: wrong type"),
        (
            {"path": "p", "inner": {"rang": 1}},
            r"outer.inner: unknown key; got \['rang'\]; expected among \['rank'",
        ),
        ({"path": "p", "inner": {"rank": None}}, "outer.inner.rank: wrong type"),
    ],
)
def test_everything_else_is_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        build(Outer, values, "outer", note=" of method m")


def test_a_file_raises_its_own_error_and_suggests_no_override():
    with pytest.raises(CheckpointError, match="missing value") as caught:
        build(Outer, {}, "x.json", error=CheckpointError)
    assert caught.value.fix is None


def test_annotations_that_exist_for_a_type_checker_only_are_not_checked():
    @dataclass
    class Foreign:
        value: "NowhereDefined"  # noqa: F821
        rows: int = 1

    assert build(Foreign, {"value": object, "rows": 2}, "foreign").rows == 2


def test_choices():
    check_choice("x", ("x", "y"), "kind")
    with pytest.raises(
        ConfigError, match="kind: unknown value; got z; expected one of .*'y'.* of m"
    ):
        check_choice("z", ("x", "y"), "kind", " of m")


def test_a_section_is_resolved_and_nothing_else_passes_for_one():
    config = OmegaConf.create({"a": {"b": "${c}", "d": [1]}, "c": 3, "e": [1], "f": None})
    assert section(config.a, "a") == section({"b": 3, "d": [1]}, "a") == {"b": 3, "d": [1]}
    assert section(config.f, "f") == {}
    for values in (config.e, 5, "text"):
        with pytest.raises(ConfigError, match="a.b: not a section; got .*keys and values"):
            section(values, "a.b")
