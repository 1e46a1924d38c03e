"""Adapters in the Trainer: what trains under them, and the model that they are merged into."""

import pytest
import torch
from sft_cases import NAME, batch_of, examples, latent_model, state, train

from grpo_latent.errors import ConfigError
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.sft.common.parameters import LoraSettings, add_lora, freeze_vision, merge_lora
from grpo_latent.sft.lvr.forward import loss_sums
from grpo_latent.sft.lvr.losses import LVRLossConfig

ROWS = examples(8)


def lora_model(**settings):
    latent = latent_model(NAME, head="glu", end=True)
    settings = LoraSettings(**dict(enabled=True, r=2, alpha=4, dropout=0.0) | settings)
    new_ids = [latent.mechanism.start_id, latent.mechanism.latent_end_id]
    add_lora(latent.model, settings, new_ids, latent.mechanism.parameter_prefixes)
    freeze_vision(latent.model)
    return latent, new_ids


def test_lora_trains_adapters_head_end_vector_and_new_rows_only(tmp_path):
    latent, new_ids = lora_model()
    before = state(latent.model)
    train(
        tmp_path,
        latent=latent,
        loss=LVRLossConfig(end="latent_end"),
        optim="adamw_torch",
        weight_decay=0.5,
        learning_rate=1e-2,
        max_steps=2,
    )
    after = latent.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    embeddings = {"model.language_model.embed_tokens.weight", "lm_head.weight"}
    allowed = {name for name in before if "lora_" in name or name.startswith("lvr_")} | embeddings
    assert moved <= allowed and embeddings <= moved and "lvr_latent_end_emb" in moved
    assert any("q_proj.lora_B" in name for name in moved) and any(
        "lvr_head" in name for name in moved
    )
    assert not any("visual" in name and "lora_" in name for name in before), (
        "no adapter in the vision tower"
    )
    for name in embeddings:
        rows = (before[name] != after[name]).any(-1).nonzero()[:, 0].tolist()
        assert set(rows) <= set(new_ids), "neither gradient nor weight decay moves an old row"


def test_merged_lora_is_the_same_function_under_plain_names(tmp_path):
    latent, _ = lora_model()
    names = set(latent_model(NAME, head="glu", end=True).model.state_dict())
    train(
        tmp_path,
        latent=latent,
        loss=LVRLossConfig(end="latent_end"),
        optim="adamw_torch",
        learning_rate=1e-2,
    )
    batch = batch_of(latent, ROWS, has_end_vector=True)
    adapter = ModelAdapter(latent.model, latent.mechanism)
    sums, num_merged = [], []
    with torch.no_grad():
        for _ in range(2):
            sums.append(
                loss_sums(adapter, batch, latent.mechanism, LVRLossConfig(end="latent_end"))
            )
            num_merged.append(merge_lora(latent.model))
    assert num_merged == [14, 0] and set(latent.model.state_dict()) == names
    for name in ("ce", "latent"):
        torch.testing.assert_close(sums[0][name], sums[1][name], rtol=1e-4, atol=1e-4)


def test_lora_on_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="c_attn"):
        lora_model(target_modules=("q_proj", "c_attn"))
