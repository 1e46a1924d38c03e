"""Checks of what a mechanism stores and learns, and of its ablations.

Legend: K vectors, H hidden, P parameters.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from grpo_latent.latent.mechanisms import Mechanism, load_mechanism
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import load_latent_model, save_latent_model
from grpo_latent.models.replay import replay_hidden
from grpo_latent.models.sequences import LatentSequences, collate
from grpo_latent.rollout.protocol import LatentOverride
from grpo_latent.testing.cases import Case, Recorded, recorded
from grpo_latent.testing.compare import (
    loss_of,
    replayed,
    require,
    require_equal_rows,
    require_replay,
)
from grpo_latent.trajectory import Trajectory, is_start

GRADIENT_ROWS = 6  # each parameter costs six forwards over them, in float64


def check_saves(case: Case) -> str | None:
    """Settings and parameters come back from a folder, and roll out the same.

    Loading leaves the folder as it was.
    """
    mechanism = case.mechanism
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mechanism.save(folder)
        _require_settings(load_mechanism(folder), mechanism, "latent_config.json")
    head = case.model.get_output_embeddings()
    bias_V = head.bias
    head.bias = None  # what makes spans frequent; no published model has it, so none would load it
    try:
        with tempfile.TemporaryDirectory() as name:
            save_latent_model(name, case.model, case.tokenizer, case.processor, mechanism)
            before = _digests(Path(name))
            again = load_latent_model(name)
            require(
                _digests(Path(name)) == before,
                "loading a folder changes it",
                expected="an untouched folder",
            )
            _require_settings(again.mechanism, mechanism, "the mechanism of a saved model")
            own, other = case.model.state_dict(), again.model.state_dict()
            differ = [
                n
                for n in own.keys() | other.keys()
                if n not in own or n not in other or own[n].ne(other[n]).any()
            ]
            require(
                not differ,
                "weights come back otherwise",
                got=sorted(differ)[:5],
                expected="the same to the bit",
            )
            loaded = replace(case, model=again.model, tokenizer=again.tokenizer)
            for first, second in zip(
                case.generate(case.requests), loaded.generate(case.requests), strict=True
            ):
                for a, b in zip(first, second, strict=True):
                    require_equal_rows(b, a, "the loaded folder rolls out otherwise")
    finally:
        head.bias = bias_V
    return None


def _require_settings(found: Mechanism, saved: Mechanism, what: str) -> None:
    require(found == saved, f"{what} comes back otherwise", got=found, expected=repr(saved))


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def check_gradients(case: Case) -> str | None:
    """The parameters of `attach` get the gradient that finite differences give.

    Through what is composed and made.
    """
    prefixes = case.mechanism.parameter_prefixes
    names = [
        name for name, _ in case.model.named_parameters() if prefixes and name.startswith(prefixes)
    ]
    if not names:
        return "the mechanism has no parameters"
    model = copy.deepcopy(case.model).double().requires_grad_(False)
    adapter = ModelAdapter(model, case.mechanism)
    rows = [i for i, t in enumerate(case.recorded.trajectories) if len(t.latents)][:GRADIENT_ROWS]
    trajectories = [case.recorded.trajectories[i] for i in rows]
    images = [case.recorded.images[i] for i in rows]
    sequences = collate(trajectories, images, adapter, case.mechanism.visibility)
    sequences = sequences.with_latents(sequences.latents_NH.double())
    ways = {
        "composes": lambda: loss_of(adapter, sequences),
        "makes": lambda: loss_of(adapter, _made_anew(adapter, sequences)),
    }
    for name in names:
        parameter = model.get_parameter(name)
        parameter.requires_grad_(True)
        for way, loss in ways.items():
            _require_gradient(name, parameter, way, loss)
        parameter.requires_grad_(False)
    return None


def _made_anew(adapter: ModelAdapter, sequences: LatentSequences) -> LatentSequences:
    """Makes latents by one forward over the recorded ones."""
    made_MH = adapter.make(replay_hidden(adapter, sequences)[sequences.sources(adapter.mechanism)])
    places_M = sequences.is_made_N.nonzero()[:, 0]
    return sequences.with_latents(sequences.latents_NH.index_copy(0, places_M, made_MH))


def _require_gradient(
    name: str, parameter: nn.Parameter, way: str, loss: Callable[[], Tensor]
) -> None:
    """Compares along the gradient, or in a random direction where there is none."""
    value = loss()
    gradient = None
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value, [parameter], allow_unused=True)
    size = 0.0 if gradient is None else float(gradient.norm())
    generator = torch.Generator().manual_seed(0)
    direction = gradient
    if direction is None or size == 0:
        direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    direction = direction / direction.norm()
    step = 1e-3 * max(float(parameter.detach().norm()), 1.0)
    difference = _difference(parameter, direction, step, loss)
    # norms of Hugging Face's models compute in float32 whatever the weights are: the loss is exact
    # to 1e-7 only
    tolerance = 0.01 * max(size, abs(difference)) + 5e-7 / step
    require(
        abs(difference - size) <= tolerance,
        f"a gradient that finite differences do not confirm: {name}",
        got=f"gradient {size:.4g}, difference {difference:.4g}, where the mechanism {way}",
        expected=f"equal within {tolerance:.2g}",
        fix="Without gradient: detach nothing in make and compose, and use no .data or no_grad.",
    )


@torch.no_grad()
def _difference(
    parameter: nn.Parameter, direction: Tensor, step: float, loss: Callable[[], Tensor]
) -> float:
    values = []
    for sign in (1, -1):
        parameter.add_(direction, alpha=sign * step)
        values.append(float(loss()))
        parameter.add_(direction, alpha=-sign * step)
    return (values[0] - values[1]) / (2 * step)


def check_ablations(case: Case) -> str | None:
    """Overridden vectors are fed, recorded and replayed, and matter.

    Requests without latents have none.
    """
    own = case.recorded.trajectories
    donor = max(own, key=lambda trajectory: len(trajectory.latents))
    for name, vectors_KH in (
        ("zero", torch.zeros_like(donor.latents[:1])),
        ("shuffle", donor.latents),
    ):
        made = _generate(case, {"latent_override": LatentOverride(vectors_KH)})
        for trajectory in made.trajectories:
            if not len(trajectory.latents):
                continue
            given_NH = vectors_KH[torch.arange(len(trajectory.latents)) % len(vectors_KH)]
            gap = float((trajectory.latents - given_NH).abs().max())
            require(
                gap <= 1e-5,
                f"ablation {name} records other vectors than it feeds",
                got=f"{gap:.3g} beside them",
            )
        what = f"trajectories under ablation {name} replay otherwise"
        require_replay(case, made.trajectories, case.collate(made), what)
    _require_matter(case)
    for name, fields in (
        ("no_span", case.mechanism.requests_without_latents()),
        ("markers_only", case.mechanism.requests_with_markers_only()),
    ):
        if fields is None:
            continue
        made = _generate(case, fields)
        require_replay(
            case,
            made.trajectories,
            case.collate(made),
            f"trajectories under ablation {name} replay otherwise",
        )
        for trajectory in made.trajectories:
            _require_without_latents(name, trajectory)
    return None


def _generate(case: Case, fields: dict) -> Recorded:
    """Rolls out the case's requests with some of their fields replaced."""
    requests = [replace(request, **fields) for request in case.requests]
    return recorded(requests, case.generate(requests))


def _require_matter(case: Case) -> None:
    """Requires that the recorded vectors are read: zeros in their place move a log-prob."""
    sequences = case.collate()
    trajectories = case.recorded.trajectories
    zeroed = sequences.with_latents(torch.zeros_like(sequences.latents_NH))
    pairs = zip(
        replayed(case, trajectories, sequences), replayed(case, trajectories, zeroed), strict=True
    )
    moved = max(float((a - b).abs().max()) for a, b in pairs)
    require(
        moved > 1e-3,
        "zeros in place of the recorded vectors change nothing",
        got=f"{moved:.2g} nats",
    )


def _require_without_latents(name: str, trajectory: Trajectory) -> None:
    count = int(trajectory.recorded_mask.sum())
    require(
        count == 0,
        f"a completion under ablation {name} has recorded vectors",
        got=count,
        expected="none",
    )
    if name == "no_span":
        opened = int(is_start(trajectory.kinds).sum())
        require(
            opened == 0,
            "a completion under ablation no_span opens a span",
            got=opened,
            expected="none",
        )


def check_refusals(case: Case) -> str | None:
    """What an engine cannot run is said in full; engine `hf` runs everything."""
    mechanism = case.mechanism
    require(
        mechanism.refusals("hf") == [],
        "engine hf refuses a setting",
        got=mechanism.refusals("hf"),
        expected="[]",
    )
    for refusal in mechanism.refusals("vllm"):
        value = (
            mechanism.key()
            if refusal.setting == "mechanism"
            else getattr(mechanism, refusal.setting, None)
        )
        said = bool(refusal.why) and refusal.expected != refusal.got
        require(
            said and refusal.got == value,
            "a refusal that does not say what is wrong",
            got=refusal,
            expected="a setting, its value, another value and why",
        )
    return None
