"""The trainer's measurement of use, with a server that answers what it is told.

Gradient norms against autograd.
"""

import asyncio
import io
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import engine_helpers as helpers
import numpy as np
import pytest
import ray
import torch
from omegaconf import OmegaConf
from torch import nn

from grpo_latent.common.settings import build
from grpo_latent.errors import ConfigError
from grpo_latent.eval.prompts import encode_row
from grpo_latent.eval.scoring import RewardScorer
from grpo_latent.eval.usage import Usage, UsageProbe, UsageSettings
from grpo_latent.models.injection import LatentInjector
from grpo_latent.models.loading import load_latent_model
from grpo_latent.rewards.functions import specs_from_config
from grpo_latent.rewards.runner import RewardRunner
from grpo_latent.trajectory import PositionKind as K
from grpo_latent.verl_plugin.boot.registration import VLLM_ROLLOUT_NAME
from grpo_latent.verl_plugin.rollout.server import LatentRolloutServer
from grpo_latent.verl_plugin.trainer import latent_watch as usage
from grpo_latent.verl_plugin.trainer import usage_server
from grpo_latent.verl_plugin.trainer.latent_watch import LatentWatch, as_metrics
from grpo_latent.verl_plugin.worker import gradients
from grpo_latent.verl_plugin.worker.gradients import InputGradients


class Server:
    """Stands in for a rollout server; `verdicts` are its answers in turn."""

    def __init__(self, verdicts):
        self.asked, self.verdicts = [], iter(verdicts)
        self.measure_usage = SimpleNamespace(remote=self._measure)

    def _measure(self, request, is_start):
        self.asked.append((is_start, [row for row, _ in request.rows]))
        verdict = next(self.verdicts)
        return Usage({"gap/shuffle": 0.01, "own_accuracy": 0.9}, verdict, f"{verdict}: because")


def make_watch(monkeypatch):
    monkeypatch.setattr(usage.ray, "get", lambda reference: reference)
    monkeypatch.setattr(usage.ray, "put", lambda value: value)
    monkeypatch.setattr(usage, "reward_settings", lambda config: {"functions": []})
    trainer, data = (
        SimpleNamespace(default_local_dir="x"),
        SimpleNamespace(max_response_length=8),
    )
    options = SimpleNamespace(usage={"num_prompts": 4, "ablations": ["shuffle"]}, output_dir="out")
    return LatentWatch(SimpleNamespace(data=data, trainer=trainer), options)


def test_the_same_rows_are_measured_each_time(monkeypatch):
    watch, server = make_watch(monkeypatch), Server(["used", "not used", "used"])
    rows = [{"row": i} for i in range(9)]
    found = [watch.measure(nullcontext(server), rows, is_start=i == 0) for i in range(3)]
    assert [usage.verdict for usage in found] == ["used", "not used", "used"]
    assert server.asked == [(i == 0, rows[:4]) for i in range(3)]


def test_nothing_is_measured_without_prompts(monkeypatch):
    watch = make_watch(monkeypatch)
    watch.settings = UsageSettings(num_prompts=0)
    assert watch.measure(nullcontext(Server([])), [], False) is None


def test_names_in_the_log():
    names = as_metrics(
        Usage({"gap/zero@text": 0.5, "own_accuracy": 1.0, "drift_cosine": 0.9, "norm_mean": 2.0})
    )
    expected = {"latent/usage_gap/zero@text": 0.5, "latent/usage_own_accuracy": 1.0}
    assert names == expected | {"latent/drift_cosine": 0.9, "latent/usage_norm_mean": 2.0}


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (UsageSettings, {"ablations": ["lobotomy"]}, "unknown ablation"),
        (UsageSettings, {"prompts_per_batch": 0}, "latent.usage.prompts_per_batch"),
        (UsageSettings, {"prompts": 3}, "latent.x: unknown key"),
    ],
)
def test_unusable_settings_are_named(kind, values, message):
    with pytest.raises(ConfigError, match=message):
        build(kind, values, "latent.x")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.mix = nn.Embedding(7, 4), nn.Linear(4, 4)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, ids):
        return self.mix(self.embedding(ids)).tanh().cumsum(1)


def test_gradient_norms_of_inputs_against_autograd():
    """Latents in the place of embeddings.

    Norms by an explicit gradient with respect to the whole input. A chosen image embedding is
    no latent.
    """
    torch.manual_seed(0)
    model, ids = Model(), torch.tensor([[1, 2, 3, 4], [5, 6, 0, 1]])
    injector, watched = LatentInjector.install(model), InputGradients(model)
    kinds = torch.tensor(
        [[K.PROMPT, K.LATENT, K.TEXT, K.TEXT], [K.PROMPT, K.START, K.SELECTED, K.FORCED]]
    )
    latents, report = torch.randn(2, 4), {}
    is_latent = (kinds == K.LATENT) | (kinds == K.SELECTED)
    watched.watch(kinds)
    with injector.inject(is_latent, latents):
        loss = model(ids).square().sum()
    watched.close(report)
    assert report == {gradients.LATENT: 0.0, gradients.TEXT: 0.0}
    loss.backward()
    inputs = (
        model.embedding(ids)
        .detach()
        .masked_scatter(is_latent[..., None], latents)
        .requires_grad_()
    )
    model.mix(inputs).tanh().cumsum(1).square().sum().backward()
    norms = inputs.grad.norm(dim=-1)
    assert report[gradients.LATENT] == pytest.approx(float(norms[0, 1]), rel=1e-5)
    assert report[gradients.TEXT] == pytest.approx(
        float((norms[0, 2] + norms[0, 3] + norms[1, 1]) / 3), rel=1e-5
    )
    metrics = {f"actor/{name}": value for name, value in report.items()}
    gradients.rename(metrics)
    assert metrics["latent/grad_norm_ratio"] == pytest.approx(
        report[gradients.LATENT] / report[gradients.TEXT]
    )
    model(ids)  # not watched: nothing to report, nothing to fail


REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info):
    return {"score": float(len(solution_str.split()) % 2), "accuracy": float(len(solution_str.split()) % 2)}
"""


def test_a_server_measures_its_current_weights(tmp_path, monkeypatch):
    """The server itself, without Ray, measures what a probe of ours does on the same rows.

    Before and after new weights are loaded; drift is from the first measurement.
    """
    folder = helpers.make_checkpoint(tmp_path / "model")
    server = LatentRolloutServer(
        folder, {"dtype": "float32", "custom": {"latent": {}}}, 0, "cpu", "sdpa"
    )
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [row | {"extra_info": {"index": i}} for i, row in enumerate(tiny_rows(6))]
    monkeypatch.setattr(usage.ray, "get", lambda value: value)
    request = usage.UsageRequest(
        UsageSettings(num_prompts=6, ablations=("shuffle", "zero")),
        [(row, f"row {i}") for i, row in enumerate(rows)],
        12,
        {"functions": [{"path": str(tmp_path / "reward.py"), "name": "compute_score"}]},
        str(tmp_path / "start.safetensors"),
    )
    first = asyncio.run(server.measure_usage(request, True))
    assert first.metrics["drift_relative"] == 0.0 and {"gap/shuffle", "gap/zero"} <= set(
        first.metrics
    )
    weights = {name: tensor.clone() for name, tensor in server.engine.model.state_dict().items()}
    weights["model.language_model.norm.weight"] *= 1.5
    monkeypatch.setattr("grpo_latent.verl_plugin.rollout.server.ray.get", lambda bucket: bucket)
    asyncio.run(server.load_weights([list(weights.items())], 1))
    second = asyncio.run(server.measure_usage(request, False))
    assert second.metrics["drift_relative"] > 0.1

    moved = load_latent_model(folder)
    moved.model.load_state_dict(weights)
    prompts = [encode_row(row, "", moved, str(i)) for i, row in enumerate(rows)]
    with RewardRunner(specs_from_config(request.reward["functions"])) as runner:
        scorer = RewardScorer(runner, moved)
        ours = UsageProbe(
            moved, prompts, scorer, request.settings, 12, Path(request.reference)
        ).measure()
    assert ours.metrics == pytest.approx(second.metrics, rel=1e-5)


JUDGE = """
def compute_score(data_source, solution_str, ground_truth, extra_info, reward_router_address, reward_model_tokenizer):
    assert reward_router_address == "10.0.0.1:8000"
    return float(bool(reward_model_tokenizer.encode("read")))
"""


def test_the_probes_rewards_reach_the_judge_as_trainings_do(tmp_path, monkeypatch):
    """The request that a trainer makes, served by a server without Ray."""
    folder = helpers.make_checkpoint(tmp_path / "model")
    (tmp_path / "judge.py").write_text(JUDGE)
    custom = {"path": str(tmp_path / "judge.py"), "name": "compute_score"}
    reward = {
        "custom_reward_function": custom,
        "reward_model": {"enable": True, "model_path": folder},
    }
    data, trainer = {"max_response_length": 8}, {"default_local_dir": str(tmp_path)}
    config = OmegaConf.create({"reward": reward, "data": data, "trainer": trainer})
    monkeypatch.setattr(usage.ray, "get", lambda value: value)
    monkeypatch.setattr(usage.ray, "put", lambda value: value)
    options = SimpleNamespace(usage={"num_prompts": 2}, output_dir=tmp_path)
    server = LatentRolloutServer(
        folder, {"dtype": "float32", "custom": {"latent": {}}}, 0, "cpu", "sdpa"
    )
    measure = SimpleNamespace(remote=lambda *args: asyncio.run(server.measure_usage(*args)))
    holding = nullcontext(SimpleNamespace(measure_usage=measure))
    rows = [row | {"extra_info": {"index": i}} for i, row in enumerate(tiny_rows(2))]
    found = LatentWatch(config, options).measure(holding, rows, True, "10.0.0.1:8000")
    assert as_metrics(found)["latent/usage_own_accuracy"] == 1.0


class OwnServer:
    """Stands in for a usage server of its own; `log` is what was asked of it."""

    def __init__(self, log, dies=False):
        self.log, self.dies = log, dies
        self.sleep = SimpleNamespace(remote=self._sleep)

    def _sleep(self):
        self.log.append("sleep")
        if self.dies:
            raise ray.exceptions.RayActorError()
        return "asleep"


@pytest.mark.parametrize(
    "fails_at",
    [
        "never",
        "weights",
        "measuring",
        "measuring, and the server dies",
        "measuring, and the server hangs",
    ],
)
def test_a_server_of_its_own_sleeps_again_whatever_happens(monkeypatch, fails_at):
    log = []

    def send_weights_to(server, version):
        log.append(f"weights {version}")
        if fails_at == "weights":
            raise RuntimeError("weights")

    def get(value, timeout=None):
        # after a failure nobody waits without an end
        assert value != "asleep" or (timeout is None) == (fails_at == "never")
        if value == "asleep" and fails_at.endswith("hangs"):
            raise ray.exceptions.GetTimeoutError()
        return value

    monkeypatch.setattr(usage_server.ray, "get", get)
    rollout = SimpleNamespace(name=VLLM_ROLLOUT_NAME)
    config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=rollout, model=None))
    held = usage_server.UsageServer(config, SimpleNamespace(send_weights_to=send_weights_to), [])
    held._own = OwnServer(log, dies=fails_at.endswith("dies"))
    expected = (
        nullcontext() if fails_at == "never" else pytest.raises(RuntimeError, match=fails_at[:7])
    )
    with expected, held.holding(3):
        log.append("measure")
        if fails_at.startswith("measuring"):
            raise RuntimeError("measuring")
    assert log == ["weights 3", *(["measure"] if fails_at != "weights" else []), "sleep"]


def tiny_rows(num):
    from PIL import Image

    rows = []
    for i in range(num):
        buffer = io.BytesIO()
        Image.fromarray(
            np.random.default_rng(i).integers(0, 255, (28, 28, 3), dtype=np.uint8)
        ).save(buffer, "PNG")
        prompt = [{"role": "user", "content": "read red ? <image>" if i % 2 else "read <image>"}]
        truth = {"style": "rule", "ground_truth": "1"}
        images = [{"bytes": buffer.getvalue(), "path": None}]
        rows.append(
            {
                "data_source": "tiny",
                "prompt": prompt,
                "images": images,
                "ability": "x",
                "reward_model": truth,
            }
        )
    return rows
