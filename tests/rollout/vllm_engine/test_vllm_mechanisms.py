"""ILVR, slots at the beginning of completions, and drawn latents: engine vllm against engine hf.

One checkpoint each, float32. Sampled ones draw the same numbers, so tokens agree, too.

Not covered: IVT-LR's chosen image embeddings and treatments with parameters, which are refused.
"""

import dataclasses

import pytest
import torch
from vllm_cases import build_vllm_case, compare, replay_gap, sampling

from grpo_latent.errors import ConfigError, RolloutError
from grpo_latent.latent.treatments import parse_treatment
from grpo_latent.rollout.vllm.frontend import FrontEnd
from grpo_latent.rollout.vllm.skeleton import WorkerOptions, read_skeleton, worker_options
from grpo_latent.trajectory import PositionKind

BOUND = 1e-4
# few blocks and small steps: requests are preempted, prompts cut into chunks
TIGHT = {
    "num_gpu_blocks_override": 8,
    "block_size": 32,
    "max_num_batched_tokens": 48,
    "max_num_seqs": 24,
}
DRAWN = {"temperature": 0.8, "top_k": 5}


def treatment(name, **options):
    return parse_treatment({"name": name, name: options} if options else {"name": name})[0]


def check(case, requests, params, made_by=None, **options):
    """Both engines' trajectories of the same requests are one; returns engine vllm's."""
    engine = case.vllm_engine(treatment=made_by, **options)
    try:
        groups = engine.generate(requests, params)
        if "num_gpu_blocks_override" in options:
            assert engine.stats["num_replayed_rows"] > 0
    finally:
        engine.close()
    result = compare(groups, case.hf_engine(made_by).generate(requests, params))
    assert result.different == []
    assert result.latent_gap <= BOUND and result.log_prob_gap <= BOUND, result
    return groups


@pytest.mark.vllm
def test_ilvrs_spans_between_texts_with_an_end_token(tmp_path):
    case = build_vllm_case("qwen2_5_vl", tmp_path, mechanism="ilvr", steps=6)
    assert type(case.mechanism).__name__ == "ILVR" and case.mechanism.exit == "end_token"
    groups = check(case, case.requests(32), sampling(), **TIGHT)
    spans = [span.length for group in groups for t in group for span in t.spans]
    assert len(set(spans)) > 2  # by the cap of each request, and by the end token
    trajectories = [t for group in groups for t in group if len(t.spans) > 1]
    kinds = [t.kinds[t.spans[0].start : t.spans[1].start] for t in trajectories]
    assert any((between == PositionKind.TEXT).any() for between in kinds)


@pytest.mark.vllm
@pytest.mark.parametrize(
    "changes",
    [
        {"mechanism": "coconut"},
        {"mechanism": "coconut", "head": "projection"},
        {"mechanism": "own_slots"},
    ],
    ids=["coconut", "codi", "own_slots"],
)
def test_a_completion_that_begins_with_slots(changes, tmp_path):
    case = build_vllm_case("qwen2", tmp_path, **changes)
    requests = case.requests(24, num_trajectories=2)
    groups = check(case, requests, sampling(**DRAWN), **TIGHT)
    for request, group in zip(requests, groups, strict=True):
        num_slots = request.steps or case.mechanism.steps
        for trajectory in group:
            is_latent = trajectory.kinds == PositionKind.LATENT
            assert is_latent[:num_slots].all() and not is_latent[num_slots:].any()
    log_prob_gap, latent_gap = replay_gap(case.case, requests, groups, temperature=0.8)
    assert log_prob_gap <= BOUND
    # an own slot is no hidden state that a replay would make anew
    assert latent_gap <= BOUND or case.mechanism.name == "own_slots"


@pytest.mark.vllm
@pytest.mark.parametrize(
    "made_by",
    [
        treatment("gaussian", sigma=0.3),
        treatment("gumbel_soft", tau=0.5),
        treatment("vmf", kappa=200.0),
    ],
    ids=["gaussian", "gumbel_soft", "vmf"],
)
def test_drawn_latents_are_engine_hfs(made_by, tmp_path):
    case = build_vllm_case("qwen2_5_vl", tmp_path)
    requests = case.requests(16, num_trajectories=4)
    groups = check(case, requests, sampling(**DRAWN), made_by, **TIGHT)
    first = [t.latents[0] for group in groups for t in group if len(t.latents)]
    assert len(torch.stack(first).unique(dim=0)) == len(first)  # nobody's is another's
    acts = torch.cat([t.rollout_log_probs[t.latent_mask] for group in groups for t in group])
    assert len(acts) > 96 and bool((acts != 0).all())  # their densities


@pytest.mark.vllm
def test_greedy_latents_are_the_mode(tmp_path):
    case = build_vllm_case("qwen2", tmp_path)
    check(case, case.requests(16), sampling(), treatment("gaussian", sigma=0.3))


def test_treatments_that_need_engine_hf_are_refused(tmp_path):
    build_vllm_case("qwen2", tmp_path)
    with pytest.raises(ConfigError, match="no parameters of a treatment; got GaussianHead"):
        FrontEnd(tmp_path, None, 128, treatment=treatment("gaussian_head"))


def test_slots_that_leave_no_room_are_refused(tmp_path):
    case = build_vllm_case("qwen2", tmp_path, mechanism="coconut")
    front = FrontEnd(tmp_path, None, 128, max_latents=4)
    (request,) = case.requests(1)
    front.check(request, sampling(4))
    with pytest.raises(RolloutError, match="no room for text after the slots.*3 slots"):
        front.check(request, sampling(3))
    with pytest.raises(RolloutError, match="more latent steps than.*got 5 slots"):
        front.check(dataclasses.replace(request, steps=5), sampling(40))


def test_slots_beside_images_are_refused(tmp_path):
    """Coconut numbers everything as text; vLLM numbers images as their model does."""
    build_vllm_case("qwen2_5_vl", tmp_path, mechanism="coconut")
    with pytest.raises(ConfigError, match="latent.positions: .*got 1d.*expected text_style"):
        read_skeleton(tmp_path)
    build_vllm_case("qwen2_5_vl", tmp_path, mechanism="ivt_lr", top_k_image=2)
    with pytest.raises(ConfigError, match="latent.top_k_image: vLLM gives no attention"):
        read_skeleton(tmp_path)


@pytest.mark.parametrize("name", ["mask", "gaussian", "gumbel_soft", "vmf"])
def test_a_treatment_reaches_the_worker(name, tmp_path):
    case = build_vllm_case("qwen2", tmp_path)
    made_by = treatment(name)
    sent = WorkerOptions(case.mechanism, (), 9, made_by).to_json()

    class Config:
        additional_config = {"grpo_latent": sent}

    assert worker_options(Config).treatment == made_by
