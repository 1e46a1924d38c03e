"""`SpanRows` by hand tables: rows in different modes at the same step. No model runs here."""

from types import SimpleNamespace

import torch

from grpo_latent.latent.mechanisms import LVR
from grpo_latent.trajectory import PositionKind as K

START, LATENT, END, WORD = 7, 8, 9, 3
T, S, Z, F, E = int(K.TEXT), int(K.START), int(K.LATENT), int(K.FORCED), int(K.END)
LATENT_END = 10


def lvr(**changes):
    values = dict(
        start_token="s",
        latent_token="l",
        end_token="e",
        start_id=START,
        latent_id=LATENT,
        end_id=END,
    )
    return LVR(**(values | changes))


def begin(mechanism, steps_N):
    """On a model that has nothing but an end vector of zeros."""
    return mechanism.begin(SimpleNamespace(lvr_latent_end_emb=torch.zeros(2)), steps_N)


def play(state, sampled, logits=None, latents=None):
    """Feeds one row's table of ids a step; rows that sample nothing ignore theirs.

    Kinds [steps][rows].
    """
    kinds = []
    for step, ids in enumerate(sampled):
        planned_N = state.plan(None if logits is None else logits[step])
        vectors = None if latents is None else latents[step]
        kinds.append(state.advance(planned_N, torch.tensor(ids), vectors).tolist())
    return [list(row) for row in zip(*kinds, strict=True)]


def test_rows_in_different_modes():
    state = begin(lvr(), torch.tensor([2, 1, 3]))
    rows = play(
        state,
        [
            [START, WORD, WORD],
            [0, START, START],
            [0, 0, 0],
            [0, 0, 0],
            [START, START, 0],
            [0, 0, 0],
        ],
    )
    assert rows == [[S, Z, Z, F, S, Z], [T, S, Z, F, S, Z], [T, S, Z, Z, Z, F]]
    assert state.num_spans_N.tolist() == [2, 2, 1]


def test_a_sampled_end_or_latent_id_is_only_text():
    """Delimiters act as `start` does only where the mechanism says so, not by their id."""
    state = begin(lvr(), torch.tensor([2]))
    assert play(state, [[END], [LATENT], [START], [START], [START], [END]]) == [[T, T, S, Z, Z, F]]


def test_a_sampled_end_is_what_the_model_writes():
    """By hand: both closing tokens, one, none; a start right behind a span; an end without one."""
    mechanism = lvr(
        span_end="sampled", latent_end_id=LATENT_END, latent_end_token="le", end_vector=False
    )
    state = begin(mechanism, torch.tensor([2, 1, 1, 0]))
    rows = play(
        state,
        [
            [START, START, END, START],
            [0, 0, START, WORD],
            [0, END, 0, START],
            [LATENT_END, WORD, START, END],
            [END, LATENT_END, 0, WORD],
        ],
    )
    assert rows == [[S, Z, Z, E, E], [S, Z, E, T, E], [E, S, Z, S, Z], [S, T, S, E, T]]
    assert state.num_spans_N.tolist() == [1, 1, 2, 2]


def test_a_sampled_end_by_the_exit_rule():
    """At the first latent position whose arg-max is `end` the row is text again."""
    logits = torch.zeros(4, 1, 12)
    logits[2, 0, END] = 1.0
    state = begin(lvr(exit="end_token", span_end="sampled"), torch.tensor([5]))
    assert play(state, [[START], [0], [END], [WORD]], logits) == [[S, Z, E, T]]


def test_last_latent_is_known_when_it_is_fed():
    state = begin(lvr(), torch.tensor([2, 1]))
    seen = []
    for ids in ([START, START], [0, 0], [0, 0], [WORD, WORD]):
        state.advance(state.plan(None), torch.tensor(ids), None)
        seen.append(state.is_last_latent_N.tolist())
    assert seen == [[False, False], [False, True], [True, False], [False, False]]


def test_may_open_counts_spans():
    state = begin(lvr(max_spans=1), torch.tensor([1, 1]))
    assert state.may_open_N.tolist() == [True, True]
    state.advance(state.plan(None), torch.tensor([START, WORD]), None)
    assert state.may_open_N.tolist() == [False, True]
    assert begin(lvr(), torch.tensor([1])).may_open_N.tolist() == [True]
    assert begin(lvr(max_spans=0), torch.tensor([1])).may_open_N.tolist() == [False]


def test_end_token_needs_a_latent_first_and_is_capped():
    logits = torch.zeros(5, 2, 12)
    logits[0, 0, END] = logits[1, 0, END] = logits[2, 0, END] = (
        1.0  # row 0 says end from the start on, row 1 never
    )
    state = begin(lvr(exit="end_token"), torch.tensor([3, 3]))
    rows = play(state, [[START, START], [0, 0], [0, 0], [WORD, 0], [WORD, 0]], logits)
    assert rows == [[S, Z, F, T, T], [S, Z, Z, Z, F]]


def test_latent_end_compares_mean_squares():
    """Distances by hand: |(1, 1) - 0|² / 2 = 1, |(0.1, 0.3) - 0|² / 2 = 0.05."""
    latents = torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]], [[0.1, 0.3]], [[0.0, 0.0]], [[0.0, 0.0]]])
    for threshold, expected in (
        (0.06, [S, Z, Z, F, T]),
        (0.04, [S, Z, Z, Z, F]),
        (1.1, [S, Z, F, T, T]),
    ):
        changes = dict(
            exit="latent_end",
            latent_end_id=10,
            latent_end_token="le",
            latent_end_threshold=threshold,
        )
        state = begin(lvr(**changes), torch.tensor([5]))
        ids = [[START], [WORD], [WORD], [WORD], [WORD]]
        assert play(state, ids, latents=latents) == [expected]


def test_latent_end_reads_latent_rows_only():
    changes = dict(exit="latent_end", latent_end_id=10, latent_end_token="le")
    state = begin(lvr(**changes), torch.tensor([5, 5]))
    near = torch.zeros(2, 2)
    rows = play(state, [[START, WORD], [0, WORD], [0, START]], latents=[near] * 3)
    assert rows == [[S, Z, F], [T, T, S]]


def test_keep_rows_keeps_all_state():
    state = begin(lvr(max_spans=3), torch.tensor([1, 2, 3]))
    play(state, [[START, START, START], [0, 0, 0]])
    state.keep_rows(torch.tensor([2, 0]))
    assert play(state, [[0, 0], [0, WORD], [WORD, START]]) == [[Z, Z, F], [F, T, S]]
    assert state.num_spans_N.tolist() == [1, 2]


def test_packed_columns_give_the_same_state_back():
    """What engine vllm stores a position: the state goes on as if nothing had happened."""
    mechanism, steps_N = lvr(max_spans=3), torch.tensor([1, 2, 3])
    state = begin(mechanism, steps_N)
    play(state, [[START, START, WORD], [0, 0, START]])
    columns = torch.stack(state.pack(), -1).to(torch.int32)
    assert columns.shape == (3, mechanism.state_size)
    again = begin(mechanism, steps_N)
    again.unpack(columns.long().unbind(-1))
    ids = [[WORD, 0, 0], [START, 0, 0], [0, WORD, 0]]
    assert play(again, ids) == play(state, ids) == [[F, S, Z], [Z, F, T], [Z, Z, Z]]
