"""A plain model gets latents without SFT: in its own folder, reproducibly, by command too."""

import json

import pytest
import torch
from folder_cases import digests
from safetensors.torch import load_file

from grpo_latent.add_latents import main
from grpo_latent.common.arguments import parse_setting
from grpo_latent.errors import CheckpointError, ConfigError
from grpo_latent.models import tiny
from grpo_latent.models.loading import load_latent_model
from grpo_latent.models.plain import add_latents, load_plain


def plain_folder(path, build=tiny.tiny_qwen3):
    model, tokenizer, processor = build(("read", "?"), latent_tokens=())
    model.save_pretrained(path)
    (processor or tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("build", [tiny.tiny_qwen3, tiny.tiny_qwen2_5_vl])
def test_tokens_and_parameters_are_added_and_all_else_stays(tmp_path, build):
    folder = plain_folder(tmp_path / "plain", build)
    before = digests(folder)
    made = add_latents(str(folder), tmp_path / "out", "lvr", dict(steps=3, head="mlp"), seed=5)
    assert digests(folder) == before
    loaded = load_latent_model(tmp_path / "out")
    assert loaded.mechanism == made and (made.key(), made.steps, made.head) == ("lvr", 3, "mlp")
    assert list(made.token_ids) == ["<|lvr_start|>", "<|lvr|>", "<|lvr_end|>"], "no end vector"
    own, plain = loaded.model.state_dict(), load_plain(str(folder)).model.state_dict()
    added = own.keys() - plain.keys()
    assert added and all(name.startswith("lvr_head.") for name in added)
    for name, tensor in plain.items():
        assert torch.equal(own[name][: tensor.shape[0]], tensor), name
    add_latents(str(folder), tmp_path / "again", "lvr", dict(steps=3, head="mlp"), seed=5)
    add_latents(str(folder), tmp_path / "other", "lvr", dict(steps=3, head="mlp"), seed=6)
    first, again, other = (
        load_file(tmp_path / name / "model.safetensors") for name in ("out", "again", "other")
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert {name for name in first if not torch.equal(first[name], other[name])} >= {
        "lvr_head.mlp.0.weight"
    }


def test_what_is_refused(tmp_path):
    folder = plain_folder(tmp_path / "plain")
    add_latents(str(folder), tmp_path / "out", "coconut")
    with pytest.raises(ConfigError, match="has latents already; got coconut"):
        add_latents(str(tmp_path / "out"), tmp_path / "next", "lvr")
    with pytest.raises(ConfigError, match="the output exists"):
        add_latents(str(folder), tmp_path / "out", "lvr")
    with pytest.raises(ConfigError, match="unknown mechanism"):
        add_latents(str(folder), tmp_path / "next", "telepathy")
    with pytest.raises(ConfigError, match="^latent.steps"):
        add_latents(str(folder), tmp_path / "next", "lvr", dict(steps=0))
    with pytest.raises(CheckpointError, match="no such folder"):
        add_latents(str(tmp_path / "nowhere"), tmp_path / "next", "lvr")
    assert not (tmp_path / "next").exists()


def test_the_command(tmp_path, capsys):
    folder = plain_folder(tmp_path / "plain")
    arguments = [str(folder), str(tmp_path / "out"), "--mechanism", "coconut", "--set", "steps=4"]
    assert main([*arguments, "--set", 'latent_token="7"']) == 0
    assert "coconut" in capsys.readouterr().out
    stored = json.loads((tmp_path / "out" / "latent_config.json").read_text())
    assert (stored["steps"], stored["latent_token"]) == (4, "7")
    assert main(arguments) == 2 and "the output exists" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="not a setting; got steps"):
        parse_setting("steps")
