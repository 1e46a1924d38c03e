"""LVR's latent spans (2509.24251 section 3): trigger, feedback, exit, for rows in different modes at the same step.

A row emits `start` as an ordinary token. From then on its inputs are h(start), then h of each latent step, until the
exit rule says so; then `end` is appended (FORCED). Nothing is sampled inside a span, so neither EOS nor any other token
can leave it early, and spans may repeat. Differs from the published code, which samples a discarded token at each latent
step and leaves `end` to the sampler: that derives masks from garbage ids and runs into endless `end` tokens.

The class holds the state of N rows and decides; it runs no model. `plan` says what each next position is, `advance`
records what was fed there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_latent.latent.config import LatentConfig
from grpo_latent.trajectory import PositionKind

UNBOUNDED = 2**62  # spans of a row without a bound


class SpanState:
    """Where each of N rows stands.

    Args:
        steps_N: int64 [N], latent steps (exit `steps`) or their cap a span; with 0, `end` follows on `start`.
        max_spans_N: int64 [N], spans that each row may open (`UNBOUNDED` for no bound); None for the config's.
    """

    def __init__(self, config: LatentConfig, steps_N: Tensor, max_spans_N: Tensor | None = None):
        self.config = config
        self.steps_N = steps_N
        self.max_spans_N: Tensor | int = UNBOUNDED if config.max_spans is None else config.max_spans
        self.is_bounded = config.max_spans is not None
        if max_spans_N is not None:
            self.max_spans_N, self.is_bounded = max_spans_N, bool((max_spans_N < UNBOUNDED).any())
        self.in_span_N = torch.zeros_like(steps_N, dtype=torch.bool)
        self.num_fed_N = torch.zeros_like(steps_N)
        self.num_spans_N = torch.zeros_like(steps_N)
        self.end_is_due_N = torch.zeros_like(self.in_span_N)

    def plan(self, logits_NV: Tensor | None) -> Tensor:
        """Kind of each row's next position, int64 [N]: LATENT, FORCED, or TEXT where a token is to be sampled.

        Args:
            logits_NV: of the last position; read by exit `end_token` only.
        """
        leaves_N = self.end_is_due_N.clone()
        if self.config.exit == "end_token":
            # a span has at least one latent step: the rule reads the logits of latent positions only
            says_end_N = logits_NV.argmax(-1) == self.config.end_id
            leaves_N |= self.in_span_N & (self.num_fed_N > 0) & says_end_N
        kinds_N = torch.where(self.in_span_N, int(PositionKind.LATENT), int(PositionKind.TEXT))
        return torch.where(leaves_N, int(PositionKind.FORCED), kinds_N)

    def advance(
        self, kinds_N: Tensor, token_ids_N: Tensor, latents_NH: Tensor | None, end_vector_H: Tensor | None
    ) -> Tensor:
        """Records what stands at the position that `plan` announced; returns its final kinds (TEXT may become START).

        Args:
            token_ids_N: sampled ids; read at TEXT positions only.
            latents_NH: [N, H], fed vectors; read at LATENT rows only, by exit `latent_end`.
            end_vector_H: the learned end vector of exit `latent_end`.
        """
        is_text_N = kinds_N == PositionKind.TEXT
        is_latent_N = kinds_N == PositionKind.LATENT
        opens_N = is_text_N & (token_ids_N == self.config.start_id)
        closes_N = kinds_N == PositionKind.FORCED
        self.num_fed_N += is_latent_N
        self.end_is_due_N = (is_latent_N & (self.num_fed_N >= self.steps_N)) | (opens_N & (self.steps_N == 0))
        if self.config.exit == "latent_end" and latents_NH is not None:
            distance_N = (latents_NH.float() - end_vector_H.float()).square().mean(-1)
            self.end_is_due_N |= is_latent_N & (distance_N < self.config.latent_end_threshold)
        self.in_span_N = (self.in_span_N | opens_N) & ~closes_N
        self.num_fed_N = torch.where(opens_N, 0, self.num_fed_N)
        self.num_spans_N += opens_N
        return torch.where(opens_N, int(PositionKind.START), kinds_N)

    @property
    def is_last_latent_N(self) -> Tensor:
        """bool [N], asked after `advance`: the position just fed is its span's last latent (exit `steps`)."""
        return self.end_is_due_N

    @property
    def may_open_N(self) -> Tensor:
        """bool [N], rows that may still open a span."""
        return self.num_spans_N < self.max_spans_N

    def keep_rows(self, rows_M: Tensor) -> None:
        for name in ("steps_N", "in_span_N", "num_fed_N", "num_spans_N", "end_is_due_N"):
            setattr(self, name, getattr(self, name)[rows_M])
        if isinstance(self.max_spans_N, Tensor):
            self.max_spans_N = self.max_spans_N[rows_M]
