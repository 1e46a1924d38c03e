"""Keeps blocks that hold a latent position out of the prefix cache: vLLM's schedulers, otherwise.

A block's hash covers token ids, and a latent position has a placeholder for one: two different
latent histories would share their blocks. Caching therefore stops at a request's first latent
position; the prompt before it stays shared, so that the trajectories of a group still prefill it
once.
"""

from __future__ import annotations

from collections.abc import Collection

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.rollout.vllm.skeleton import worker_options
from grpo_latent.trajectory import PositionKind

_SCAN_ATTRIBUTE = "_grpo_latent_scan"


class LatentScheduler(Scheduler):
    """For `async_scheduling=False`."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        latent_ids = ids_of_vectors(worker_options(self.vllm_config).mechanism)
        coordinator = self.kv_cache_manager.coordinator
        cache_blocks = coordinator.cache_blocks

        def cache_text_blocks(
            request: Request, num_computed_tokens: int, *args: object, **kwargs: object
        ) -> None:
            """Caches as before, with no more tokens than stand in front of the first latent."""
            first = first_latent(request, latent_ids)
            if first is not None:
                num_computed_tokens = min(num_computed_tokens, first)
            cache_blocks(request, num_computed_tokens, *args, **kwargs)

        # on this manager's own coordinator: whoever caches blocks goes through it
        coordinator.cache_blocks = cache_text_blocks


def ids_of_vectors(mechanism: Mechanism) -> frozenset[int]:
    """Ids that stand where a vector is fed.

    They are exact evidence after the prompt: the placeholder is never drawn, only put there by a
    span, and a token that opens one is fed as a vector wherever it stands, if at all.
    """
    latent_id = mechanism.placeholder_id(PositionKind.LATENT)
    return frozenset({latent_id}) | (
        mechanism.opening_ids if mechanism.feeds_start else frozenset()
    )


def first_latent(request: Request, latent_ids: Collection[int]) -> int | None:
    """Position of the request's first latent in the sequence, None while it has none."""
    # how far it was scanned is kept on the request: a scan from the prompt at each step would cost
    # the square of its length
    first, num_seen = getattr(request, _SCAN_ATTRIBUTE, (None, request.num_prompt_tokens))
    if first is None:
        token_ids = request.all_token_ids
        for position in range(num_seen, len(token_ids)):
            if token_ids[position] in latent_ids:
                first = position
                break
        setattr(request, _SCAN_ATTRIBUTE, (first, len(token_ids)))
    return first


class LatentAsyncScheduler(LatentScheduler, AsyncScheduler):
    """For `async_scheduling=True`."""
