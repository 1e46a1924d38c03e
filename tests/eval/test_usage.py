"""The measurement that training repeats: gaps, verdict, drift, alignment against a recount.

And the reference over resumes.
"""

import dataclasses

import pytest
import torch
from latent_cases import build_case, case
from torch.nn.functional import cosine_similarity

from grpo_latent.errors import ConfigError, DataError
from grpo_latent.eval.decode import Evaluator
from grpo_latent.eval.donors import donors
from grpo_latent.eval.prompts import EvalPrompt
from grpo_latent.eval.scoring import Outcome
from grpo_latent.eval.usage import UsageProbe, UsageSettings, drift
from grpo_latent.models.loading import LatentModel
from grpo_latent.models.vision_cache import VisionCache

TEXTS = ("read red ?", "read blue ?", "? green", "read ? ?", "red", "blue ? read", "green", "? ?")
NEW = 8


@pytest.fixture(scope="module")
def loaded():
    c = build_case("qwen2_5_vl")
    return LatentModel(c.model, c.tokenizer, c.processor, c.mechanism(steps=2), (c.eos_id,))


@pytest.fixture(scope="module")
def prompts(loaded):
    """The truth of each is what the model says, so that own accuracy is 1."""
    c, rows = case("qwen2_5_vl"), []
    for index, text in enumerate(TEXTS):
        images = c.images(1, seed=index)
        rows.append(
            EvalPrompt(
                c.request(text, images).prompt_ids,
                images,
                "t",
                "",
                "",
                str(index),
                roi=(index % 6,),
            )
        )
    own = Evaluator(loaded, NEW).greedy(rows)
    return [
        dataclasses.replace(p, ground_truth=tuple(t.text_ids))
        for p, t in zip(rows, own, strict=True)
    ]


def scorer(prompts, trajectories):
    right = [
        p.ground_truth == tuple(t.text_ids) for p, t in zip(prompts, trajectories, strict=True)
    ]
    return [Outcome(float(value), float(value)) for value in right]


def test_a_measurement_against_a_recount(loaded, prompts, tmp_path):
    settings = UsageSettings(num_prompts=8, ablations=("shuffle", "image_swap", "zero@span0"))
    probe = UsageProbe(
        loaded, prompts, scorer, settings, NEW, tmp_path / "run" / "start.safetensors"
    )
    usage = probe.measure(is_start=True)
    own = Evaluator(loaded, NEW).greedy(prompts)
    assert usage.metrics["own_accuracy"] == 1.0
    sources = donors([len(t.latents) for t in own], [p.row_id for p in prompts], 0)
    changed = [i for i, source in enumerate(sources) if source is not None]
    shuffled = Evaluator(loaded, NEW).greedy(
        [prompts[i] for i in changed],
        [{"latent_override": override(own[sources[i]].latents)} for i in changed],
    )
    gap = 1 - sum(o.correct for o in scorer([prompts[i] for i in changed], shuffled)) / len(
        changed
    )
    assert (
        usage.metrics["gap/shuffle"] == pytest.approx(gap) and usage.metrics["gap/shuffle"] > 0.2
    )
    assert "shuffle" in usage.sentence and f"n = {len(changed)}" in usage.sentence
    assert {"gap/image_swap", "gap/zero@span0"} <= set(usage.metrics)
    assert (
        usage.metrics["drift_cosine"] == pytest.approx(1.0)
        and usage.metrics["drift_relative"] == 0.0
    )
    cosines = []
    with Evaluator(loaded, NEW).encoded_once(prompts) as visual:
        for prompt, trajectory, visual_MH in zip(prompts, own, visual, strict=True):
            cosines += [
                float(cosine_similarity(z, visual_MH[prompt.roi[0]], dim=0))
                for z in trajectory.latents[:1]
            ]
    assert usage.metrics["alignment_cosine"] == pytest.approx(
        sum(cosines) / len(cosines), abs=1e-5
    )
    assert 0 <= usage.metrics["alignment_hit"] <= 1


def test_batches_bound_what_runs_at_once_and_change_no_number(loaded, prompts, monkeypatch):
    cache, rows, images = VisionCache.install(loaded.model), [], []
    encode = cache._forward_of_tower
    monkeypatch.setattr(
        cache,
        "_forward_of_tower",
        lambda x, grid, **kw: images.append(len(grid)) or encode(x, grid, **kw),
    )
    settings = UsageSettings(ablations=("shuffle", "image_swap"))
    whole = UsageProbe(loaded, prompts, scorer, settings, NEW).measure()
    assert images == [8], "once each"
    images.clear()
    hook = loaded.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    settings = dataclasses.replace(settings, prompts_per_batch=3)
    parts = UsageProbe(loaded, prompts, scorer, settings, NEW).measure()
    hook.remove()
    assert max(rows) == max(images) == 3
    assert (
        parts.metrics == pytest.approx(whole.metrics, abs=1e-4)
        and parts.sentence == whole.sentence
    )


def override(vectors):
    from grpo_latent.rollout.protocol import LatentOverride

    return LatentOverride(vectors)


def test_drift_is_from_the_start_over_resumes(loaded, prompts, tmp_path):
    """Another process finds the start's latents in the file.

    A moved head moves them; other prompts are refused.
    """
    settings, path = UsageSettings(ablations=("shuffle",)), tmp_path / "start.safetensors"
    UsageProbe(loaded, prompts, scorer, settings, NEW, path).measure(is_start=True)
    c = build_case("qwen2_5_vl")
    with torch.no_grad():
        c.model.model.language_model.norm.weight.mul_(1.5)
    moved = LatentModel(c.model, c.tokenizer, c.processor, loaded.mechanism, loaded.eos_ids)
    metrics = UsageProbe(moved, prompts, scorer, settings, NEW, path).measure().metrics
    assert metrics["drift_relative"] > 0.2 and metrics["drift_cosine"] < 1.0
    with pytest.raises(DataError, match="start.safetensors.*other prompts"):
        UsageProbe(loaded, prompts[:3], scorer, settings, NEW, path).measure()
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(
        DataError, match="start.safetensors: the latents of the start cannot be read"
    ):
        UsageProbe(loaded, prompts, scorer, settings, NEW, path).measure()
    nothing = (
        UsageProbe(loaded, prompts, scorer, settings, NEW, tmp_path / "none").measure().metrics
    )
    assert not [name for name in nothing if "drift" in name], (
        "a run that has lost its start has no drift"
    )


def test_the_first_ablation_is_one_that_can_decide():
    for allowed in (("shuffle", "zero"), ("image_swap@span0", "oracle")):
        UsageSettings(ablations=allowed)
    UsageSettings(num_prompts=0, ablations=())
    with pytest.raises(ConfigError, match="nothing to measure use by"):
        UsageSettings(ablations=())
    with pytest.raises(
        ConfigError,
        match="latent.usage.ablations: a loss under this.*got zero; expected shuffle or",
    ):
        UsageSettings(ablations=("zero", "shuffle"))


def test_drift_by_hand(loaded, prompts):
    own = [t for t in Evaluator(loaded, NEW).greedy(prompts) if len(t.latents) >= 2][:2]
    doubled = [dataclasses.replace(t, latents=2 * t.latents) for t in own]
    assert drift(doubled, own) == {
        "drift_cosine": pytest.approx(1.0),
        "drift_relative": pytest.approx(1.0),
    }
    turned = [dataclasses.replace(t, latents=-t.latents) for t in own]
    assert drift(turned, own) == {
        "drift_cosine": pytest.approx(-1.0),
        "drift_relative": pytest.approx(2.0),
    }
