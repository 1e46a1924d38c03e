"""Engine vllm against engine hf on one checkpoint, float32, greedy.

And sampled trajectories against replay.

Not covered: a GPU, bfloat16, CUDA graphs. vLLM's V2 runner has its own file.
"""

import pytest
import torch
from vllm_cases import build_vllm_case, compare, replay_gap, sampling

from grpo_latent.trajectory import PositionKind

pytestmark = pytest.mark.vllm
BOUND = 1e-4


def check_parity(case, engine, num_requests=64, num_trajectories=1, **sampling_options):
    requests = case.requests(num_requests, num_trajectories)
    params = sampling(**sampling_options)
    result = compare(
        engine.generate(requests, params), case.hf_engine().generate(requests, params)
    )
    assert result.different == []
    assert result.latent_gap <= BOUND and result.log_prob_gap <= BOUND, result
    return result


@pytest.fixture(scope="module")
def vl(tmp_path_factory):
    return build_vllm_case("qwen2_5_vl", tmp_path_factory.mktemp("vl"))


@pytest.fixture(scope="module")
def vl_engine(vl):
    engine = vl.vllm_engine(block_size=32)
    yield engine
    engine.close()


def test_64_mixed_requests_with_images(vl, vl_engine):
    result = check_parity(vl, vl_engine)
    assert (
        result.num_spans > 64
        and result.num_latents > 128
        and result.stop_reasons == {"eos", "length"}
    )
    assert vl_engine.stats["num_seats"] == 0  # nothing is left of finished requests


def test_sampled_groups_equal_their_replay(vl, vl_engine):
    requests = vl.requests(16, num_trajectories=4)
    params = sampling(temperature=0.8, top_k=5, top_p=0.9)
    groups = vl_engine.generate(requests, params)
    log_prob_gap, latent_gap = replay_gap(vl.case, requests, groups, temperature=0.8)
    assert log_prob_gap <= BOUND and latent_gap <= BOUND
    assert any(not torch.equal(a.token_ids, b.token_ids) for a, b, *_ in groups)
    acted = torch.cat([t.response_mask() for group in groups for t in group])
    full = torch.cat([t.rollout_log_probs for group in groups for t in group])
    drawn = torch.cat([t.sampling_log_probs for group in groups for t in group])
    # the distribution drawn from has less mass elsewhere, and nothing was drawn inside spans
    assert (drawn[acted] >= full[acted] - 1e-5).all() and (drawn[acted] > full[acted] + 1e-3).any()
    assert not full[~acted].any() and not drawn[~acted].any()
    again = vl_engine.generate(requests, params)
    assert compare(again, groups).different == []
    assert vl_engine.stats["num_cached_tokens"] > 0  # a group prefills its prompt once


# few blocks and small steps: requests are preempted, prompts cut into chunks
TIGHT = {
    "num_gpu_blocks_override": 12,
    "block_size": 32,
    "max_num_batched_tokens": 48,
    "max_num_seqs": 24,
}


def check_under_pressure(case, engine):
    """64 groups of two, greedy, against engine hf; then sampled ones against their replay."""
    try:
        assert check_parity(case, engine, num_trajectories=2).num_latents > 96
        # preempted requests fed recorded positions again, and the second of a group found its
        # prompt cached
        assert engine.stats["num_replayed_rows"] > 50 and engine.stats["num_cached_tokens"] > 0, (
            engine.stats
        )
        requests = case.requests(16, num_trajectories=2, first=64)
        groups = engine.generate(requests, sampling(temperature=0.8, top_k=5))
        log_prob_gap, latent_gap = replay_gap(case.case, requests, groups, temperature=0.8)
        assert log_prob_gap <= BOUND and latent_gap <= BOUND
        assert engine.stats["num_seats"] == engine.stats["num_records"] == 0
    finally:
        engine.close()


def test_preemption_chunks_and_prefix_hits_change_nothing(vl):
    check_under_pressure(vl, vl.vllm_engine(**TIGHT))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "qwen3"])
def test_other_architectures(name, tmp_path):
    case = build_vllm_case(name, tmp_path)
    engine = case.vllm_engine()
    try:
        assert check_parity(case, engine, num_requests=24).num_latents > 16
    finally:
        engine.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"exit": "latent_end", "steps": 6, "latent_end_threshold": 0.8, "head": "none"},
        {"exit": "end_token", "steps": 12, "max_spans": 2, "head": "none"},
        {"exit": "steps", "head": "mlp", "max_spans": 1},
        {"exit": "steps", "head": "glu"},
        {"exit": "steps", "head": "none", "span_end": "sampled"},
        {"exit": "steps", "head": "none", "start": "forced", "start_is_action": False},
        {"exit": "end_token", "steps": 12, "first_latent": "at_start", "head": "none"},
    ],
    ids=["latent_end", "end_token", "mlp", "glu", "sampled_end", "forced_start", "at_start"],
)
def test_exits_heads_and_max_spans(changes, tmp_path, request):
    case = build_vllm_case("qwen2", tmp_path, **changes)
    engine = case.vllm_engine()
    try:
        requests = case.requests(32)
        trajectories = [group[0] for group in engine.generate(requests, sampling())]
        caps = [request.steps or case.mechanism.steps for request in requests]
        lengths = [
            (span.length, cap)
            for t, cap in zip(trajectories, caps, strict=True)
            for span in t.spans
        ]
        if changes["exit"] != "steps":
            assert any(length < cap for length, cap in lengths)  # the rule ended some spans
        kinds = torch.cat([t.kinds for t in trajectories])
        for setting, kind in (
            ("sampled_end", PositionKind.END),
            ("forced_start", PositionKind.START),
            ("at_start", PositionKind.FED_START),
        ):
            assert bool((kinds == kind).any()) or request.node.callspec.id != setting
        assert max(len(t.spans) for t in trajectories) <= (case.mechanism.max_spans or 128)
        assert check_parity(case, engine, num_requests=32).num_latents > 24
    finally:
        engine.close()


def test_asynchronous_scheduling_with_all_of_that(vl, monkeypatch):
    """vLLM switches it off on CPU.

    Here it is switched on again, so that the worker computes a step ahead.
    """
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def keep_async(cls, vllm_config):
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(keep_async))
    engine = vl.vllm_engine(async_scheduling=True, **TIGHT)
    assert engine._llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    check_under_pressure(vl, engine)
