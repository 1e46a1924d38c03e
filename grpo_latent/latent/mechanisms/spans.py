"""Latent spans (LVR, ILVR): rows are in different modes at the same step.

Sources: LVR 2509.24251 section 3, ILVR 2512.05665.

    token   … <start>  <latent>  <latent>  <end>    …
    kind      START    LATENT    LATENT    FORCED   TEXT
    input     e(start) h(start)  h         e(end)

A row emits `start` as an ordinary token. From then on its inputs are h(start), then h of each
latent step, until the exit says so; then `end` is appended (FORCED). Nothing is sampled inside a
span, so neither EOS nor any other token can leave it early, and spans may repeat.

That is what `span_end=forced` says, and how the papers put it. The published code of LVR leaves
the span's end to the sampler, `span_end=sampled`: after the last latent the row is text again, and
its model has learned to write the closing tokens (END).

    token   … <start>  <latent>  <latent>  <latent_end>  <end>   answer
    kind      START    LATENT    LATENT    END           END     TEXT

Differs from it in either case: it samples a discarded token at each latent step, and derives masks
from such ids.

Legend: N rows, M some of them, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from grpo_latent.errors import ConfigError
from grpo_latent.latent.mechanisms.fed_back import FedBack, check_choice, check_count, check_switch
from grpo_latent.latent.mechanisms.protocol import (
    CHECKPOINT_ONLY,
    UNBOUNDED,
    VISIBILITIES,
    Refusal,
)
from grpo_latent.latent.mechanisms.row_states import RowStates
from grpo_latent.trajectory import PositionKind

STEPS, END_TOKEN, LATENT_END = "steps", "end_token", "latent_end"
SPAN_ENDS = FORCED_END, SAMPLED_END = "forced", "sampled"
STARTS = EMITTED_START, FORCED_START = "emitted", "forced"
FIRST_LATENTS = AFTER_START, AT_START = "after_start", "at_start"


@dataclass(frozen=True)
class SpanMechanism(FedBack):
    """Spans that the model opens by emitting `start`.

    Attributes:
        exit: how a span ends: `steps` (after exactly `steps`); `end_token` (where the arg-max
            token at a latent position is the end, at `steps` at the latest); `latent_end` (the fed
            vector that is close to the learned end vector is the last, at `steps` at the latest).
        max_spans: spans that a completion may open, None for no bound; `start` cannot be sampled
            after the last one.
        span_end: who writes the closing token: `forced` (the mechanism does), or `sampled` (the
            model may; wherever it does, the token is no text).
        start: who opens a completion's first span: the model does (`emitted`), or the mechanism
            (`forced`), at the first position; that `start` is no action.
        first_latent: where a span's first latent stands: behind `start` (`after_start`), or at
            `start` itself (`at_start`): the hidden state that sampled it is fed in the place of
            its embedding.
        visibility, start_is_action, end_is_action: see `Mechanism`.
    """

    exit: str = STEPS
    max_spans: int | None = None
    visibility: str = "full"
    start_is_action: bool = True
    span_end: str = FORCED_END
    start: str = field(default=EMITTED_START, metadata=CHECKPOINT_ONLY)
    first_latent: str = field(default=AFTER_START, metadata=CHECKPOINT_ONLY)
    end_is_action: bool = True

    exits: ClassVar[tuple[str, ...]] = (STEPS, END_TOKEN)
    state_size: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("exit", self.exit, self.exits)
        check_choice("visibility", self.visibility, VISIBILITIES)
        check_switch("start_is_action", self.start_is_action)
        check_choice("span_end", self.span_end, SPAN_ENDS)
        check_choice("start", self.start, STARTS)
        check_choice("first_latent", self.first_latent, FIRST_LATENTS)
        check_switch("end_is_action", self.end_is_action)
        if self.start == FORCED_START and self.start_is_action:
            raise ConfigError(
                "a start that the mechanism writes is no action",
                where="latent.start_is_action",
                got="true with latent.start=forced",
                expected="false",
            )
        if self.first_latent == AT_START:
            self._check_at_start()
        if self.max_spans is not None:
            check_count("max_spans", self.max_spans, 0)
        if self.visibility == "latents_only" and self.exit != STEPS:
            # the last latent of a span must be known when it is fed (it is a blind row), which
            # only `steps` allows
            raise ConfigError(
                "visibility latents_only needs spans of known length",
                where="latent.exit",
                got=self.exit,
                expected=STEPS,
                fix="Set latent.exit=steps, or latent.visibility=full.",
            )

    def _check_at_start(self) -> None:
        for name, allowed in (("start", EMITTED_START), ("visibility", "full"), ("head", "none")):
            if getattr(self, name) != allowed:
                raise ConfigError(
                    "a latent at the start's own position is h itself, of an emitted start",
                    where=f"latent.{name}",
                    got=f"{getattr(self, name)} with latent.first_latent={AT_START}",
                    expected=allowed,
                )

    @property
    def opening_ids(self) -> frozenset[int]:
        return frozenset({self.start_id})

    @property
    def closing_ids(self) -> frozenset[int]:
        return frozenset({self.end_id}) if self.span_end == SAMPLED_END else frozenset()

    @property
    def feeds_start(self) -> bool:
        return self.first_latent == AT_START

    @property
    def end_kind(self) -> PositionKind:
        """Of the closing tokens of a row that SFT trains on."""
        return PositionKind.END if self.span_end == SAMPLED_END else PositionKind.FORCED

    def placeholder_id(self, kind: PositionKind) -> int:
        own = {PositionKind.FORCED: self.end_id, PositionKind.START: self.start_id}
        return own.get(kind, super().placeholder_id(kind))

    @property
    def reads_logits(self) -> bool:
        return self.exit == END_TOKEN

    def begin(
        self, model: nn.Module, steps_N: Tensor, max_spans_N: Tensor | None = None
    ) -> SpanRows:
        return SpanRows(self, steps_N, max_spans_N)

    def requests_without_latents(self) -> dict:
        return {"max_spans": 0}

    def requests_with_markers_only(self) -> dict | None:
        # a start that is fed as a vector is a latent itself
        return None if self.feeds_start else {"steps": 0}


def span_refusals(mechanism: SpanMechanism, engine: str) -> list[Refusal]:
    """What `engine` cannot run of spans; not a method, as a subclass may differ in more."""
    if engine == "hf" or mechanism.visibility == "full":
        return []
    why = "vLLM's kernels take no custom attention mask"
    return [Refusal("visibility", mechanism.visibility, "full", why)]


class SpanRows(RowStates):
    """Where each of N rows stands in its spans.

    Args:
        steps_N: int64 [N], latent steps (exit `steps`) or their cap a span; with 0, `end` follows
            on `start`.
        max_spans_N: int64 [N], spans that each row may open (`UNBOUNDED` for no bound); None for
            the mechanism's.
    """

    def __init__(
        self, mechanism: SpanMechanism, steps_N: Tensor, max_spans_N: Tensor | None = None
    ):
        self.mechanism = mechanism
        self.steps_N = steps_N
        self.max_spans_N: Tensor | int = (
            UNBOUNDED if mechanism.max_spans is None else mechanism.max_spans
        )
        self.is_bounded = mechanism.max_spans is not None
        if max_spans_N is not None:
            self.max_spans_N = max_spans_N
            self.is_bounded = bool((max_spans_N < UNBOUNDED).any())
        self.in_span_N = torch.zeros_like(steps_N, dtype=torch.bool)
        self.num_fed_N = torch.zeros_like(steps_N)
        self.num_spans_N = torch.zeros_like(steps_N)
        self.end_is_due_N = torch.zeros_like(self.in_span_N)
        is_sampled = mechanism.span_end == SAMPLED_END
        self.leaving_kind = int(PositionKind.TEXT if is_sampled else PositionKind.FORCED)
        self.closing_ids = sorted(mechanism.closing_ids)
        self.opening_kind = int(
            PositionKind.FED_START if mechanism.feeds_start else PositionKind.START
        )

    def plan(self, logits_NV: Tensor | None) -> Tensor:
        leaves_N = self.end_is_due_N
        if self.mechanism.reads_logits:
            # a span has at least one latent step: the rule reads the logits of latent positions
            # only
            assert logits_NV is not None, "the mechanism reads_logits"
            says_end_N = logits_NV.argmax(-1) == self.mechanism.end_id
            leaves_N = leaves_N | (self.in_span_N & (self.num_fed_N > 0) & says_end_N)
        # filled, not chosen by torch.where, which would send each number to the device and wait
        kinds_N = torch.full_like(self.num_fed_N, int(PositionKind.TEXT))
        kinds_N = kinds_N.masked_fill(self.in_span_N, int(PositionKind.LATENT))
        if self.mechanism.start == FORCED_START:
            # a row without any span is at its first position
            begins_N = (self.num_spans_N == 0) & self.may_open_N
            kinds_N = kinds_N.masked_fill(begins_N, int(PositionKind.START))
        return kinds_N.masked_fill(leaves_N, self.leaving_kind)

    def advance(self, kinds_N: Tensor, token_ids_N: Tensor, latents_NH: Tensor | None) -> Tensor:
        is_text_N = kinds_N == PositionKind.TEXT
        is_latent_N = kinds_N == PositionKind.LATENT
        is_start_N = is_text_N & (token_ids_N == self.mechanism.start_id)
        opens_N = is_start_N | (kinds_N == PositionKind.START)
        # whatever follows the last latent: the forced end, or what was sampled
        closes_N = self.in_span_N & ~is_latent_N
        self.num_fed_N += is_latent_N
        self.end_is_due_N = (is_latent_N & (self.num_fed_N >= self.steps_N)) | (
            opens_N & (self.steps_N <= int(self.mechanism.feeds_start))
        )
        if latents_NH is not None:
            self.end_is_due_N |= is_latent_N & self._is_end(latents_NH)
        # a sampled token may close one span and open the next
        self.in_span_N = (self.in_span_N & ~closes_N) | opens_N
        # at `start` itself stands the first latent, or none
        self.num_fed_N = self.num_fed_N.masked_fill(opens_N, int(self.mechanism.feeds_start))
        self.num_spans_N += opens_N
        for closing_id in self.closing_ids:
            is_end_N = is_text_N & (token_ids_N == closing_id)
            kinds_N = kinds_N.masked_fill(is_end_N, int(PositionKind.END))
        return kinds_N.masked_fill(opens_N, self.opening_kind)

    def _is_end(self, latents_NH: Tensor) -> Tensor:
        """bool [N], vectors that end their span by themselves."""
        return torch.zeros_like(self.in_span_N)

    @property
    def may_open_N(self) -> Tensor:
        return self.num_spans_N < self.max_spans_N

    @property
    def span_N(self) -> Tensor:
        return self.num_spans_N - 1

    @property
    def is_last_latent_N(self) -> Tensor:
        return self.end_is_due_N

    @property
    def is_after_span_N(self) -> Tensor:
        return (self.num_spans_N > 0) & ~self.in_span_N

    def keep_rows(self, rows_M: Tensor) -> None:
        # steps and bounds are the request's, so `pack`, which an engine keeps, leaves them out
        self.steps_N = self.steps_N[rows_M]
        self.unpack(tuple(column_N[rows_M] for column_N in self.pack()))
        if isinstance(self.max_spans_N, Tensor):
            self.max_spans_N = self.max_spans_N[rows_M]

    def pack(self) -> tuple[Tensor, ...]:
        return self.in_span_N, self.end_is_due_N, self.num_fed_N, self.num_spans_N

    def unpack(self, columns: tuple[Tensor, ...]) -> None:
        in_span_N, end_is_due_N, self.num_fed_N, self.num_spans_N = columns
        self.in_span_N, self.end_is_due_N = in_span_N.bool(), end_is_due_N.bool()
