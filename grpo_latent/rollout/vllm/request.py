"""What a request asks of the worker, in `SamplingParams.extra_args` of vLLM.

    rollouts      ──to_extra_args──▶ {"latent": {"key": …, "seed": …, …}} ─from_extra_args─▶ worker
    HTTP clients  {"latent_steps": 4}, which `middleware` has checked     ─from_extra_args─▶ worker

A request without a key is *served*: vLLM's own sampler draws its text, and no record of it is
kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from grpo_latent.rollout.vllm.middleware import STEPS_FIELD

_FIELD = "latent"
_MAX_STEPS = 2**31 - 1  # the state's columns are int32


@dataclass(frozen=True)
class RowSampling:
    """How a recorded request draws: values of `rollout.protocol.SamplingParams`."""

    temperature: float
    top_k: int
    top_p: float


@dataclass(frozen=True)
class LatentRequest:
    """One request as the worker sees it.

    Attributes:
        key: names the record that `latent_pop` returns; None of a served request.
        steps: latent steps a span; None for the checkpoint's.
        sampling: None of a served request.
        seed: of the trajectory.
    """

    key: str | None = None
    steps: int | None = None
    sampling: RowSampling | None = None
    seed: int = 0

    def to_extra_args(self) -> dict[str, dict[str, object]]:
        """What `from_extra_args` reads, of a request with a key and a sampling."""
        assert self.sampling is not None
        return {
            _FIELD: {
                "key": self.key,
                "seed": self.seed,
                "temperature": self.sampling.temperature,
                "top_k": self.sampling.top_k,
                "top_p": self.sampling.top_p,
                "steps": self.steps,
            }
        }

    @staticmethod
    def from_extra_args(extra_args: Mapping[str, object] | None) -> LatentRequest:
        """Reads what came with a request; what is not understood makes it a served one.

        A worker must outlive what clients send, so nothing raises here: it is a rollout's only if
        all that a rollout sends is there.
        """
        extra_args = extra_args or {}
        values = extra_args.get(_FIELD)
        names = ("temperature", "top_k", "top_p")
        if not isinstance(values, dict) or not {"key", "seed", *names} <= set(values):
            steps = extra_args.get(STEPS_FIELD)
            return LatentRequest(
                steps=min(max(steps, 1), _MAX_STEPS) if isinstance(steps, int) else None
            )
        return LatentRequest(
            values["key"],
            values.get("steps"),
            RowSampling(*(values[name] for name in names)),
            values["seed"],
        )
