"""Kinds of values, and a config against a table and a reference, by hand."""

import math
import pickle

import pytest

from grpo_latent.common.kinds import (
    choice,
    entries,
    flag,
    kind_of,
    null_or,
    number,
    one_or_some,
    only,
    some,
    text,
    whole,
)
from grpo_latent.common.schema import Schema, leaves, nearest_keys
from grpo_latent.errors import ConfigError

REFERENCE = {
    "optim": {"lr": 1e-3, "betas": [0.9, 0.98], "name": "adam"},
    "data": {"files": "???", "seed": None, "shuffle": True, "keys": {}},
    "model": {"options": {"kernel": "sdpa"}},
    "unused": {"name": "???"},
}
TABLE = {
    "optim.lr": number(above=0, at_most=1),
    "optim.name": choice("adam", "sgd"),
    "data.files": one_or_some(text("a path")),
    "data.workers": whole(0),
    "*.seed": null_or(whole(0)),
}
SCHEMA = Schema(TABLE, REFERENCE, free=frozenset({"model.options"}))


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (number(), [0, -1.5, 1e30], [math.nan, math.inf, "1", True, None, [1]]),
        (number(above=0, or_inf=True), [1, math.inf], [0, math.nan, -math.inf]),
        (number(at_least=0, below=1), [0, 0.5], [1, -0.1]),
        (whole(1, also=-1), [1, 7, -1], [0, -2, 1.0, True, "1"]),
        (flag(), [True, False], [0, 1, "true", None]),
        (choice("a", "b"), ["a"], ["c", "", 1, None]),
        (only(True, "why"), [True], [False, 1, "true"]),
        (only(1.0, "why"), [1.0, 1], [2, "1", True]),
        (text(), ["a"], ["", "  ", 3, None]),
        (some(whole(0)), [[1], (2, 3)], [[], [-1], ["a"], 1, "12"]),
        (some(number(), exactly=2), [[1, 2]], [[1], [1, 2, 3]]),
        (one_or_some(text()), ["a", ["a", "b"]], [[], [""], 3]),
        (entries("keys"), [{}, {"a": 1}], ["a", [1], None]),
        (null_or(whole(1)), [None, 1], [0]),
        (kind_of(3), [0, -5], [1.5, True]),
        (kind_of(True), [False], [1, "no"]),
        (kind_of(0.5), [1, 2.5], ["a", math.nan]),
        (kind_of([1]), [[], ["a"]], ["a", 3]),
        (kind_of(None), [None, 1, "a"], []),
    ],
)
def test_kinds(kind, good, bad):
    def fits(value):
        null = value is None and kind.or_null
        return null or (kind.is_typed(value) and bool(kind.holds(value)))

    assert [value for value in good if not fits(value)] == []
    assert [value for value in bad if fits(value)] == []
    assert kind.words()


def problems(config):
    return [str(error) for error in SCHEMA.problems(config)]


def test_what_is_shipped_is_in_order():
    config = REFERENCE | {"data": REFERENCE["data"] | {"files": "a", "workers": 3}}
    assert problems(config) == []
    assert problems({"data": {"keys": {"anything": {"goes": 1}}}}) == []
    assert problems({"model": {"options": {"kernel": "eager", "more": [1]}}}) == []


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"optim": {"lr": 2}}, "optim.lr: out of range; got 2; expected a number > 0 and <= 1."),
        ({"optim": {"lr": "fast"}}, "optim.lr: wrong type; got 'fast'; .* default is 0.001"),
        ({"optim": {"lr": math.nan}}, "optim.lr: out of range; got nan"),
        (
            {"optim": {"name": "adamm"}},
            "unknown value; .*adam or sgd. Set optim.name=adam, the near",
        ),
        ({"optim": {"betas": 3}}, "optim.betas: wrong type"),
        ({"optim": 3}, "optim: not a section; got 3; expected keys and values, such as lr"),
        ({"optim": None}, "optim: not a section; got None"),
        (
            {"optim": {"lrr": 1}},
            "optim: unknown key; got optim.lrr; expected optim.lr. Write optim.lr",
        ),
        ({"model": {"lr": 1}}, "model: unknown key; got model.lr; expected optim.lr"),
        ({"dta": {"seed": 1}}, "the config: unknown key; got dta.seed; expected data.seed"),
        ({"data": {"seed": -1}}, "data.seed: out of range"),
        ({"data": {"shuffle": 1}}, "data.shuffle: wrong type; got 1; expected true or false"),
        ({"data": {"files": "???"}}, "data.files: missing value; .* Set data.files=… on the"),
        ({"data": {"files": []}}, "data.files: out of range"),
        ({"model": {"options": {"kernel": 3}}}, "model.options.kernel: wrong type"),
    ],
)
def test_mistakes_are_named_with_a_way_out(config, expected):
    (problem,) = problems(config)
    assert pytest.raises(ConfigError, SCHEMA.check, config).match(expected)
    assert problem.count(";") >= 2, problem


def test_the_first_mistake_names_the_others_and_survives_pickling():
    with pytest.raises(ConfigError) as caught:
        SCHEMA.check({"optim": {"lr": -1, "lrr": 1}, "data": {"shuffle": "no"}})
    assert caught.value.where == "optim.lr"
    assert "Also wrong: optim.lrr, data.shuffle." in caught.value.fix
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_misspelt_section_is_recognised():
    with pytest.raises(ConfigError, match=r"optimm.*optim\b(?!m)"):
        SCHEMA.check({"optimm": 3})


def test_nearest_keys():
    known = list(leaves(REFERENCE))
    assert "data.keys" in known and "optim.lr" in known and "optim" not in known
    assert nearest_keys("optim.lrs", known) == ["optim.lr"]
    assert nearest_keys("zzz.qqq", known) == []
