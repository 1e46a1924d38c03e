"""The published rows of the mechanism axis, and the combinations that cannot run."""

import pytest

from grpo_latent.errors import ConfigError
from grpo_latent.latent.config import MECHANISMS, LatentConfig
from grpo_latent.latent.mechanisms import PUBLISHED, TOKENS, mechanism_config


def ids(mechanism):
    return {token: 10 + idx for idx, token in enumerate(TOKENS[mechanism])}


def test_published_settings(tmp_path):
    assert tuple(PUBLISHED) == MECHANISMS
    seen = {}
    for mechanism in MECHANISMS:
        config = mechanism_config(mechanism, ids(mechanism))
        config.save(tmp_path)
        assert LatentConfig.load(tmp_path) == config and config.mechanism == mechanism
        seen[mechanism] = (config.trigger, config.steps, config.exit, config.top_k_image, config.positions)
    assert seen == {
        "lvr": ("emitted", 8, "steps", 0, "text_style"),
        "ilvr": ("emitted", 8, "end_token", 0, "text_style"),
        "ivt_lr": ("prompt_slots", 3, "steps", 32, "1d"),
        "coconut": ("prompt_slots", 3, "steps", 0, "1d"),
    }


def test_changes_override_and_unknown_ones_are_errors():
    assert mechanism_config("ivt_lr", ids("ivt_lr"), steps=0, top_k_image=64).steps == 0
    with pytest.raises(ConfigError, match="unknown field"):
        mechanism_config("lvr", ids("lvr"), slots=3)
    with pytest.raises(ConfigError, match="unknown mechanism; got monet"):
        mechanism_config("monet", {})
    with pytest.raises(ConfigError, match="without an id.*add_latent_tokens"):
        mechanism_config("ilvr", ids("lvr"))


@pytest.mark.parametrize(
    "mechanism, changes, where",
    [
        ("lvr", dict(top_k_image=4), "latent.top_k_image"),
        ("lvr", dict(steps=0), "latent.steps"),
        ("lvr", dict(positions="2d"), "latent.positions"),
        ("lvr", dict(trigger="always"), "latent.trigger"),
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
        mechanism_config(mechanism, ids(mechanism), **changes)
