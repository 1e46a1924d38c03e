"""Checks of what a mechanism does while decoding, and of its replay.

Legend: N rows, T completion positions, M vectors that a hidden state made, B sequences.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_latent.latent.mechanisms import UNBOUNDED, RowStates
from grpo_latent.models.recompute import latents_by_passes, recompute_latents
from grpo_latent.models.replay import replay_hidden
from grpo_latent.models.sequences import LatentSequences
from grpo_latent.testing.cases import Case, Recorded
from grpo_latent.testing.compare import (
    first_positions,
    relative,
    replayed,
    require,
    require_equal_rows,
    require_replay,
)
from grpo_latent.trajectory import PositionKind, latent_mask


def check_declares(case: Case) -> str | None:
    """What a mechanism says of itself holds.

    Ids lie in the vocabulary, `parameter_prefixes` cover what `attach` makes.
    """
    mechanism = case.mechanism
    vocab_size = len(case.tokenizer)
    ids = {kind.name: mechanism.placeholder_id(kind) for kind in PositionKind}
    require(
        all(0 <= i < vocab_size for i in ids.values()),
        "placeholder ids outside the vocabulary",
        got=ids,
    )
    unknown = (mechanism.banned_ids | mechanism.opening_ids) - set(mechanism.token_ids.values())
    require(
        not unknown,
        "banned_ids or opening_ids of tokens that are not the mechanism's",
        got=sorted(unknown),
    )
    made = mechanism.new_parameters(case.adapter.text_config, torch.float32, torch.device("cpu"))
    prefixes = mechanism.parameter_prefixes
    names = [name for name in case.model.state_dict() if name.split(".")[0] in made]
    missed = [name for name in names if not name.startswith(prefixes)]
    require(
        not missed,
        "parameters that parameter_prefixes does not name",
        got=missed,
        expected=f"names that start with one of {prefixes}",
        fix="A checkpoint would be saved with them and read without.",
    )
    return None


def check_rollout_is_replay(case: Case) -> str | None:
    """Log-probs of the rollout equal those of a replay, at every action."""
    made = case.recorded
    count = sum(len(trajectory.latents) for trajectory in made.trajectories)
    require(
        count > 0,
        "the rollouts recorded no vector",
        got=f"{len(made.trajectories)} rows",
        expected="some",
    )
    require_replay(
        case, made.trajectories, case.collate(), "rollout and replay score an action differently"
    )
    return None


@torch.no_grad()
def check_recorded_is_made(case: Case) -> str | None:
    """While weights stay, `make` makes what was recorded, of the hidden states at `sources`."""
    sequences = case.collate()
    sources = sequences.sources(case.mechanism)
    recorded_MH = sequences.latents_NH[sequences.is_made_N]
    made_MH = case.adapter.make(replay_hidden(case.adapter, sequences)[sources])
    require(
        made_MH.shape == recorded_MH.shape,
        "make gives another shape",
        got=tuple(made_MH.shape),
        expected=f"{tuple(recorded_MH.shape)}, as source.hidden_MH",
    )
    gap = relative(made_MH, recorded_MH)
    require(
        gap <= 1e-4,
        "make in a replay is not what was recorded",
        got=f"{gap:.3g} of its size",
        expected="<= 1e-4",
    )
    return None


@torch.no_grad()
def check_recompute(case: Case) -> str | None:
    """While weights stay, a chain of the model's own vectors gives what was recorded.

    In both ways to run it.
    """
    sequences = case.collate(padding_side="both")
    most = int(sequences.recorded_mask_BT.sum(-1).max())

    def make(sequences: LatentSequences, rows_M: Tensor, columns_M: Tensor) -> Tensor:
        return case.adapter.make(replay_hidden(case.adapter, sequences)[rows_M, columns_M])

    # without what was recorded: a chain that read it would find it again in any case
    spoiled = sequences.with_latents(
        torch.where(sequences.is_made_N[:, None], 0.0, sequences.latents_NH)
    )
    ways = {
        "over a cache": recompute_latents(case.adapter, spoiled),
        "by passes": latents_by_passes(spoiled, case.mechanism, most, "cut", make),
    }
    for way, found_NH in ways.items():
        gap = relative(found_NH, sequences.latents_NH)
        require(
            gap <= 1e-3,
            f"a chain {way} does not give what was recorded",
            got=f"{gap:.3g} of its size",
        )
    return None


def check_batch(case: Case) -> str | None:
    """A row is the same alone, beside others, and in another order."""
    requests = case.requests
    groups = case.generate(requests)
    turned = case.generate(requests[::-1])[::-1]
    for request, group, other in zip(requests, groups, turned, strict=True):
        for first, second in zip(group, other, strict=True):
            require_equal_rows(second, first, "a row depends on the order of its batch")
        for i in (0, len(group) - 1):
            [[alone]] = case.generate([replace(request, seeds=request.seeds[i : i + 1])])
            require_equal_rows(alone, group[i], "a row alone is not what it is in a batch")
    return None


def check_ragged(case: Case) -> str | None:
    """Rows of different lengths, with images and without, replay alike however padded."""
    made = case.recorded
    lengths = {len(trajectory.kinds) for trajectory in made.trajectories}
    require(
        len(lengths) > 1,
        "all rows are of one length",
        got=lengths,
        expected="rows that stop by themselves",
    )
    for side in ("left", "right", "both"):
        what = f"rows padded on the {side} score differently"
        require_replay(case, made.trajectories, case.collate(padding_side=side), what)
    for trajectory, images in list(zip(made.trajectories, made.images, strict=True))[::4]:
        one = Recorded([], [trajectory], [images])
        require_replay(
            case, one.trajectories, case.collate(one), "a row without padding scores differently"
        )
    return None


def check_placeholders(case: Case) -> str | None:
    """Ids at latent positions are placeholders: whatever stands there changes no number."""
    made = case.recorded
    if not any(bool(trajectory.latent_mask.any()) for trajectory in made.trajectories):
        return "every recorded vector stands beside a token that was sampled"
    own = replayed(case, made.trajectories, case.collate())
    for token_id in (case.eos_id, case.adapter.image_token_id or 1, 10**6):
        changed = [
            replace(t, token_ids=torch.where(latent_mask(t.kinds), token_id, t.token_ids))
            for t in made.trajectories
        ]
        other = replayed(case, changed, case.collate(replace(made, trajectories=changed)))
        same = all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
        require(same, "a placeholder changes log-probs", got=f"id {token_id} at latent positions")
    return None


def check_longer_run(case: Case) -> str | None:
    """A longer run begins with what a shorter one is."""
    length = case.max_new_tokens - 5
    shorter = [t for group in case.generate(case.requests, length) for t in group]
    for short, long in zip(shorter, case.recorded.trajectories, strict=True):
        require_equal_rows(
            first_positions(long, length),
            short,
            "a longer run begins otherwise than a shorter one",
        )
    return None


# ---- the rows' state


@dataclass(frozen=True)
class _Script:
    """What a rollout put at each position behind prompt and slots.

    Positions beyond a row's end are idle text.

    Attributes:
        kinds_NT, ids_NT: int64.
        valid_NT: bool.
        logits_NTV: of the position before each.
        latents_NTH: recorded, 0 where nothing is.
    """

    kinds_NT: Tensor
    ids_NT: Tensor
    valid_NT: Tensor
    logits_NTV: Tensor
    latents_NTH: Tensor


@torch.no_grad()
def _script(case: Case) -> _Script:
    trajectories = case.recorded.trajectories
    sequences = case.collate()
    hidden_BTH = replay_hidden(case.adapter, sequences)
    num_slots = [
        int((~latent_mask(t.kinds)).long().argmax()) if case.mechanism.has_slots else 0
        for t in trajectories
    ]
    lengths = [len(t.kinds) - skipped for t, skipped in zip(trajectories, num_slots, strict=True)]
    shape = (len(trajectories), max(lengths))
    idle_id = case.mechanism.placeholder_id(PositionKind.TEXT)
    script = _Script(
        torch.full(shape, int(PositionKind.TEXT)),
        torch.full(shape, idle_id),
        torch.zeros(shape, dtype=torch.bool),
        torch.zeros(*shape, case.model.get_output_embeddings().weight.shape[0]),
        torch.zeros(*shape, case.adapter.hidden_size),
    )
    for row, (trajectory, skipped, length) in enumerate(
        zip(trajectories, num_slots, lengths, strict=True)
    ):
        script.kinds_NT[row, :length] = trajectory.kinds[skipped:]
        script.ids_NT[row, :length] = trajectory.token_ids[skipped:]
        script.valid_NT[row, :length] = True
        before = len(trajectory.prompt_ids) + skipped - 1
        script.logits_NTV[row, :length] = case.adapter.logits(
            hidden_BTH[row, before : before + length]
        )
        vectors_TH = torch.zeros(len(trajectory.kinds), case.adapter.hidden_size)
        vectors_TH[trajectory.recorded_mask] = trajectory.latents
        script.latents_NTH[row, :length] = vectors_TH[skipped:]
    return script


def _begin(case: Case, num_rows: int) -> RowStates:
    max_spans = UNBOUNDED if case.mechanism.max_spans is None else case.mechanism.max_spans
    steps_N = torch.full((num_rows,), case.mechanism.steps)
    max_spans_N = torch.full((num_rows,), max_spans)
    return case.mechanism.begin(case.model, steps_N, max_spans_N)


def _told(state: RowStates) -> dict[str, Tensor]:
    names = ("may_open_N", "span_N", "is_last_latent_N", "is_after_span_N")
    return {name: getattr(state, name).clone() for name in names}


def _columns(case: Case, state: RowStates, num_rows: int) -> tuple[Tensor, ...]:
    columns = state.pack()
    shapes = [tuple(column.shape) for column in columns]
    size = case.mechanism.state_size
    expected = f"state_size {size} columns of shape ({num_rows},)"
    require(
        shapes == [(num_rows,)] * size, "pack gives other columns", got=shapes, expected=expected
    )
    return tuple(column.long().clone() for column in columns)


def _run(
    case: Case, script: _Script, packs: bool, keep: tuple[int, Tensor] | None = None
) -> list[dict[str, Tensor]]:
    """Asks the rows' state what it says at each position.

    Args:
        packs: continue at each position in a state that knows only what `pack` gave.
        keep: (position, rows) from which on only these rows go on.
    """
    mechanism = case.mechanism
    num_rows = script.kinds_NT.shape[0]
    state = _begin(case, num_rows)
    said: list[dict[str, Tensor]] = []
    for position in range(script.kinds_NT.shape[1]):
        if keep is not None and position == keep[0]:
            state.keep_rows(keep[1])
            script = _Script(
                *(getattr(script, f.name)[keep[1]] for f in dataclasses.fields(script))
            )
        valid_N, kinds_N = script.valid_NT[:, position], script.kinds_NT[:, position]
        planned_N = state.plan(script.logits_NTV[:, position] if mechanism.reads_logits else None)
        planned_N = planned_N.masked_fill(~valid_N, int(PositionKind.TEXT))
        latents_NH = script.latents_NTH[:, position] if mechanism.reads_latents else None
        final_N = state.advance(planned_N.clone(), script.ids_NT[:, position], latents_NH)
        wrong_M = (valid_N & (final_N != kinds_N)).nonzero()[:, 0].tolist()
        require(
            not wrong_M,
            "the rows' state says other kinds than the rollout recorded",
            got=f"{final_N[wrong_M].tolist()} at position {position} of rows {wrong_M}",
            expected=f"{kinds_N[wrong_M].tolist()}",
        )
        said.append({"plan": planned_N, "kinds": final_N} | _told(state))
        if packs:
            columns = _columns(case, state, valid_N.shape[0])
            state = _begin(case, valid_N.shape[0])
            state.unpack(columns)
    return said


def _require_same(first: list[dict], second: list[dict], what: str) -> None:
    for position, (a, b) in enumerate(zip(first, second, strict=True)):
        differ = [name for name in a if not torch.equal(a[name].long(), b[name].long())]
        require(not differ, what, got=f"{differ} at position {position}", expected="the same")


def check_resume(case: Case) -> str | None:
    """A batch goes on, from what `pack` gave or with some rows, as it would have.

    After any step.
    """
    script = _script(case)
    through = _run(case, script, packs=False)
    resumed = _run(case, script, packs=True)
    _require_same(
        through, resumed, "after unpack the rows go on otherwise: pack leaves something out"
    )
    rows_M = torch.arange(0, script.kinds_NT.shape[0], 2)
    kept = _run(case, script, packs=False, keep=(3, rows_M))[3:]
    expected = [{name: values[rows_M] for name, values in said.items()} for said in through[3:]]
    _require_same(expected, kept, "after keep_rows the rows go on otherwise")
    return None
