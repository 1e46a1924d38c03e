"""Damaged checkpoint folders: each is refused by a typed error that names file and field."""

import json
import shutil

import pytest
import torch
from error_cases import check_message
from folder_cases import without_manifest
from latent_cases import build_case, case
from safetensors.torch import load_file, save_file

from grpo_latent.errors import CheckpointError
from grpo_latent.latent.mechanisms import LATENT_CONFIG_FILE
from grpo_latent.models.loading import load_latent_model, save_latent_model
from grpo_latent.models.tiny import LVR_TOKENS


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
    folder, c = tmp_path_factory.mktemp("checkpoint") / "good", build_case("qwen2")
    c.model.lm_head.bias = None
    config = c.mechanism(head="mlp", exit="latent_end")
    config.attach(c.model)
    save_latent_model(folder, c.model, c.tokenizer, None, config)
    return without_manifest(folder)


def edit_json(name, **changes):
    def edit(folder):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(
            json.dumps({k: v for k, v in (values | changes).items() if v is not ...})
        )

    return edit


def edit_weights(name, tensor=None):
    def edit(folder):
        weights = load_file(folder / "model.safetensors")
        weights.pop(name, None)
        if tensor is not None:
            weights[name] = tensor
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def official(**changes):
    """An official LVR config.json instead of ours, then `changes`."""
    ids = {"lvr_start_id": 7, "lvr_id": 8, "lvr_latent_end_id": 9, "lvr_end_id": 10}

    def edit(folder):
        (folder / LATENT_CONFIG_FILE).unlink()
        edit_json(
            "config.json", **(ids | {"lvr_head": False, "latent_end_token": False} | changes)
        )(folder)

    return edit


def truncate_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def unlink(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


@pytest.mark.parametrize(
    ("damage", "got", "expected"),
    [
        (shutil.rmtree, None, "a folder written by"),
        (unlink("config.json"), "tokenizer.json", "Hugging Face folder"),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            "not a valid JSON",
            "Hugging Face folder",
        ),
        (edit_json("config.json", model_type="zzz"), "zzz", "Hugging Face folder"),
        (unlink("model.safetensors"), "model.safetensors", "Hugging Face folder"),
        (truncate_weights, "Safetensor", "Hugging Face folder"),
        (
            edit_weights("model.norm.weight"),
            "'missing': ['model.norm.weight']",
            "Qwen2ForCausalLM",
        ),
        (
            edit_weights("surprise", torch.zeros(1)),
            "'unexpected': ['surprise']",
            "Qwen2ForCausalLM",
        ),
        (
            edit_weights("model.norm.weight", torch.zeros(3)),
            "model.norm.weight",
            "Qwen2ForCausalLM",
        ),
        (unlink("tokenizer.json", "tokenizer_config.json"), "'<|lvr_start|>' -> None", "-> 7"),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{"),
            "JSON",
            "Hugging Face folder",
        ),
        (edit_json(LATENT_CONFIG_FILE, end_id=12), "'<|lvr_end|>' -> 10", "-> 12"),
        (edit_json(LATENT_CONFIG_FILE, start_token="<s>"), "'<s>' -> None", "-> 7"),
        (edit_json(LATENT_CONFIG_FILE, latent_end_token=None), "None -> None", "-> 9"),
        (edit_weights("lvr_head.mlp.2.bias"), "lvr_head.mlp.2.bias", "latent_config.json names"),
        (edit_weights("lvr_head.ln_q.weight", torch.zeros(4)), "(4,)", "[32]"),
        (edit_weights("lvr_latent_end_emb"), "lvr_latent_end_emb", "latent_config.json names"),
        (
            edit_json(LATENT_CONFIG_FILE, head="glu"),
            "lvr_head.down_proj",
            "latent_config.json names",
        ),
        (unlink(LATENT_CONFIG_FILE), None, "a folder written by"),
        (official(lvr_id=...), "lvr_id", "token ids"),
        (official(lvr_id="8"), "lvr_id", "token ids"),
        (official(lvr_head=True, lvr_head_type="odd"), "odd", "simple or glu"),
        (official(lvr_end_id=10**6), "None -> None", "-> 1000000"),
    ],
)
def test_checkpoint_folder(good_folder, tmp_path, damage, got, expected):
    folder = tmp_path / "damaged"
    shutil.copytree(good_folder, folder)
    load_latent_model(folder)
    damage(folder)
    with pytest.raises(CheckpointError) as info:
        load_latent_model(folder)
    check_message(info.value, str(folder), got, expected)


def test_saving_with_a_tokenizer_that_disagrees(tmp_path):
    c = case("qwen2")
    with pytest.raises(CheckpointError) as info:
        save_latent_model(tmp_path, c.model, c.tokenizer, None, c.mechanism().replace(end_id=20))
    check_message(info.value, str(tmp_path), "'<|lvr_end|>' -> 10", "-> 20", "same SFT run")


def test_lvr_token_ids_used_above():
    """`official` names them by number."""
    assert [case("qwen2").token_id(token) for token in LVR_TOKENS] == [7, 8, 9, 10]
