"""Tensor parallelism: two processes decode what one does, and what they disagree about is an error.

Not covered: CUDA's collectives, which this check is for; more than two ranks; verl, which is
refused there.
"""

import copy

import pytest
import torch
from vllm_cases import build_vllm_case, compare, sampling

from grpo_latent.errors import LatentMismatchError
from grpo_latent.latent.treatments import parse_treatment
from grpo_latent.rollout.vllm.wire import agreed, digest, pack


def records():
    latents = torch.tensor([[1.0, 2.0]])
    return {"7": {"kinds": pack(torch.tensor([3, 4])), "latents": pack(latents)}}


def test_ranks_that_agree_give_the_records_of_the_first():
    first = records()
    assert agreed([first]) is first
    assert agreed([first, {"7": digest(records()["7"])}]) is first


def test_ranks_that_disagree_are_named():
    other = copy.deepcopy(records())
    other["7"]["latents"] = pack(torch.tensor([[1.0, 2.0000002]]))  # the next float
    digests = {"7": digest(other["7"])}
    with pytest.raises(LatentMismatchError, match="record 7, rank 2"):
        agreed([records(), {"7": digest(records()["7"])}, digests])
    with pytest.raises(LatentMismatchError, match="record 7, rank 1: .*got no record"):
        agreed([records(), {}])


@pytest.mark.slow
@pytest.mark.vllm
def test_two_processes_decode_what_engine_hf_does(tmp_path, monkeypatch):
    # vLLM would give each rank cores of its own and keep one for itself
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    made_by = parse_treatment({"name": "gaussian", "gaussian": {"sigma": 0.3}})[0]
    case = build_vllm_case("qwen2_5_vl", tmp_path, head="mlp")
    engine = case.vllm_engine(tensor_parallel_size=2, treatment=made_by)
    try:
        requests = case.requests(12, num_trajectories=2)
        params = sampling(temperature=0.8, top_k=5)
        groups = engine.generate(requests, params)
        result = compare(groups, case.hf_engine(made_by).generate(requests, params))
        assert result.different == [] and result.num_latents > 24
        assert result.latent_gap <= 1e-4 and result.log_prob_gap <= 1e-4, result
        other = build_vllm_case("qwen2_5_vl", tmp_path / "other", head="mlp", seed=5)
        engine.load_weights(other.case.model.state_dict().items(), policy_version=1)
        reference = other.hf_engine(made_by)
        reference.policy_version = 1
        groups = engine.generate(requests, params)
        assert compare(groups, reference.generate(requests, params)).different == []
    finally:
        engine.close()
