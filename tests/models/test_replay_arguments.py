"""What callers beside this repository may leave out: visibility, and the adapter's mechanism."""

import pytest
import torch
from latent_cases import build_case, sampling

from grpo_latent.errors import ConfigError
from grpo_latent.latent.mechanisms import HybridGate
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.replay import collate, replay
from grpo_latent.testing.cases import build_case as build_mechanism_case


@torch.no_grad()
def test_recorded_vectors_are_replayed_without_a_mechanism_and_under_another_visibility():
    c = build_case("qwen2_5_vl")
    request = c.request(images=c.images(1), seeds=range(4))
    group = c.engine().generate([request], sampling())[0]
    assert any(len(t.latents) for t in group)
    alone = ModelAdapter(c.model)
    images = [request.images] * len(group)
    right, _ = replay(c.adapter, collate(group, images, c.adapter, "full"), temperature=1.0)
    assert torch.equal(replay(alone, collate(group, images, alone), "full", 1.0)[0], right)
    hidden = collate(group, images, c.adapter, "latents_only")
    assert torch.equal(replay(alone, hidden, "full")[0], right)
    assert not torch.equal(replay(alone, hidden)[0], right)


def test_composed_tokens_need_the_mechanism():
    ids = {"<answer>": 5}
    mechanism = HybridGate.from_tokens(ids, answer_token="<answer>")
    c = build_mechanism_case(type(mechanism), "qwen3", {"answer_token": "<answer>"})
    alone = ModelAdapter(c.model)
    batch = collate(c.recorded.trajectories, c.recorded.images, alone)
    with pytest.raises(ConfigError, match="no mechanism"):
        replay(alone, batch)
