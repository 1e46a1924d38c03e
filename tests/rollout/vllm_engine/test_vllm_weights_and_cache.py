"""New weights act at once, in every cache; and no two latent histories share a block.

Not covered: verl's own weight path (IPC buckets), sleep and wake.
"""

import psutil
import pytest
import torch
from vllm_cases import build_vllm_case, compare, sampling

from grpo_latent.errors import CheckpointError, ConfigError, RolloutError
from grpo_latent.rollout.protocol import LatentOverride

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Two checkpoints of one shape, images, a head."""
    return [
        build_vllm_case("qwen2_5_vl", tmp_path_factory.mktemp("vl"), head="mlp", seed=seed)
        for seed in (1, 3)
    ]


def listening() -> set[tuple[str, int]]:
    """Addresses and ports of this process, which other tests may have opened, too."""
    connections = psutil.Process().net_connections("tcp")
    return {tuple(c.laddr) for c in connections if c.status == psutil.CONN_LISTEN}


@pytest.fixture(scope="module")
def listening_before():
    return listening()


@pytest.fixture(scope="module")
def engine(cases, listening_before):
    engine = cases[0].vllm_engine(block_size=32)
    yield engine
    engine.close()


def test_the_engine_listens_on_loopback_only(listening_before, engine):
    """vLLM's collectives of one rank; left to itself it listens on all interfaces."""
    assert {host for host, _ in listening() - listening_before} == {"127.0.0.1"}


def test_new_weights_replace_everything_that_the_old_ones_computed(cases, engine):
    """Keys and values of the prefix cache, encoded images, repacked matrices, the head; twice."""
    requests = cases[0].requests(24, num_trajectories=2)
    for version, case in ((1, cases[1]), (2, cases[0])):
        engine.generate(requests, sampling())
        hf = case.hf_engine()
        hf.policy_version = version
        images = (
            engine._llm.llm_engine.engine_core.engine_core.scheduler.encoder_cache_manager.cached
        )
        assert images
        engine.load_weights(case.case.model.state_dict().items(), policy_version=version)
        assert not images
        result = compare(engine.generate(requests, sampling()), hf.generate(requests, sampling()))
        assert result.different == [] and result.num_latents > 12
        assert result.latent_gap <= 1e-4 and result.log_prob_gap <= 1e-4, result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("lvr_head.ln_q.weight"),
            r"weights were not sent; got \['lvr_head.ln_q.weight'\]",
        ),
        (
            lambda w: w.update(surprise=torch.zeros(1)),
            "surprise: weight does not fit.*a name of the model",
        ),
        (lambda w: w.update({"lm_head.weight": torch.zeros(3)}), r"lm_head.weight.*\(3,\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_any_is_loaded(cases, engine, change, message):
    request = cases[0].requests(1)
    before = engine.generate(request, sampling())
    weights = dict(cases[1].case.model.state_dict())
    change(weights)
    with pytest.raises(CheckpointError, match=message):
        engine.load_weights(weights.items(), policy_version=9)
    assert compare(engine.generate(request, sampling()), before).different == []


def test_requests_that_cannot_be_served_are_refused(cases, engine):
    request = cases[0].requests(1)[0]
    with pytest.raises(RolloutError, match="do not fit.*max_model_len"):
        engine.generate([request], sampling(max_new_tokens=128))
    override = type(request)(
        request.prompt_ids, [1], request.images, latent_override=LatentOverride(torch.zeros(2, 64))
    )
    with pytest.raises(RolloutError, match="latent_override.*engine hf"):
        engine.generate([override], sampling())


def test_a_failed_batch_leaves_the_engine_usable(cases, engine, monkeypatch):
    requests = cases[0].requests(8)
    expected = engine.generate(requests, sampling())
    step, num_steps = engine._llm.llm_engine.step, []

    def interrupted():
        num_steps.append(1)
        if len(num_steps) == 5:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(engine._llm.llm_engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(requests, sampling())
    monkeypatch.undo()
    assert compare(engine.generate(requests, sampling()), expected).different == []
    assert engine.stats["num_seats"] == 0


def continuation(case, engine):
    """A prompt whose ids are another request's prompt *and completion*, placeholders included."""
    for idx in range(1, 64, 2):  # text-only
        request = case.requests(1, first=idx)[0]
        if len(request.prompt_ids) <= 32:
            continue
        trajectory = engine.generate([request], sampling(max_new_tokens=60))[0][0]
        ids = torch.cat([trajectory.prompt_ids, trajectory.token_ids])
        first_latent = len(request.prompt_ids) + int(trajectory.latent_mask.int().argmax())
        # a whole block of the prompt, and a whole block after it that holds latents
        if len(trajectory.latents) > 2 and len(ids) // 32 > first_latent // 32 + 1:
            return type(request)(ids[:-1], seeds=[0]), first_latent
    raise AssertionError("no such request")


def test_blocks_with_latents_are_never_shared(tmp_path, monkeypatch):
    """The same ids without the latents must not find the keys and values that the latents made."""
    case = build_vllm_case("qwen2", tmp_path)
    engine = case.vllm_engine(block_size=32)
    try:
        request, first_latent = continuation(case, engine)
        start = engine.stats["num_cached_tokens"]
        ours = engine.generate([request], sampling(max_new_tokens=8))
        assert (
            0 < engine.stats["num_cached_tokens"] - start <= first_latent
        )  # the prompt itself is still shared
        result = compare(ours, case.hf_engine().generate([request], sampling(max_new_tokens=8)))
        assert result.different == [] and result.log_prob_gap <= 1e-4
    finally:
        engine.close()


def test_without_our_scheduler_they_would_be(tmp_path, monkeypatch):
    """vLLM's own scheduler gives the wrong answer, which is why it is refused.

    The control of the test above.
    """
    from grpo_latent.rollout.vllm import supported, worker

    case = build_vllm_case("qwen2", tmp_path)
    stock = {False: "vllm.v1.core.sched.scheduler.Scheduler"}
    monkeypatch.setattr("grpo_latent.rollout.vllm.frontend.SCHEDULER_CLASSES", stock)
    with pytest.raises(ConfigError, match="latents need their own scheduler"):
        case.vllm_engine(block_size=32)
    monkeypatch.setattr(supported, "SCHEDULER_CLASSES", stock)
    monkeypatch.setattr(worker, "check_vllm_config", supported.check_vllm_config)
    engine = case.vllm_engine(block_size=32)
    try:
        request, first_latent = continuation(case, engine)
        ours = engine.generate([request], sampling(max_new_tokens=8))
        assert engine.stats["num_cached_tokens"] > first_latent
        result = compare(ours, case.hf_engine().generate([request], sampling(max_new_tokens=8)))
        assert result.different or result.log_prob_gap > 1e-2
    finally:
        engine.close()
