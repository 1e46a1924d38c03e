"""`LatentConfig`: file round trip and `replace`. Malformed ones are in tests/test_malformed_core.py."""

import dataclasses
import json

from grpo_latent.latent.config import LATENT_CONFIG_FILE, LatentConfig

BASE = LatentConfig("s", "l", "e", 1, 2, 3)


def test_save_and_load_keep_every_field(tmp_path):
    config = BASE.replace(
        latent_end_token="x",
        latent_end_id=4,
        steps=5,
        exit="latent_end",
        max_spans=2,
        head="glu",
        start_is_action=False,
    )
    path = config.save(tmp_path)
    assert path == tmp_path / LATENT_CONFIG_FILE and LatentConfig.load(tmp_path) == config
    assert set(json.loads(path.read_text())) == {field.name for field in dataclasses.fields(LatentConfig)}


def test_fields_added_later_take_their_defaults(tmp_path):
    """A file that lacks an optional field, as an older release of the same version writes it, loads."""
    values = dataclasses.asdict(BASE)
    values.pop("latent_end_threshold")
    (tmp_path / LATENT_CONFIG_FILE).write_text(json.dumps(values))
    assert LatentConfig.load(tmp_path) == BASE


def test_replace_gives_a_checked_copy():
    assert BASE.replace(steps=2).steps == 2 and BASE.steps == 8
