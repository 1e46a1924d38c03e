"""`HFRolloutEngine.load_weights`: what arrives is what acts.

Nothing missing, unknown or misshapen passes.
"""

import copy

import pytest
import torch
from latent_cases import build_case, sampling

from grpo_latent.errors import CheckpointError
from grpo_latent.models import tiny


def test_new_weights_act_at_once_and_stamp_the_version():
    ours, other = build_case("qwen2", seed=0), build_case("qwen2", seed=1)
    request = ours.request(seeds=range(6))
    engine = ours.engine()
    before = engine.generate([request], sampling())[0]
    engine.load_weights(other.model.state_dict().items(), policy_version=7)
    after = engine.generate([request], sampling())[0]
    expected = other.engine().generate([request], sampling())[0]
    assert [t.policy_version for t in after] == [7] * 6 and before[0].policy_version == 0
    for a, b in zip(after, expected, strict=True):
        assert torch.equal(a.token_ids, b.token_ids) and torch.equal(
            a.rollout_log_probs, b.rollout_log_probs
        )
    assert any(
        not torch.equal(a.rollout_log_probs, b.rollout_log_probs)
        for a, b in zip(after, before, strict=True)
    )


def test_weights_are_copied_not_shared_and_may_have_another_dtype():
    ours = build_case("qwen2")
    weights = {
        name: tensor.bfloat16()
        for name, tensor in build_case("qwen2", seed=1).model.state_dict().items()
    }
    ours.engine().load_weights(weights.items(), policy_version=1)
    own = ours.model.state_dict()
    assert all(torch.equal(own[name], tensor.float()) for name, tensor in weights.items())
    weights["model.norm.weight"].zero_()
    assert own["model.norm.weight"].abs().sum() > 0


@pytest.mark.parametrize("sent", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_weights_arrive_under_either_name(sent):
    case = build_case("qwen2")
    tied = tiny.tiny_qwen2(("read",), tiny.TinySizes(tied=True)).model
    engine = type(case.engine())(tied, case.mechanism(), [case.eos_id])
    names = {"lm_head.weight", "model.embed_tokens.weight"}
    weights = {
        name: tensor + 1
        for name, tensor in tied.state_dict().items()
        if name not in names - {sent}
    }
    engine.load_weights(weights.items(), policy_version=1)
    assert torch.equal(tied.lm_head.weight, weights[sent]) and torch.equal(
        tied.model.embed_tokens.weight, weights[sent]
    )


def test_the_head_is_a_weight_like_any_other():
    case = build_case("qwen2", head="glu")
    weights = copy.deepcopy(case.model.state_dict())
    assert any(name.startswith("lvr_head.") for name in weights)
    case.engine().load_weights(weights.items(), policy_version=1)
    missing = {
        name: tensor for name, tensor in weights.items() if not name.startswith("lvr_head.")
    }
    with pytest.raises(CheckpointError, match="lvr_head.*expected all weights"):
        case.engine().load_weights(missing.items(), policy_version=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("model.norm.weight"),
            r"weights are missing; got \['model.norm.weight'\]",
        ),
        (
            lambda w: w.update(surprise=torch.zeros(1)),
            "surprise: weight does not fit.*a name of the model",
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.zeros(3)}),
            r"model.norm.weight.*\(3,\).*expected \(32,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message):
    case = build_case("qwen2")
    weights = dict(case.model.state_dict())
    change(weights)
    engine = case.engine()
    with pytest.raises(CheckpointError, match=message):
        engine.load_weights(weights.items(), policy_version=3)
    assert engine.policy_version == 0
