"""Decoding in fixed shapes: equal to decoding that grows; what it waits for; what it captures.

It is made for CUDA and runs here on the CPU: waits are counted at the calls that would wait there,
a graph is played by an object that holds a step to the addresses that it was captured at.

Not covered: CUDA itself (streams, pinned copies, what a real capture refuses).
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_latent.errors import ConfigError
from grpo_latent.latent.mechanisms import MECHANISMS
from grpo_latent.latent.treatments import parse_treatment
from grpo_latent.models import kv_rooms
from grpo_latent.rollout import progress
from grpo_latent.rollout.decoding import DecodingBatch
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.rollout.protocol import LatentOverride, SamplingParams
from grpo_latent.rollout.steps import StaticSteps
from grpo_latent.testing.cases import build_case

LVR = dict(steps=3)
# mechanism, backbone, settings, treatment
CASES = {
    "lvr": ("lvr", "qwen2_5_vl", LVR, "mask"),
    "latents_only": ("lvr", "qwen2_5_vl", LVR | dict(visibility="latents_only"), "mask"),
    "end token": ("lvr", "qwen3", dict(steps=4, exit="end_token"), "mask"),
    "end vector": (
        "lvr",
        "qwen3",
        dict(steps=4, exit="latent_end", latent_end_token="<|lvr_latent_end|>"),
        "mask",
    ),
    "sampled end": ("lvr", "qwen3", LVR | dict(span_end="sampled"), "mask"),
    "at start": ("lvr", "qwen3", LVR | dict(first_latent="at_start"), "mask"),
    "forced start": ("lvr", "qwen3", LVR | dict(start="forced", start_is_action=False), "mask"),
    "bounded, head": ("lvr", "qwen3", LVR | dict(max_spans=1, head="mlp"), "mask"),
    "ilvr": ("ilvr", "qwen2_5_vl", LVR, "mask"),
    "ivt_lr": ("ivt_lr", "qwen2_5_vl", dict(steps=2, top_k_image=2), "mask"),
    "coconut": ("coconut", "qwen3", LVR, "mask"),
    "hybrid_gate": ("hybrid_gate", "qwen3", dict(answer_token="<answer>"), "mask"),
    "gaussian": ("lvr", "qwen3", LVR, "gaussian"),
    "gumbel_soft": ("lvr", "qwen3", LVR, "gumbel_soft"),
    "vmf": ("lvr", "qwen3", LVR, "vmf"),
}


def case_of(name):
    mechanism, backbone, settings, treatment_name = CASES[name]
    c = build_case(MECHANISMS[mechanism], backbone, settings)
    treatment, _ = parse_treatment({"name": treatment_name})
    treatment.attach(c.model)
    return c, treatment


def engine_of(c, treatment=None, decoding="static"):
    banned = set(range(len(c.tokenizer))) - c.sampled_ids
    return HFRolloutEngine(
        c.model, c.mechanism, [c.eos_id], banned, treatment=treatment, decoding=decoding
    )


def sampling(length=40, temperature=2.0):
    return SamplingParams(length, temperature=temperature)


def assert_equal(first, second, atol):
    """`atol` is for another order of summation over keys that a bias hides."""
    for group, other in zip(first, second, strict=True):
        for a, b in zip(group, other, strict=True):
            assert torch.equal(a.token_ids, b.token_ids) and torch.equal(a.kinds, b.kinds)
            assert a.stop_reason == b.stop_reason
            for field in ("latents", "latent_aux", "rollout_log_probs", "sampling_log_probs"):
                torch.testing.assert_close(getattr(a, field), getattr(b, field), rtol=0, atol=atol)


@pytest.mark.parametrize("temperature", [2.0, 0.0])
@pytest.mark.parametrize("name", CASES)
def test_fixed_shapes_decode_what_growing_ones_do(monkeypatch, name, temperature):
    """Over several rooms, while rows stop and are dropped."""
    monkeypatch.setattr(kv_rooms, "MIN_ROOM", 16)
    c, treatment = case_of(name)
    if (
        name == "gumbel_soft"
    ):  # at temperature 0.1 a mixture has ten times its logits' rounding, a position
        c.model.double()
    fixed = engine_of(c, treatment).generate(c.requests, sampling(temperature=temperature))
    growing = engine_of(c, treatment, "growing")
    assert_equal(fixed, growing.generate(c.requests, sampling(temperature=temperature)), 1e-4)
    assert sum(len(t.latents) for group in fixed for t in group) > 10, "latents, or no test"


@pytest.mark.parametrize("fields", [{"latent_override": None}, {"blind_after_span": True}])
def test_ablations_decode_in_fixed_shapes(fields):
    c, _ = case_of("lvr")
    if "latent_override" in fields:
        vectors = torch.randn(5, c.adapter.hidden_size, generator=torch.Generator().manual_seed(1))
        fields = {"latent_override": LatentOverride(vectors)}
    requests = [dataclasses.replace(request, **fields) for request in c.requests]
    groups = [engine_of(c, None, how).generate(requests, sampling()) for how in ("static", None)]
    assert_equal(*groups, atol=1e-4)


# ---- waits --------------------------------------------------------------------------------------

READS = ("cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__", "__index__")


class Reads(TorchFunctionMode):
    """Counts calls in Python that hand a tensor's content to the host, or a number to a device.

    `torch.where` with a number in it copies that number to the device, and waits.
    """

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in READS:
            self.counts[name] += 1
        if name == "where" and any(not isinstance(arg, torch.Tensor) for arg in args):
            self.counts["where with a number"] += 1
        return function(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Counts operators whose result has a shape, or a value, that the host must be told."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2")

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.NAMES:
            self.counts[name] += 1
        if name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            self.counts[f"{name} by a mask"] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def waits_of_steps(monkeypatch):
    """A count for each `choose` and `forward`, and how many late reads each made."""
    counts, late = [], []
    inner = progress.LateFlags.read

    def read(self):
        late[-1] += 1
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            return inner(self)

    monkeypatch.setattr(progress.LateFlags, "read", read)

    def counted(method):
        def call(batch, *args):
            counts.append(Counter())
            late.append(0)
            with Reads(counts[-1]), Waits(counts[-1]):
                return method(batch, *args)

        return call

    for name in ("choose", "forward"):
        monkeypatch.setattr(DecodingBatch, name, counted(getattr(DecodingBatch, name)))
    return counts, late


@pytest.mark.parametrize(
    "name",
    [name if name in MECHANISMS else pytest.param(name, marks=pytest.mark.long) for name in CASES],
)
def test_a_step_waits_for_nothing_but_one_late_read(waits_of_steps, name):
    counts, late = waits_of_steps
    c, treatment = case_of(name)
    engine_of(c, treatment).generate(c.requests, sampling(24))
    assert len(counts) > 10
    assert sum(counts, Counter()) == {}
    # the last has what is read behind the last step, too
    assert late[0] == 0 and set(late[:-1]) == {0, 1}


def test_the_count_sees_what_waits(waits_of_steps):
    """A control: decoding that grows picks rows by index, and asks at each step."""
    counts, _ = waits_of_steps
    c, _ = case_of("lvr")
    engine_of(c, None, "growing").generate(c.requests, sampling(24))
    total = sum(counts, Counter())
    assert total["nonzero"] > 24 and total["__int__"] + total["_local_scalar_dense"] > 20, total
    mask = torch.tensor([True, False])
    seen = Counter()
    with Reads(seen), Waits(seen):
        mask.float()[mask]
        torch.where(mask, 1, 0)
        mask.tolist()
    assert {"index by a mask", "where with a number", "tolist"} <= set(seen)


# ---- captures -----------------------------------------------------------------------------------


class FakeCapture:
    """Plays a graph: runs a step again at the addresses it was captured at, into one output."""

    def __init__(self, model, steps):
        self.model, self.steps = model, steps
        self.shapes = []

    def addresses(self):
        layer = self.steps._cache.layers[-1]
        parameters = [p.data_ptr() for p in self.model.parameters()]
        return layer.keys.shape, layer.keys.data_ptr(), layer.values.data_ptr(), *parameters

    def __call__(self, step):
        captured = self.addresses()
        self.shapes.append((captured[0][0], captured[0][2]))
        output = torch.zeros_like(step())

        def replay():
            assert self.addresses() == captured, "a graph over memory that has moved"
            return output.copy_(step())

        return replay


def captured_engine(monkeypatch, room=16):
    monkeypatch.setattr(kv_rooms, "MIN_ROOM", room)
    c, _ = case_of("lvr")
    engine = engine_of(c)
    engine.steps = StaticSteps(engine.adapter, None)
    engine.steps._capture = FakeCapture(c.model, engine.steps)
    return c, engine


def test_one_capture_a_shape_and_none_the_next_time(monkeypatch):
    c, engine = captured_engine(monkeypatch)
    first = engine.generate(c.requests, sampling())
    shapes = engine.steps._capture.shapes
    assert len(shapes) == len(set(shapes)) == engine.steps.num_captures > 3
    assert {rows for rows, _ in shapes} >= {18, 8}, "rows drop to powers of two"
    assert_equal(engine.generate(c.requests, sampling()), first, atol=0)
    assert engine.steps.num_captures == len(shapes)
    assert_equal(engine_of(c, None, "growing").generate(c.requests, sampling()), first, atol=1e-4)


def test_new_weights_in_place_need_no_capture_and_moved_ones_do(monkeypatch):
    c, engine = captured_engine(monkeypatch)
    engine.generate(c.requests, sampling(8))
    shapes = engine.steps._capture.shapes
    weights = {name: value * 1.5 for name, value in c.model.state_dict().items()}
    engine.load_weights(weights.items(), 1)
    changed = engine.generate(c.requests, sampling(8))
    assert len(shapes) == len(set(shapes)), "no shape again; others, as rows end elsewhere"
    assert_equal(engine_of(c, None, "growing").generate(c.requests, sampling(8)), changed, 1e-4)
    norm = next(p for name, p in c.model.named_parameters() if "norm" in name)
    norm.data = norm.data.clone() * 2
    moved = engine.generate(c.requests, sampling(8))
    assert len(shapes) > len(set(shapes))
    assert_equal(engine_of(c, None, "growing").generate(c.requests, sampling(8)), moved, 1e-4)


def test_sleep_gives_up_graphs_and_memory(monkeypatch):
    c, engine = captured_engine(monkeypatch)
    engine.generate(c.requests, sampling(8))
    before = engine.steps.num_captures
    engine.move_to("cpu")
    assert engine.steps._cache is None and not engine.steps._captured
    engine.generate(c.requests, sampling(8))
    assert engine.steps.num_captures == 2 * before


def test_a_larger_batch_moves_the_memory_and_captures_anew(monkeypatch):
    c, engine = captured_engine(monkeypatch)
    engine.generate(c.requests[:1], sampling(8))
    small = engine.steps._capture.shapes[:]
    engine.generate(c.requests, sampling(8))
    again = engine.generate(c.requests[:1], sampling(8))
    assert engine.steps._capture.shapes[-1] in small, "captured again where memory has moved"
    growing = engine_of(c, None, "growing").generate(c.requests[:1], sampling(8))
    assert_equal(growing, again, atol=1e-4)


def test_nothing_that_an_earlier_batch_left_is_read(monkeypatch):
    """NaN in all keys and values: a hidden one would spoil every sum by its weight of 0."""
    c, engine = captured_engine(monkeypatch)
    first = engine.generate(c.requests, sampling(12))
    for stretch in engine.steps._cache._stretches:
        for flat in stretch:
            flat.fill_(torch.nan)
    assert_equal(engine.generate(c.requests, sampling(12)), first, atol=0)


def test_engines_of_one_model_share_static_steps_and_graphs_need_cuda():
    c, _ = case_of("lvr")
    assert engine_of(c).steps is engine_of(c).steps
    with pytest.raises(ConfigError, match="graphs are CUDA's"):
        engine_of(c, None, "graphs")
    with pytest.raises(ConfigError, match="decoding"):
        engine_of(c, None, "fast")
