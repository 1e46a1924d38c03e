"""Checkpoints: save → load is bit-identical, and the official LVR layout loads.

Input folders are never written to.
"""

import json
import shutil

import pytest
import torch
from folder_cases import digests, without_manifest
from latent_cases import build_case, sampling
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen2_5_VLConfig

from grpo_latent.errors import CheckpointError
from grpo_latent.latent.mechanisms import LATENT_CONFIG_FILE, LVR
from grpo_latent.latent.mechanisms.fed_back import GLUHead, MLPHead
from grpo_latent.latent.mechanisms.lvr import END_VECTOR_ATTRIBUTE
from grpo_latent.models import tiny
from grpo_latent.models.loading import load_latent_model, save_latent_model
from grpo_latent.models.plain import load_plain
from grpo_latent.models.tiny import LVR_TOKENS
from grpo_latent.models.tokens import add_latent_tokens
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.rollout.vllm.skeleton import read_skeleton


def saved(folder, name="qwen2", **changes):
    """A saved case without the test bias of its language-model head, which no architecture has."""
    case = build_case(name)
    case.model.lm_head.bias = None
    config = case.mechanism(**changes)
    config.attach(case.model)
    save_latent_model(folder, case.model, case.tokenizer, case.processor, config)
    return case, config


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen2_5_vl", {}),
        ("qwen2_5_vl", {"head": "mlp"}),
        ("qwen2_vl", {"exit": "latent_end"}),
        ("qwen3_vl", {"head": "glu"}),
        ("qwen2", {"head": "mlp", "exit": "latent_end", "steps": 2}),
        ("qwen3", {"visibility": "latents_only", "max_spans": 1}),
    ],
)
def test_round_trip_is_bit_identical_and_acts_the_same(tmp_path, name, changes):
    case, config = saved(tmp_path, name, **changes)
    before = digests(tmp_path)
    loaded = load_latent_model(tmp_path)
    assert digests(tmp_path) == before, "loading wrote to the folder"
    assert loaded.mechanism == config and loaded.eos_ids == (case.eos_id,)
    assert loaded.tokenizer.get_vocab() == case.tokenizer.get_vocab()
    assert (loaded.processor is None) == (case.processor is None)
    own, other = case.model.state_dict(), loaded.model.state_dict()
    assert set(own) == set(other) and all(torch.equal(own[key], other[key]) for key in own)
    request = case.request(images=case.images(1) if case.processor else None, seeds=range(4))
    groups = [
        HFRolloutEngine(model, config, [case.eos_id]).generate([request], sampling(8))[0]
        for model in (case.model, loaded.model)
    ]
    for a, b in zip(*groups, strict=True):
        assert torch.equal(a.token_ids, b.token_ids) and torch.equal(
            a.rollout_log_probs, b.rollout_log_probs
        )


def test_saving_what_was_loaded_writes_the_same_files(tmp_path):
    saved(tmp_path / "first", "qwen2_5_vl", head="glu")
    loaded = load_latent_model(tmp_path / "first")
    save_latent_model(
        tmp_path / "second", loaded.model, loaded.tokenizer, loaded.processor, loaded.mechanism
    )
    first, second = digests(tmp_path / "first"), digests(tmp_path / "second")
    # transformers itself adds where it loaded from, and dtypes, to two; the third lists those
    differing = {name for name in first | second if first.get(name) != second.get(name)}
    assert differing <= {"config.json", "tokenizer_config.json", "manifest.json"}


def test_overrides_change_the_config_but_not_the_file(tmp_path):
    saved(tmp_path)
    assert (
        load_latent_model(
            tmp_path, overrides={"steps": 5, "visibility": "latents_only"}
        ).mechanism.steps
        == 5
    )
    assert load_latent_model(tmp_path).mechanism.steps == 3


def test_dtype_reaches_the_head(tmp_path):
    saved(tmp_path, head="mlp")
    model = load_latent_model(tmp_path, dtype=torch.bfloat16).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def official(folder, head=None, end_vector=False, drop=()):
    """Writes an official LVR folder: `lvr_*` fields in config.json, no `latent_config.json`."""
    case, _ = saved(folder, "qwen2_5_vl")
    (without_manifest(folder) / LATENT_CONFIG_FILE).unlink()
    ids = [case.token_id(token) for token in LVR_TOKENS]
    fields = dict(
        zip(("lvr_start_id", "lvr_id", "lvr_latent_end_id", "lvr_end_id"), ids, strict=True)
    )
    fields |= dict(
        lvr_head=head is not None, lvr_head_type=head or "simple", latent_end_token=end_vector
    )
    fields |= dict(loss_lvr_fct="mse")
    values = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in values.items() if k not in drop})
    )
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    if head == "simple":
        shapes = {"ln_q.weight": 32, "ln_q.bias": 32, "mlp.0.weight": (32, 32), "mlp.0.bias": 32}
        shapes |= {"mlp.2.weight": (32, 32), "mlp.2.bias": 32}
    elif head == "glu":
        shapes = {
            f"{part}_proj.{kind}": shape
            for part, wide in (("gate", True), ("up", True), ("down", False))
            for kind, shape in (
                ("weight", (64, 32) if wide else (32, 64)),
                ("bias", 64 if wide else 32),
            )
        }
    else:
        shapes = {}
    weights |= {
        f"lvr_head.{name}": torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    if end_vector:
        weights[END_VECTOR_ATTRIBUTE] = torch.randn(32, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return case, weights


@pytest.mark.parametrize(
    ("head", "kind", "module"),
    [(None, "none", None), ("simple", "mlp", MLPHead), ("glu", "glu", GLUHead)],
)
@pytest.mark.parametrize("end_vector", [False, True])
def test_official_layout_loads_and_is_left_alone(tmp_path, head, kind, module, end_vector):
    case, weights = official(tmp_path, head, end_vector)
    before = digests(tmp_path)
    loaded = load_latent_model(tmp_path)
    assert digests(tmp_path) == before
    config = loaded.mechanism
    assert (config.start_token, config.latent_token, config.end_token) == (
        "<|lvr_start|>",
        "<|lvr|>",
        "<|lvr_end|>",
    )
    assert config.start_id == case.token_id("<|lvr_start|>") and config.head == kind
    assert config.visibility == "full" and config.exit == "steps" and config.steps == 8
    assert config.has_end_vector == end_vector and config.span_end == "sampled"
    assert config.closing_ids == {
        case.token_id("<|lvr_end|>"),
        case.token_id("<|lvr_latent_end|>"),
    }
    own = loaded.model.state_dict()
    extra = {name for name in weights if name.startswith("lvr_")}
    assert {name for name in own if name.startswith("lvr_")} == extra
    assert all(torch.equal(own[name], weights[name]) for name in extra)
    assert module is None or isinstance(loaded.model.lvr_head, module)
    engine = HFRolloutEngine(loaded.model, config.replace(max_spans=1), loaded.eos_ids)
    assert (
        len(engine.generate([case.request(images=case.images(1), seeds=[1])], sampling(4))[0]) == 1
    )


def test_official_head_that_is_stored_but_switched_off_is_not_used(tmp_path):
    """`lvr_head: false` with head weights left over in the file: the config decides."""
    _, _ = official(tmp_path, "simple")
    values = json.loads((tmp_path / "config.json").read_text()) | {"lvr_head": False}
    (tmp_path / "config.json").write_text(json.dumps(values))
    loaded = load_latent_model(tmp_path)
    assert loaded.mechanism.head == "none" and not hasattr(loaded.model, "lvr_head")


def tied_folder(folder, flags):
    """A tiny Qwen2.5-VL whose logits share the embeddings.

    As transformers 4.5x saved it: no `lm_head.weight`, and the flag where `flags` put it.
    """
    model, tokenizer, processor = tiny.tiny_qwen2_5_vl(("read", "red"))
    model.config.tie_word_embeddings = True
    model.tie_weights()
    config = LVR.from_tokens(tokenizer.get_vocab())
    save_latent_model(folder, model, tokenizer, processor, config)
    without_manifest(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values.pop("tie_word_embeddings")
    values["text_config"].pop("tie_word_embeddings", None)
    for place, flag in flags.items():
        (values if place == "top" else values["text_config"])["tie_word_embeddings"] = flag
    path.write_text(json.dumps(values))
    return model


@torch.no_grad()
def test_a_tied_folder_of_transformers_4_loads_bit_for_bit(tmp_path):
    model = tied_folder(tmp_path, {"text": True})
    before = digests(tmp_path)
    loaded = load_latent_model(tmp_path).model
    assert digests(tmp_path) == before
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    ids = torch.arange(8)[None]
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    # who builds a config of the folder: Hugging Face itself, verl's actor, vLLM's front end
    assert AutoConfig.from_pretrained(tmp_path).tie_word_embeddings is True
    assert Qwen2_5_VLConfig.from_pretrained(tmp_path).tie_word_embeddings is True
    skeleton = read_skeleton(tmp_path)
    assert skeleton.adapter.model.config.tie_word_embeddings is True
    plain = load_plain(str(tmp_path), torch.float32, "sdpa")[0]
    assert plain.lm_head.weight is plain.get_input_embeddings().weight
    save_latent_model(tmp_path / "again", loaded, skeleton.tokenizer, None, skeleton.mechanism)
    assert json.loads((tmp_path / "again/config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("flags", "tied"),
    [
        ({"text": False}, False),
        ({"top": True}, True),
        ({"top": True, "text": False}, True),
        ({"top": False, "text": True}, False),
        ({}, False),
    ],
)
def test_a_flag_of_the_top_level_is_believed(tmp_path, flags, tied):
    tied_folder(tmp_path, flags)
    assert AutoConfig.from_pretrained(tmp_path).tie_word_embeddings is tied
    if not tied:
        with pytest.raises(CheckpointError, match="lm_head.weight"):
            load_latent_model(tmp_path)


def test_sharded_weights_load(tmp_path):
    case, config = saved(tmp_path / "whole", "qwen2", head="mlp")
    shutil.copytree(tmp_path / "whole", tmp_path / "sharded")
    (without_manifest(tmp_path / "sharded") / "model.safetensors").unlink()
    case.model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    own, other = (
        case.model.state_dict(),
        load_latent_model(tmp_path / "sharded").model.state_dict(),
    )
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_add_latent_tokens_grows_what_is_missing_in_the_published_order():
    model, tokenizer, _ = tiny.tiny_qwen2(("read",), latent_tokens=())
    size = len(tokenizer)
    before = model.get_input_embeddings().weight.detach().clone()
    ids = add_latent_tokens(model, tokenizer, LVR_TOKENS)
    assert ids == {token: size + idx for idx, token in enumerate(LVR_TOKENS)}
    assert (
        model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == size + 4
    )
    assert torch.equal(model.get_input_embeddings().weight[:size], before)
    assert tokenizer("read <|lvr|>").input_ids == [tokenizer.get_vocab()["read"], ids["<|lvr|>"]]
    assert add_latent_tokens(model, tokenizer, LVR_TOKENS) == ids and len(tokenizer) == size + 4, (
        "idempotent"
    )


@pytest.mark.parametrize("place", ["", "actor", "actor/huggingface/original", "deep/er"])
def test_a_folder_beside_the_model_points_to_it(place, tmp_path):
    """transformers speaks of sentencepiece there."""
    model = tmp_path / "global_step_3" / "actor" / "huggingface"
    (model / "original").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    folder = tmp_path / "global_step_3" / place
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.raises(CheckpointError, match="no model in this folder") as caught:
        load_latent_model(folder)
    assert str(model) in caught.value.fix


def test_a_folder_far_from_any_model(tmp_path):
    (tmp_path / "a/b/c/d/e").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="Run python -m grpo_latent.sft first"):
        load_latent_model(tmp_path / "a/b/c/d/e")
