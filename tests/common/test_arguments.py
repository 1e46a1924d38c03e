"""Arguments of the commands without a config: what is out of range is told before anything loads."""

import importlib

import pytest

from grpo_latent.errors import ConfigError

CASES = [
    ("generate", ["m", "--prompt", "x"], "--num", "0", "a whole number >= 1"),
    ("generate", ["m", "--prompt", "x"], "--max-new-tokens", "-3", "a whole number >= 1"),
    ("generate", ["m", "--prompt", "x"], "--temperature", "nan", "a number >= 0"),
    ("generate", ["m", "--prompt", "x"], "--temperature", "-1", "a number >= 0"),
    ("generate", ["m", "--prompt", "x"], "--steps", "-1", "a whole number >= 0, or null"),
    ("generate", ["m", "--prompt", "x"], "--seed", "-1", "a whole number >= 0"),
    ("serve", ["m"], "--steps", "-1", "a whole number >= 0, or null"),
    ("serve", ["m"], "--max-latents", "0", "a whole number >= 1, or null"),
    ("inspect.__main__", ["run"], "--trajectories", "0", "a whole number >= 1"),
    ("inspect.__main__", ["run"], "--probe", "-1", "a whole number >= 0"),
    ("inspect.__main__", ["run"], "--megabytes", "inf", "a number > 0"),
    ("inspect.__main__", ["run"], "--wandb", "", "a text, or null"),
    ("check_reward", ["reward.py"], "--timeout-s", "0", "a number > 0"),
]


@pytest.mark.parametrize(("module", "others", "name", "value", "expected"), CASES)
def test_what_is_out_of_range_ends_with_two(module, others, name, value, expected, capsys):
    main = importlib.import_module(f"grpo_latent.{module}").main
    assert main([*others, f"{name}={value}"]) == 2
    said = capsys.readouterr().err
    assert f"ConfigError: {name}: out of range" in said and f"expected {expected}" in said


def test_what_is_in_range_passes():
    parse = importlib.import_module("grpo_latent.generate").parse
    assert parse(["m", "--prompt", "x", "--temperature", "0"]).steps is None
    serve = importlib.import_module("grpo_latent.serve").parse
    assert serve(["m", "--max-latents", "9", "--port", "0"])[1] == ["--port", "0"]


@pytest.mark.parametrize("name", ["cud", "cuda:99", ""])
def test_a_device_that_is_not_here_is_named(name, tmp_path):
    from grpo_latent.models.loading import load_latent_model

    with pytest.raises(ConfigError, match="device: no such device here.*expected cpu, cuda"):
        load_latent_model(tmp_path, device=name)
