"""Positions against a hand loop and the model's own; models that latents cannot enter."""

import pytest
import slow_reading
import torch
from latent_cases import ALL_NAMES, VL_NAMES, case
from transformers import AutoModel, Qwen2Config, Qwen2ForCausalLM

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.errors import ConfigError, RolloutError
from grpo_latent.models.adapter import ModelAdapter


@pytest.mark.parametrize("name", VL_NAMES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_positions_of_padded_rows_equal_a_hand_loop(name, padding):
    c = case(name)
    requests = [
        c.request("read ?", c.images(2, size=(28, 56)), image_first=True),
        c.request("read red ? ?", None),
        c.request("?", c.images(1, size=(56, 28))),
    ]
    longest = max(len(r.prompt_ids) for r in requests) + 2
    ids, valid = (
        torch.zeros(3, longest, dtype=torch.long),
        torch.zeros(3, longest, dtype=torch.bool),
    )
    for row, request in enumerate(requests):
        start = longest - len(request.prompt_ids) if padding == "left" else 0
        ids[row, start : start + len(request.prompt_ids)] = request.prompt_ids
        valid[row, start : start + len(request.prompt_ids)] = True
    images = ImageInputs.concat([r.images for r in requests])
    position_ids = c.adapter.position_ids(ids, valid, images)
    assert position_ids.shape == (3, 3, longest)
    for row, request in enumerate(requests):
        expected = slow_reading.positions(c, request.prompt_ids, request.images, 0)[:, 0]
        assert torch.equal(position_ids[:, row, valid[row]], expected)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_positions_without_images_count_valid_positions(name):
    adapter = case(name).adapter
    valid = torch.tensor([[False, False, True, True, True], [True, True, True, False, False]])
    position_ids = adapter.position_ids(torch.ones(2, 5, dtype=torch.long), valid, None)
    plain = position_ids[0] if adapter.has_mrope else position_ids
    assert plain[0, 2:].tolist() == [0, 1, 2] and plain[1, :3].tolist() == [0, 1, 2]
    assert adapter.has_mrope == (name in VL_NAMES)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_hidden_and_logits_are_the_models_own(name):
    c = case(name)
    ids = c.request("read red blue ?").prompt_ids[None]
    valid = torch.ones_like(ids)
    with torch.no_grad():
        hidden = c.adapter.forward_hidden(
            ids, valid, c.adapter.position_ids(ids, valid.bool(), None)
        )
        assert torch.equal(c.adapter.logits(hidden), c.model(input_ids=ids).logits)


def test_state_left_by_an_earlier_forward_does_not_matter():
    """Hugging Face VL models keep `rope_deltas` of the last forward.

    The adapter always passes positions.
    """
    c = case("qwen2_5_vl")
    request = c.request(images=c.images(1))
    ids, valid = request.prompt_ids[None], torch.ones(1, len(request.prompt_ids), dtype=torch.bool)
    arguments = (
        ids,
        valid.long(),
        c.adapter.position_ids(ids, valid, request.images),
        request.images,
    )
    with torch.no_grad():
        first = c.adapter.forward_hidden(*arguments)
        c.model.model.rope_deltas = torch.tensor([[1000]])
        assert torch.equal(c.adapter.forward_hidden(*arguments), first)
        c.model.model.rope_deltas = None


def test_concat_of_images():
    c = case("qwen2_5_vl")
    one, two = c.images(1, size=(28, 28)), c.images(2, seed=1)
    both = ImageInputs.concat([one, None, two])
    assert torch.equal(both.pixel_values, torch.cat([one.pixel_values, two.pixel_values]))
    assert both.image_grid_thw.tolist() == [[1, 4, 4], [1, 4, 6], [1, 4, 6]]
    assert ImageInputs.concat([None, None]) is None and ImageInputs.concat([]) is None


def test_a_model_without_a_head_is_refused():
    model = AutoModel.from_config(case("qwen2").model.config)
    with pytest.raises(ConfigError, match="Qwen2Model.*ForCausalLM"):
        ModelAdapter(model)


def test_sliding_window_is_refused():
    config = Qwen2Config(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    )
    with pytest.raises(
        ConfigError, match="layer_types.*sliding_attention.*use_sliding_window=False"
    ):
        ModelAdapter(Qwen2ForCausalLM(config))


def test_images_for_a_text_model_are_refused():
    c, images = case("qwen2"), case("qwen2_5_vl").images(1)
    ids = c.request().prompt_ids[None]
    with pytest.raises(RolloutError, match="Qwen2ForCausalLM: images for a text-only model"):
        c.adapter.forward_hidden(ids, torch.ones_like(ids), torch.zeros_like(ids), images)
