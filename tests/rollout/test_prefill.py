"""Prompts of several lengths prefilled together: as each alone, wherever the buckets fall."""

import pytest
import slow_reading
import torch
from latent_cases import case

from grpo_latent.rollout import prefill as module
from grpo_latent.rollout.prefill import prefill_prompts


@pytest.mark.parametrize("min_positions", [1, 10**6], ids=["several buckets", "one bucket"])
@pytest.mark.parametrize("visibility", ["full", "latents_only"])
@torch.no_grad()
def test_prompts_together_are_each_alone(visibility, min_positions, monkeypatch):
    monkeypatch.setattr(module, "MIN_POSITIONS", min_positions)
    c = case("qwen2_5_vl")
    requests = [
        c.request("?"),
        c.request("read ? ?", c.images(2, seed=2), image_first=True),
        c.request("read red ?", c.images(1, seed=1)),
        c.request("? ? ?"),
    ]
    prompts, images = (
        [request.prompt_ids for request in requests],
        [request.images for request in requests],
    )
    lengths = [len(ids) for ids in prompts]
    assert len(module.length_buckets(lengths)) == (4 if min_positions == 1 else 1)
    together = prefill_prompts(prompts, images, c.adapter, visibility)
    for row, (ids, pixels, length) in enumerate(zip(prompts, images, lengths, strict=True)):
        alone = prefill_prompts([ids], [pixels], c.adapter, visibility)
        assert together.valid_BP[row].sum() == length and together.valid_BP[row, -length:].all()
        assert torch.equal(together.kinds_BP[row, -length:], alone.kinds_BP[0])
        counted = slow_reading.positions(c, ids, pixels, num_more=1)  # a hand loop
        assert together.next_position_B[row] == counted[0, 0, -1] == alone.next_position_B[0]
        torch.testing.assert_close(together.hidden_BH[row], alone.hidden_BH[0], rtol=0, atol=1e-4)
        for layer, own in zip(together.cache.layers, alone.cache.layers, strict=True):
            torch.testing.assert_close(
                layer.keys[row, :, -length:], own.keys[0], rtol=0, atol=1e-4
            )
            torch.testing.assert_close(
                layer.values[row, :, -length:], own.values[0], rtol=0, atol=1e-4
            )
