"""`latent_config.json`: round trips, version 1, and `replace`.

Malformed files are in tests/test_malformed_core.py.
"""

import dataclasses
import json

import pytest

from grpo_latent.errors import CheckpointError, ConfigError
from grpo_latent.latent.mechanisms import (
    ILVR,
    IVTLR,
    LATENT_CONFIG_FILE,
    LVR,
    MECHANISMS,
    Coconut,
    from_dict,
    load_mechanism,
)

BASE = LVR("s", "l", "e", 1, 2, 3)
IDS = dict(start_token="s", latent_token="l", end_token="e", start_id=1, latent_id=2, end_id=3)
# every key of version 1, as that release wrote LVR's file
VERSION_1 = IDS | dict(
    mechanism="lvr",
    latent_end_token=None,
    latent_end_id=None,
    steps=8,
    exit="steps",
    latent_end_threshold=0.02,
    max_spans=None,
    head="none",
    visibility="full",
    start_is_action=True,
    trigger="emitted",
    top_k_image=0,
    positions="text_style",
    version=1,
)
V1_SLOTS = dict(trigger="prompt_slots", positions="1d", steps=3)


@dataclasses.dataclass(frozen=True)
class Own(LVR):
    """A user's: stored by where it is."""

    temperature: float = 0.5


def test_save_and_load_keep_every_field(tmp_path):
    mechanism = BASE.replace(
        latent_end_token="x",
        latent_end_id=4,
        steps=5,
        exit="latent_end",
        max_spans=2,
        head="glu",
        start_is_action=False,
    )
    path = mechanism.save(tmp_path)
    assert path == tmp_path / LATENT_CONFIG_FILE and load_mechanism(tmp_path) == mechanism
    names = {field.name for field in dataclasses.fields(LVR)}
    assert set(json.loads(path.read_text())) == names | {"version", "mechanism"}


@pytest.mark.parametrize("cls", MECHANISMS.values())
def test_every_mechanism_is_stored_under_its_name(tmp_path, cls):
    ids = {token: 10 + i for i, token in enumerate(cls.published_tokens.values())}
    mechanism = cls.from_tokens(ids)
    if "steps" in {field.name for field in dataclasses.fields(cls)}:
        mechanism = mechanism.replace(steps=2)
    assert json.loads(mechanism.save(tmp_path).read_text())["mechanism"] == cls.name
    assert load_mechanism(tmp_path) == mechanism


def test_a_mechanism_of_ones_own_is_stored_by_where_it_is(tmp_path):
    mechanism = Own(**IDS, temperature=2.0)
    mechanism.save(tmp_path)
    found = load_mechanism(tmp_path)
    assert found == mechanism and found.key() == f"{__name__}:Own"


def test_fields_added_later_take_their_defaults(tmp_path):
    """A file that lacks an optional field, as an older release wrote it, loads."""
    values = BASE.to_dict()
    values.pop("latent_end_threshold")
    (tmp_path / LATENT_CONFIG_FILE).write_text(json.dumps(values))
    assert load_mechanism(tmp_path) == BASE


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, BASE),
        (
            dict(
                latent_end_token="x", latent_end_id=4, exit="latent_end", head="mlp", max_spans=1
            ),
            None,
        ),
        (dict(mechanism="ilvr", exit="end_token"), ILVR(**IDS)),
        (dict(mechanism="ivt_lr", **V1_SLOTS, top_k_image=4), IVTLR(**IDS, top_k_image=4)),
        (dict(mechanism="coconut", **V1_SLOTS, head="glu"), Coconut(**IDS, head="glu")),
    ],
)
def test_files_of_version_1_load(changes, expected):
    found = from_dict(VERSION_1 | changes, "file")
    if expected is None:
        expected = BASE.replace(**changes)
    assert found == expected


def test_the_first_files_of_version_1_had_fewer_keys():
    values = {
        name: value
        for name, value in VERSION_1.items()
        if name in IDS or name in ("steps", "version")
    }
    assert from_dict(values, "file") == BASE


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        (dict(mechanism="ivt_lr", **V1_SLOTS, max_spans=1), "max_spans"),
        (dict(mechanism="coconut", **V1_SLOTS, visibility="latents_only"), "visibility"),
        (dict(mechanism="coconut", **V1_SLOTS, top_k_image=4), "top_k_image"),
        (dict(mechanism="coconut", **V1_SLOTS | dict(positions="text_style")), "positions"),
        (dict(trigger="prompt_slots"), "trigger"),
    ],
)
def test_files_of_version_1_whose_values_no_mechanism_has_are_refused(changes, where):
    with pytest.raises(CheckpointError, match=f"latent.{where}: fixed for this mechanism"):
        from_dict(VERSION_1 | changes, "file")


def test_replace_gives_a_checked_copy():
    assert BASE.replace(steps=2).steps == 2 and BASE.steps == 8
    assert Coconut(**IDS).replace(visibility="full", exit="steps") == Coconut(
        **IDS
    )  # what it has anyway
    with pytest.raises(
        ConfigError, match="latent.visibility: fixed for this mechanism; got latents_only"
    ):
        Coconut(**IDS).replace(visibility="latents_only")
