"""The worker's table without vLLM: positions asked for again, seats that are reused.

Rows of different sampling stand in one step.
"""

import numpy as np
import pytest
import torch
from torch import nn

from grpo_latent.errors import RolloutError
from grpo_latent.latent.mechanisms import LVR
from grpo_latent.rollout.vllm.request import LatentRequest, RowSampling
from grpo_latent.rollout.vllm.table import LatentTable, StepRows
from grpo_latent.trajectory import PositionKind

START, LATENT, END, WORD = 0, 1, 2, 3
HIDDEN, VOCAB = 4, 6
T, S, L, F = (
    int(kind)
    for kind in (PositionKind.TEXT, PositionKind.START, PositionKind.LATENT, PositionKind.FORCED)
)


def table(num_seats=2, max_latents=8, **changes):
    mechanism = LVR("s", "l", "e", START, LATENT, END, steps=2, **changes)
    return LatentTable(
        mechanism,
        nn.Module(),
        nn.Embedding(VOCAB, HIDDEN),
        sorted(mechanism.banned_ids),
        num_seats,
        16,
        max_latents,
        HIDDEN,
        torch.float32,
        torch.device("cpu"),
    )


def bans_start(table, rows):
    masked_V = table.bans(rows).without(torch.zeros(1, VOCAB))[0]
    return masked_V[START] == -torch.inf


def greedy(key, steps=None):
    return LatentRequest(key, steps, RowSampling(temperature=0.0, top_k=-1, top_p=1.0), seed=1)


def step(table, ids, positions, best, hidden=None, served=None):
    """One decision for the requests `ids`, whose best tokens are `best`."""
    seats = np.array([table.seats[request_id] for request_id in ids])
    rows = StepRows(np.arange(len(ids)), seats, np.array(positions))
    logits = torch.zeros(len(ids), VOCAB)
    logits[torch.arange(len(ids)), torch.tensor(best)] = 5.0
    hidden = torch.full((len(ids), HIDDEN), float(positions[0])) if hidden is None else hidden
    served = torch.zeros(len(ids), dtype=torch.long) if served is None else torch.tensor(served)
    tokens, full, forced = table.choose(rows, hidden, logits, served)
    table.note_chosen(rows)
    return tokens.tolist(), full, forced.tolist()


def test_a_span_then_the_same_positions_again_after_preemption():
    """Recomputing from position 2 on gives the state of then, not what came later.

    Positions 3 and 4 left another one behind.
    """
    t = table()
    t.add("a", greedy("a"))
    best = [WORD, START, 4, 4, 4, 5]
    first = [step(t, ["a"], [p], [best[p]])[0][0] for p in range(6)]
    assert first == [WORD, START, LATENT, LATENT, END, 5]
    again = [
        step(t, ["a"], [p], [best[p]], torch.full((1, HIDDEN), 100.0 + p))[0][0]
        for p in range(2, 5)
    ]
    assert again == [LATENT, LATENT, END]
    record = t.pop(["a"])["a"]
    assert record["kinds"].tolist() == [T, S, L, L, F]
    assert record["latents"][:, 0].tolist() == [102.0, 103.0]
    assert t.pop(None) == {} and not t.seats


def test_a_sampled_end_is_drawn_by_the_model():
    """As `test_a_span_then_the_same_positions_again_after_preemption`, without a forced end."""
    t = table(span_end="sampled")
    t.add("a", greedy("a"))
    best = [START, 4, 4, END, WORD, END]
    chosen = [step(t, ["a"], [p], [best[p]]) for p in range(6)]
    assert [tokens[0] for tokens, *_ in chosen] == [START, LATENT, LATENT, END, WORD, END]
    assert [forced[0] for *_, forced in chosen] == [False, True, True, False, False, False]
    assert step(t, ["a"], [3], [END])[0] == [END]  # asked for again
    record = t.pop(["a"])["a"]
    assert record["kinds"].tolist() == [S, L, L, int(PositionKind.END)]
    assert float(record["rollout_log_probs"][3]) < 0


def test_feeding_replaces_latent_positions_only():
    t = table()
    t.add("a", greedy("a"))
    for position, best in enumerate([START, 4, 4, 4, WORD]):
        step(t, ["a"], [position], [best])
    embeds = torch.full((6, HIDDEN), -1.0)
    seat = t.seats["a"]
    t.feed(embeds, np.arange(1, 6), np.full(5, seat), np.arange(5))
    assert embeds[:, 0].tolist() == [-1.0, -1.0, 1.0, 2.0, -1.0, -1.0]


def test_seats_are_reused_and_grow():
    t = table(num_seats=1)
    for idx in range(5):
        t.add(str(idx), greedy(str(idx)))
    assert len(set(t.seats.values())) == 5
    step(t, ["3"], [0], [START])
    t.finish("3")
    t.add("new", greedy("new"))
    assert step(t, ["new"], [0], [WORD])[0] == [WORD]  # nothing of the seat's former owner


def test_rows_of_different_sampling_in_one_step():
    t = table(num_seats=4)
    t.add("greedy", greedy("greedy"))
    t.add(
        "sampled",
        LatentRequest("sampled", None, RowSampling(temperature=0.5, top_k=1, top_p=1.0), seed=7),
    )
    t.add("served", LatentRequest())
    tokens, full, forced = step(
        t, ["greedy", "sampled", "served"], [0, 0, 0], [WORD, 4, 5], served=[0, 0, START]
    )
    assert tokens == [WORD, 4, START] and forced == [False] * 3
    assert (
        full[1]
        == pytest.approx(float(torch.tensor([10.0] + [0.0] * 5).log_softmax(0)[0]), abs=1e-6)
        and full[2] == 0
    )
    assert step(t, ["greedy", "served"], [1, 1], [4, 5])[0] == [4, LATENT]
    assert t.pop(None).keys() == {"greedy", "sampled"}


def test_start_is_banned_after_the_last_span_and_where_a_served_request_has_no_room():
    t = table(max_spans=1)
    t.add("a", greedy("a"))
    tokens = [step(t, ["a"], [p], [START])[0][0] for p in range(6)]
    assert tokens[:4] == [START, LATENT, LATENT, END] and START not in tokens[4:]
    t = table(max_latents=3)
    t.add("b", LatentRequest())
    rows = StepRows(np.array([0]), np.array([t.seats["b"]]), np.array([0]))
    assert not bans_start(t, rows)
    for position in range(4):
        step(t, ["b"], [position], [START], served=[START])
    rows = StepRows(rows.rows_N, rows.seats_N, np.array([4]))
    assert bans_start(t, rows)


def test_two_requests_with_one_key_are_refused():
    t = table()
    t.add("a", greedy("same"))
    with pytest.raises(RolloutError, match="share one key.*same"):
        t.add("b", greedy("same"))


@pytest.mark.parametrize(
    ("extra_args", "expected"),
    [
        (None, LatentRequest()),
        ({"latent_steps": 4}, LatentRequest(steps=4)),
        (
            {"latent_steps": "4", "latent": "x"},
            LatentRequest(),
        ),  # a worker must outlive what a client sends
        ({"latent_steps": 10**30}, LatentRequest(steps=2**31 - 1)),
        ({"latent": {}}, LatentRequest()),
        ({"latent": {"key": "a", "seed": 1}, "latent_steps": 4}, LatentRequest(steps=4)),
        (
            {
                "latent": {
                    "key": "a",
                    "steps": 2,
                    "seed": 1,
                    "temperature": 0.5,
                    "top_k": -1,
                    "top_p": 1.0,
                }
            },
            LatentRequest("a", 2, RowSampling(0.5, -1, 1.0), 1),
        ),
    ],
)
def test_what_a_request_asks(extra_args, expected):
    assert LatentRequest.from_extra_args(extra_args) == expected


def test_a_rollouts_request_reads_as_it_was_written():
    request = LatentRequest("a", 3, RowSampling(0.5, 7, 0.9), seed=11)
    assert LatentRequest.from_extra_args(request.to_extra_args()) == request
