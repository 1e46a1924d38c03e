"""The in-place cache against `DynamicCache`, the folded attention against sdpa and softmax.

Sdpa is Hugging Face's own, the softmax a plain one.
"""

import pytest
import torch
from latent_cases import case
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from grpo_latent.models.attention import FOLDED_SDPA, SDPA_NAMES, folded_attention, folded_sdpa
from grpo_latent.models.kv_cache import RolloutCache


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled_caches(row_to_prompt, capacity=24, num_layers=2, prompt_length=4):
    """A `RolloutCache` and a `DynamicCache` repeated by hand."""
    prefilled, expanded = DynamicCache(), DynamicCache()
    for layer in range(num_layers):
        keys, values = (
            random(3, 2, prompt_length, 8, seed=layer),
            random(3, 2, prompt_length, 8, seed=layer + 10),
        )
        prefilled.update(keys, values, layer)
        expanded.update(keys[row_to_prompt], values[row_to_prompt], layer)
    return RolloutCache(prefilled, row_to_prompt, capacity), expanded


def test_updates_equal_a_dynamic_cache():
    row_to_prompt = torch.tensor([0, 0, 2, 1, 1])
    ours, reference = filled_caches(row_to_prompt)
    addresses = set()
    for step in range(20):
        for layer in range(2):
            new = (
                random(5, 2, 1, 8, seed=100 + 10 * step + layer),
                random(5, 2, 1, 8, seed=200 + 10 * step + layer),
            )
            for a, b in zip(ours.update(*new, layer), reference.update(*new, layer), strict=True):
                assert torch.equal(a, b)
        assert ours.get_seq_length() == reference.get_seq_length() == 5 + step
        addresses.add(ours.layers[0].keys.data_ptr())
    assert len(addresses) <= 3, "grows seldom, and is written in place between"
    assert ours.layers[0].get_max_cache_shape() == ours.layers[0].keys.shape[2] == 24


def test_keep_rows():
    ours, reference = filled_caches(torch.tensor([0, 1, 2, 0]))
    ours.keep_rows(torch.tensor([3, 1]))
    reference.batch_select_indices(torch.tensor([3, 1]))
    new = random(2, 2, 1, 8), random(2, 2, 1, 8, seed=1)
    for a, b in zip(ours.update(*new, 1), reference.update(*new, 1), strict=True):
        assert torch.equal(a, b)


def test_prefilled_cache_is_not_written_to():
    prefilled = DynamicCache()
    keys = random(1, 2, 4, 8)
    prefilled.update(keys, keys, 0)
    cache = RolloutCache(prefilled, torch.tensor([0, 0]), 6)
    cache.update(random(2, 2, 1, 8), random(2, 2, 1, 8), 0)
    assert torch.equal(prefilled.layers[0].keys, random(1, 2, 4, 8))


@pytest.mark.parametrize(("num_heads", "num_key_heads"), [(4, 4), (4, 2), (6, 2), (6, 1)])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("scaling", [0.3, None])
def test_folded_equals_sdpa_and_plain_softmax(
    num_heads, num_key_heads, length, with_mask, scaling
):
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = num_heads // num_key_heads, False
    query, keys, values = (
        random(5, num_heads, length, 8),
        random(5, num_key_heads, 7, 8),
        random(5, num_key_heads, 7, 8),
    )
    bias = torch.where(random(5, 1, length, 7, seed=3) > 0.5, torch.finfo(torch.float32).min, 0.0)
    bias[..., 0] = 0
    bias = bias if with_mask else None
    folded, _ = folded_sdpa(module, query, keys, values, bias, scaling=scaling)
    reference, _ = sdpa_attention_forward(module, query, keys, values, bias, scaling=scaling)
    torch.testing.assert_close(folded, reference, rtol=0, atol=1e-5)
    factor = 8**-0.5 if scaling is None else scaling
    for head in range(num_heads):
        key_head = head // (num_heads // num_key_heads)
        weights = query[:, head] @ keys[:, key_head].transpose(-1, -2) * factor + (
            0 if bias is None else bias[:, 0]
        )
        torch.testing.assert_close(
            folded[:, :, head], weights.softmax(-1) @ values[:, key_head], rtol=0, atol=1e-5
        )


def test_folded_attention_is_a_setting_of_the_block_only():
    text_config = case("qwen2_5_vl").model.config.get_text_config()
    configured = text_config._attn_implementation
    assert configured in SDPA_NAMES
    with pytest.raises(KeyError), folded_attention(text_config):
        assert text_config._attn_implementation == FOLDED_SDPA
        raise KeyError
    assert text_config._attn_implementation == configured


def test_other_implementations_stay():
    model = case("qwen2").model
    model.set_attn_implementation("eager")
    try:
        with folded_attention(model.config):
            assert model.config._attn_implementation == "eager"
    finally:
        model.set_attn_implementation("sdpa")
