"""The last row's attention against `output_attentions` of the eager implementation."""

import pytest
import torch
from latent_cases import build_case
from transformers import ChameleonConfig, ChameleonForConditionalGeneration
from transformers.cache_utils import DynamicCache

from grpo_latent.algo.selection import top_k_candidates
from grpo_latent.errors import ConfigError, LatentMismatchError
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.attention_rows import recording_last_row
from grpo_latent.models.visibility import attention_bias


def tiny_chameleon():
    """Builds a tiny Chameleon: QK norms, no grouped keys, a discrete image tokenizer.

    The decoder does not need the tokenizer here.
    """
    vq = dict(
        base_channels=32, channel_multiplier=[1], num_res_blocks=1, embed_dim=8, latent_channels=8
    )
    vocabulary = {"<image>": 0} | {f"IMGIMG{'ABCDEFGHIJ'[i]}Z": i + 1 for i in range(10)}
    config = ChameleonConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        vq_config=vq | dict(num_embeddings=16, resolution=16),
        vocabulary_map=vocabulary,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ChameleonForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in model.model.layers.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(10.0)
    return model


def decoder_of(name):
    """(text config, decoder, hidden size) of a model whose attention is far from uniform."""
    if name == "chameleon":
        model = tiny_chameleon()
        return model.config.get_text_config(), model.model, 32
    adapter = ModelAdapter(build_case(name).model)
    return adapter.text_config, adapter.decoder, adapter.hidden_size


def reference(text_config, decoder, embeds_BTH, bias):
    """Mean over layers and heads of the last row of every full map."""
    configured = text_config._attn_implementation
    text_config._attn_implementation = "eager"
    try:
        maps = decoder(
            inputs_embeds=embeds_BTH, attention_mask=bias, output_attentions=True
        ).attentions
    finally:
        text_config._attn_implementation = configured
    return torch.stack([attention[:, :, -1] for attention in maps]).mean((0, 2))


def inputs(hidden_size, length=23):
    """Three rows of which two begin with padding, and the additive causal bias."""
    embeds_BTH = torch.randn(3, length, hidden_size, generator=torch.Generator().manual_seed(3))
    valid_BT = torch.ones(3, length, dtype=torch.bool)
    valid_BT[1, :4] = valid_BT[2, :9] = False
    return embeds_BTH, valid_BT, attention_bias(valid_BT.long(), valid_BT, "full", torch.float32)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3", "chameleon"])
@torch.no_grad()
def test_equals_the_mean_of_full_maps_cached_and_uncached(name):
    text_config, decoder, hidden_size = decoder_of(name)
    embeds_BTH, valid_BT, bias = inputs(hidden_size)
    expected_BS = reference(text_config, decoder, embeds_BTH, bias)
    assert float(expected_BS[0].std()) > 0.005, "a uniform row would hide a wrong head or layer"
    num_layers = text_config.num_hidden_layers
    with recording_last_row(text_config) as recorder:
        plain = decoder(inputs_embeds=embeds_BTH, attention_mask=bias).last_hidden_state
        uncached_BS = recorder.take(num_layers)
        cache = DynamicCache(config=text_config)
        position = torch.arange(23)
        for start, end in ((0, 11), (11, 20), (20, 23)):
            mrope = name in ("qwen2_vl", "qwen2_5_vl")
            position_ids = position[start:end][None].expand(3, -1)
            hidden = decoder(
                inputs_embeds=embeds_BTH[:, start:end],
                attention_mask=bias[:, :, start:end, :end],
                position_ids=position_ids[None].expand(3, -1, -1) if mrope else position_ids,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            cached_BS = recorder.take(num_layers)
    torch.testing.assert_close(uncached_BS, expected_BS, rtol=0, atol=1e-5)
    torch.testing.assert_close(cached_BS, expected_BS, rtol=0, atol=1e-5)
    torch.testing.assert_close(uncached_BS.sum(-1), torch.ones(3))
    assert (uncached_BS[~valid_BT] == 0).all()
    for attention_BS in (uncached_BS, cached_BS):
        assert torch.equal(
            top_k_candidates(attention_BS, valid_BT, 6), top_k_candidates(expected_BS, valid_BT, 6)
        )
    # the block changes no output and leaves no trace
    ordinary = decoder(inputs_embeds=embeds_BTH, attention_mask=bias).last_hidden_state
    torch.testing.assert_close(plain, ordinary, rtol=0, atol=1e-5)
    torch.testing.assert_close(hidden, ordinary[:, 20:], rtol=0, atol=1e-4)
    assert text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3", "chameleon"])
@torch.no_grad()
def test_kept_queries_and_keys_make_the_last_layers_map(name):
    text_config, decoder, hidden_size = decoder_of(name)
    embeds_BTH, _, bias = inputs(hidden_size)
    with recording_last_row(text_config, keep_last_layer=True) as recorder:
        decoder(inputs_embeds=embeds_BTH, attention_mask=bias)
    queries, keys = recorder.queries_BATD, recorder.keys_BASD
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    found = (queries @ keys.transpose(2, 3) * recorder.scaling + bias).softmax(-1)
    text_config._attn_implementation = "eager"
    expected = decoder(
        inputs_embeds=embeds_BTH, attention_mask=bias, output_attentions=True
    ).attentions[-1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_two_forwards_without_take_are_an_error():
    text_config, decoder, hidden_size = decoder_of("qwen2")
    embeds_BTH, _, bias = inputs(hidden_size)
    with recording_last_row(text_config) as recorder:
        for _ in range(2):
            decoder(inputs_embeds=embeds_BTH, attention_mask=bias)
        with pytest.raises(
            LatentMismatchError, match="not that of one forward; got 4 layers; expected 2"
        ):
            recorder.take(text_config.num_hidden_layers)


def test_an_attention_without_explicit_mask_is_an_error():
    text_config, _, _ = decoder_of("qwen2")
    text_config._attn_implementation = "flash_attention_2"
    with (
        pytest.raises(ConfigError, match="attn_implementation=sdpa"),
        recording_last_row(text_config),
    ):
        pass
