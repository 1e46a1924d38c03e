"""Probes over models with several images, none, and a head.

Not covered: a GPU; IVT-LR's chosen image embeddings.
"""

import io

import numpy as np
import pytest
import slow_reading
import torch
from latent_cases import case, sampling
from PIL import Image
from torch.nn.functional import cosine_similarity

from grpo_latent.data.image_refs import ImageRef
from grpo_latent.errors import LatentMismatchError
from grpo_latent.eval.dumps import DumpedTrajectory
from grpo_latent.inspect.probes import Prober, PromptRow
from grpo_latent.latent.treatments.gaussian import Gaussian
from grpo_latent.latent.treatments.gumbel_soft import GumbelSoft
from grpo_latent.latent.treatments.mask import Mask
from grpo_latent.models.loading import LatentModel
from grpo_latent.models.prompts import encode_prompt
from grpo_latent.rollout.protocol import RolloutRequest

BOX = (0.0, 0.0, 0.3, 0.3)


def row_of(num_images: int) -> PromptRow:
    rng = np.random.default_rng(0)
    refs = []
    for index in range(num_images):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (28, 42 + 14 * index, 3), dtype=np.uint8)).save(
            buffer, format="PNG"
        )
        refs.append(ImageRef("test", data=buffer.getvalue()))
    content = [*({"type": "image"} for _ in refs), {"type": "text", "text": "read red ?"}]
    return PromptRow(
        [{"role": "user", "content": content}], refs, [BOX] * num_images, list(range(num_images))
    )


def roll_out(name: str, head: str, row: PromptRow):
    tested = case(name, head)
    config = tested.mechanism(head=head)
    loaded = LatentModel(
        tested.model, tested.tokenizer, tested.processor, config, (tested.eos_id,)
    )
    prompt = encode_prompt(loaded.tokenizer, loaded.processor, row.messages, row.images(), "test")
    request = RolloutRequest(prompt.ids, [1, 2, 3, 4], prompt.images, group_id="0")
    group = [
        DumpedTrajectory(
            t,
            1,
            "0",
            i,
            "",
            None,
            0.0,
            {},
            None,
            t.response_mask(),
            {"rollout": t.rollout_log_probs},
        )
        for i, t in enumerate(tested.engine(config).generate([request], sampling())[0])
    ]
    assert any(len(dumped.trajectory.latents) > 1 for dumped in group)
    return tested, loaded, prompt, group


@pytest.mark.parametrize(
    ("name", "head", "num_images"),
    [("qwen2", "none", 0), ("qwen2_vl", "mlp", 2), ("qwen3_vl", "none", 2)],
)
def test_probe(name, head, num_images):
    row = row_of(num_images)
    tested, loaded, prompt, group = roll_out(name, head, row)
    found = Prober(loaded, treatment=Mask()).probe(row, group)
    grids = [(2, 3), (2, 4)][:num_images]
    assert found.grids == grids
    assert (
        found.roi == [0, 6, 7][: num_images * 3]
    )  # 0.3 of 3 tokens is one, of 4 tokens it reaches into the second
    num_tokens = sum(rows * columns for rows, columns in grids)
    visual = torch.zeros(0, tested.adapter.hidden_size)
    if num_images:
        with torch.no_grad():
            visual = tested.adapter.encode_images(prompt.images)
    for dumped, probe in zip(group, found.probes, strict=True):
        latents = dumped.trajectory.latents
        assert probe.cosines.shape == (len(latents), num_tokens)
        for latent, cosines in zip(latents, probe.cosines, strict=True):
            if num_images:
                torch.testing.assert_close(
                    cosines, cosine_similarity(latent[None], visual), atol=1e-5, rtol=0
                )
        assert all(gap < 1e-4 for gap in probe.replay_gaps) and len(probe.replay_gaps) == len(
            latents
        )
        assert len(probe.lens) == len(probe.nearest) == len(latents)
        torch.testing.assert_close(
            probe.new_log_probs, dumped.trajectory.rollout_log_probs, atol=1e-4, rtol=0
        )


def test_the_replay_gap_is_relative():
    """Latents that were recorded twice as long as the model makes them: the first gap is 1/2."""
    row = row_of(1)
    _, loaded, _, group = roll_out("qwen2_5_vl", "none", row)
    index = next(i for i, dumped in enumerate(group) if len(dumped.trajectory.latents))
    group[index].trajectory.latents.mul_(2)
    assert Prober(loaded, treatment=Mask()).probe(row, group).probes[index].replay_gaps[
        0
    ] == pytest.approx(0.5, abs=1e-3)


def test_gaps_of_later_steps_take_the_latents_before_them_as_recorded():
    """The gap of the second latent is what one step makes of a first one that was moved.

    Not of the model's own chain; by an uncached forward over the recorded sequence.
    """
    row = row_of(1)
    tested, loaded, prompt, group = roll_out("qwen2_5_vl", "none", row)
    index = next(i for i, dumped in enumerate(group) if len(dumped.trajectory.latents) > 1)
    trajectory = group[index].trajectory
    trajectory.latents[0] += 1.0
    gaps = Prober(loaded, treatment=Mask()).probe(row, group).probes[index].replay_gaps
    with torch.no_grad():
        _, hidden = slow_reading.forward(tested, trajectory, prompt.images, "full")
    first = len(trajectory.prompt_ids) + int(trajectory.latent_mask.nonzero()[0, 0])
    second = trajectory.latents[1]
    assert (
        gaps[1] == pytest.approx(float((second - hidden[first]).norm() / second.norm()), abs=1e-4)
        and gaps[1] > 0.01
    )


def test_treatments_that_draw_have_no_replay_gap_and_those_that_do_not_have_their_own():
    row = row_of(1)
    tested = case("qwen2_5_vl")
    loaded = LatentModel(
        tested.model, tested.tokenizer, tested.processor, tested.mechanism(), (tested.eos_id,)
    )
    prompt = encode_prompt(loaded.tokenizer, loaded.processor, row.messages, row.images(), "test")
    request = RolloutRequest(prompt.ids, [1, 2, 3, 4], prompt.images, group_id="0")

    def gaps(fed, treatment, **sampling_options):
        rolled = tested.engine(tested.mechanism(), treatment=fed).generate(
            [request], sampling(**sampling_options)
        )[0]
        group = [
            DumpedTrajectory(t, 1, "0", i, "", None, 0.0, {}, None, t.response_mask(), {})
            for i, t in enumerate(rolled)
        ]
        found = torch.tensor(
            [
                g
                for p in Prober(loaded, treatment=treatment).probe(row, group).probes
                for g in p.replay_gaps
            ]
        )
        assert len(found) > 3
        return found

    noisy, mean, soft = (
        Gaussian(sigma=0.1),
        Gaussian(sigma=0.1, sigma_rollout=0),
        GumbelSoft(top_k=3),
    )
    assert (
        gaps(noisy, noisy).isnan().all()
        and gaps(soft, soft).isnan().all()
        and gaps(Mask(), None).isnan().all()
    )
    assert gaps(mean, mean).max() < 1e-4 and gaps(noisy, Mask()).max() > 0.01


def test_another_image_is_refused():
    row = row_of(1)
    _, loaded, _, group = roll_out("qwen2_5_vl", "none", row)
    with pytest.raises(LatentMismatchError, match="14 image tokens.*expected 6"):
        Prober(loaded).probe(row_of(2), group)
