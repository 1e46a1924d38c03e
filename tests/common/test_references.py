"""What is wrong with a value is told of the key at which it is written."""

import pytest
from omegaconf import OmegaConf

from grpo_latent.common.kinds import choice, whole
from grpo_latent.common.references import references
from grpo_latent.common.schema import Schema
from grpo_latent.errors import ConfigError

# references stand in front of what they refer to, as most of verl's do
CONFIG = {
    "actor": {
        "rollout_n": "${oc.select:rollout.n,1}",
        "load": "${.save}",
        "save": "all",
        "profiler": {"tool": "${..save}"},
    },
    "ref": {
        "n": "${actor.rollout_n}",
        "gone": "${oc.select:nowhere.n,2}",
        "path": "${actor.save}/x",
    },
    "rollout": {"n": 8, "mode": "${oc.select:actor.save,${oc.select:actor.load,null}}"},
}
SCHEMA = Schema(
    {"*.n": whole(1), "*.rollout_n": whole(1), "rollout.mode": choice("all", "none")},
    {
        "actor": {"rollout_n": 1, "load": "", "save": "", "profiler": {"tool": ""}},
        "ref": {"n": 1, "gone": 2, "path": ""},
        "rollout": {"n": 8, "mode": "all"},
    },
)


def check(**changes):
    config = OmegaConf.merge(OmegaConf.create(CONFIG), changes)
    written = OmegaConf.to_container(config, resolve=False)
    SCHEMA.check(OmegaConf.to_container(config, resolve=True), references(written))


def test_references_are_found():
    assert references(CONFIG) == {
        "actor.rollout_n": "rollout.n",
        "actor.load": "actor.save",
        "actor.profiler.tool": "actor.save",
        "ref.n": "actor.rollout_n",
        "rollout.mode": "actor.save",
    }


def test_the_key_that_was_typed_is_named_and_no_other():
    check()
    with pytest.raises(ConfigError) as caught:
        check(rollout={"n": "four"})
    assert str(caught.value).startswith("rollout.n: wrong type; got 'four'")
    assert "rollout_n" not in str(caught.value)


def test_several_mistakes_are_each_told_once():
    with pytest.raises(ConfigError, match="^rollout.n: .*Also wrong: actor.save.$"):
        check(rollout={"n": 0}, actor={"save": 5})


def test_a_value_that_only_the_other_key_cannot_take_is_told_of_both():
    with pytest.raises(ConfigError) as caught:
        check(actor={"save": "some"})
    assert str(caught.value) == (
        "actor.save: unknown value for rollout.mode, which takes it over; got 'some'; "
        "expected all or none. Set actor.save, or rollout.mode to a value of its own."
    )
