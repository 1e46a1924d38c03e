"""The published settings of each mechanism, what they share, and what cannot run."""

import pytest
import torch

from grpo_latent.errors import ConfigError
from grpo_latent.latent.mechanisms import MECHANISMS, load_mechanism
from grpo_latent.trajectory import PositionKind as K


def ids(mechanism):
    return {
        token: 10 + idx
        for idx, token in enumerate(MECHANISMS[mechanism].published_tokens.values())
    }


def published(mechanism, **changes):
    return MECHANISMS[mechanism].from_tokens(ids(mechanism), **changes)


def test_published_settings(tmp_path):
    assert set(MECHANISMS) == {"lvr", "ilvr", "ivt_lr", "coconut", "hybrid_gate", "own_slots"}
    seen = {}
    for name in MECHANISMS:
        found = published(name)
        found.save(tmp_path)
        assert load_mechanism(tmp_path) == found and found.key() == name
        exit = getattr(found, "exit", None)
        seen[name] = (found.has_slots, found.steps, exit, found.top_k_image, found.positions)
    assert seen == {
        "lvr": (False, 8, "steps", 0, "text_style"),
        "ilvr": (False, 8, "end_token", 0, "text_style"),
        "ivt_lr": (True, 3, "steps", 32, "1d"),
        "coconut": (True, 3, "steps", 0, "1d"),
        "hybrid_gate": (False, 0, None, 0, "text_style"),
        "own_slots": (True, 3, "steps", 0, "1d"),
    }


def test_tokens_by_what_may_happen_to_them():
    """LVR's end vector has a token only where it is in use; slots never sample one of theirs."""
    lvr, slots = published("lvr"), published("coconut")
    assert (lvr.opening_ids, lvr.banned_ids) == ({lvr.start_id}, {lvr.latent_id, lvr.end_id})
    with_end = published("lvr", latent_end_token="<|lvr_latent_end|>")
    assert (
        with_end.banned_ids - lvr.banned_ids == {with_end.latent_end_id}
        and len(with_end.token_ids) == 4
    )
    assert (slots.opening_ids, slots.banned_ids) == (frozenset(), set(slots.token_ids.values()))
    assert [lvr.placeholder_id(kind) for kind in (K.LATENT, K.FORCED)] == [
        lvr.latent_id,
        lvr.end_id,
    ]
    assert [slots.placeholder_id(kind) for kind in (K.LATENT, K.SELECTED)] == [slots.latent_id] * 2


def test_changes_override_and_unknown_ones_are_errors():
    assert published("ivt_lr", steps=0, top_k_image=64).steps == 0
    with pytest.raises(ConfigError, match="unknown field"):
        published("lvr", slots=3)
    with pytest.raises(ConfigError, match="unknown mechanism; got monet"):
        MECHANISMS.find("monet", "latent.mechanism")
    with pytest.raises(ConfigError, match="without an id.*add_latent_tokens"):
        MECHANISMS["ilvr"].from_tokens(ids("lvr"))


def test_a_class_is_found_by_its_path_and_must_be_a_mechanism():
    where = "latent.mechanism"
    path = "grpo_latent.latent.mechanisms.lvr:LVR"
    assert MECHANISMS.find(path, where) is MECHANISMS["lvr"]
    with pytest.raises(ConfigError, match="not a mechanism; got grpo_latent.errors:DataError"):
        MECHANISMS.find("grpo_latent.errors:DataError", where)


@pytest.mark.parametrize(
    "mechanism, changes, where",
    [
        ("lvr", dict(top_k_image=4), "latent.top_k_image"),
        ("lvr", dict(steps=0), "latent.steps"),
        ("lvr", dict(positions="2d"), "latent.positions"),
        ("lvr", dict(trigger="always"), "latent.trigger"),
        ("ilvr", dict(exit="latent_end"), "latent.exit"),
        ("ivt_lr", dict(exit="end_token"), "latent.exit"),
        ("ivt_lr", dict(visibility="latents_only"), "latent.visibility"),
        ("ivt_lr", dict(max_spans=1), "latent.max_spans"),
        ("ivt_lr", dict(top_k_image=-1), "latent.top_k_image"),
        ("coconut", dict(latent_end_id=99, latent_end_token="x"), "latent.latent_end_id"),
        ("coconut", dict(steps=-1), "latent.steps"),
    ],
)
def test_combinations_that_cannot_run(mechanism, changes, where):
    with pytest.raises(ConfigError, match=f"^{where}: "):
        published(mechanism, **changes)


def test_sources_are_the_last_position_that_a_hidden_state_may_come_from():
    """By hand: a latent after a chosen image embedding is made by what stood before that.

    Padding in front counts for nothing, and a MIXED position is made by its predecessor.
    """
    kinds = torch.tensor(
        [
            [K.PROMPT, K.PROMPT, K.SELECTED, K.SELECTED, K.LATENT, K.LATENT],
            [K.PROMPT, K.PROMPT, K.MIXED, K.MIXED, K.START, K.LATENT],
        ]
    )
    valid = torch.ones_like(kinds, dtype=torch.bool)
    valid[0, 0] = False
    rows, columns = published("lvr").sources(kinds, valid)
    assert rows.tolist() == [0, 0, 1, 1, 1] and columns.tolist() == [1, 4, 1, 2, 4]
