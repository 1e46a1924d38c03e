"""The worker's table without vLLM: positions asked for again, seats that are reused.

Rows of different sampling stand in one step.
"""

import numpy as np
import pytest
import torch
from torch import nn

from grpo_latent.errors import RolloutError
from grpo_latent.latent.mechanisms import LVR
from grpo_latent.latent.mechanisms.coconut import Coconut
from grpo_latent.latent.treatments import LatentSource, Mask
from grpo_latent.latent.treatments.gaussian import Gaussian
from grpo_latent.latent.treatments.gumbel_soft import GumbelSoft
from grpo_latent.rollout.sampling import latent_uniforms, seed_bits, uniforms
from grpo_latent.rollout.vllm.request import LatentRequest, RowSampling
from grpo_latent.rollout.vllm.table import LatentTable, StepRows
from grpo_latent.trajectory import PositionKind

START, LATENT, END, WORD = 0, 1, 2, 3
HIDDEN, VOCAB = 4, 6
T, S, L, F = (
    int(kind)
    for kind in (PositionKind.TEXT, PositionKind.START, PositionKind.LATENT, PositionKind.FORCED)
)


def table(num_seats=2, max_latents=8, kind=LVR, treatment=None, **changes):
    mechanism = kind("s", "l", "e", START, LATENT, END, steps=2, **changes)
    return LatentTable(
        mechanism,
        treatment or Mask(),
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


def test_a_start_that_is_fed_as_a_vector_keeps_its_log_prob():
    t = table(first_latent="at_start")
    t.add("a", greedy("a"))
    for position, best in enumerate([START, 4, 4, WORD]):
        step(t, ["a"], [position], [best])
    record = t.pop(["a"])["a"]
    assert record["kinds"].tolist() == [int(PositionKind.FED_START), L, F, T]
    expected = float(torch.tensor([5.0] + [0.0] * 5).log_softmax(0)[0])
    assert float(record["rollout_log_probs"][0]) == pytest.approx(expected, abs=1e-6)
    assert record["latents"][:, 0].tolist() == [0.0, 1.0]


def test_a_completion_begins_with_its_slots():
    """As many as the request asks for; a slot that is asked for again is one."""
    t = table(kind=Coconut)
    t.add("a", greedy("a"))
    t.add("b", greedy("b", steps=3))
    for position in range(4):
        tokens, _, forced = step(t, ["a", "b"], [position] * 2, [WORD, WORD])
        assert tokens == [WORD if position >= slots else LATENT for slots in (2, 3)]
        assert forced == [position < slots for slots in (2, 3)]
    assert step(t, ["a"], [1], [WORD], torch.full((1, HIDDEN), 7.0))[0] == [LATENT]
    assert step(t, ["a"], [2], [WORD])[0] == [WORD]
    record = t.pop(["a"])["a"]
    assert record["kinds"].tolist() == [L, L, T]
    assert record["latents"][:, 0].tolist() == [0.0, 7.0]


def test_text_behind_slots_draws_as_if_they_were_of_the_prompt():
    t = table(kind=Coconut)
    t.add("a", sampled("a", 1.0, seed=9))
    draws_L = t.host.draws_SL[t.seats["a"]]
    expected = uniforms(np.array([9], np.uint64), np.arange(5)).tolist()
    assert draws_L[2:7].tolist() == expected


def sampled(key, temperature, seed):
    return LatentRequest(key, 2, RowSampling(temperature, top_k=-1, top_p=1.0), seed)


def test_a_latent_is_drawn_by_its_trajectorys_numbers_and_scored():
    """Three ways in one step: drawn, greedy, and served, whose text vLLM's sampler draws."""
    t = table(num_seats=4, treatment=Gaussian(sigma=2.0))
    t.add("drawn", sampled("drawn", 0.5, seed=2**64 - 3))
    t.add("greedy", greedy("greedy"))
    t.add("served", LatentRequest())
    names = ["drawn", "greedy", "served"]
    far = 50 * torch.nn.functional.one_hot(torch.tensor([START] * 3), VOCAB).float()
    rows = StepRows(np.arange(3), np.array([t.seats[name] for name in names]), np.zeros(3, int))
    t.choose(rows, torch.zeros(3, HIDDEN), far, torch.full((3,), START))
    t.note_chosen(rows)
    hidden = torch.arange(12.0).reshape(3, HIDDEN)
    step(t, names, [1, 1, 1], [WORD] * 3, hidden)
    record = t.pop(["drawn"])["drawn"]
    noise = 2.0 * torch.special.ndtri(latent_uniforms(seed_bits([2**64 - 3]), 1, HIDDEN)).float()
    assert record["kinds"].tolist() == [S, L]
    torch.testing.assert_close(record["latents"], hidden[:1] + noise, rtol=0, atol=1e-6)
    density = -float(noise.square().sum()) / (2 * 2.0**2)
    for name in ("rollout_log_probs", "sampling_log_probs"):
        assert float(record[name][1]) == pytest.approx(density, abs=1e-6)
    record = t.pop(["greedy"])["greedy"]
    assert (
        torch.equal(record["latents"], hidden[1:2]) and float(record["rollout_log_probs"][1]) == 0
    )
    served = t.on_device.latents_SCH[t.seats["served"], 0]
    assert torch.equal(served, hidden[2])


def test_what_a_treatment_records_beside_a_latent_comes_with_it():
    treatment = GumbelSoft(top_k=2)
    t = table(treatment=treatment)
    t.add("a", sampled("a", 0.5, seed=3))
    far = torch.zeros(1, VOCAB)
    far[0, START] = 80.0
    rows = StepRows(np.arange(1), np.array([t.seats["a"]]), np.zeros(1, int))
    t.choose(rows, torch.zeros(1, HIDDEN), far, torch.zeros(1, dtype=torch.long))
    t.note_chosen(rows)
    with torch.no_grad():
        step(t, ["a"], [1], [WORD])
    record = t.pop(["a"])["a"]
    source = LatentSource(torch.zeros(1, HIDDEN), lambda: torch.eye(VOCAB)[[WORD]] * 5.0 / 0.5)
    uniforms = latent_uniforms(seed_bits([3]), 1, 2)
    with torch.no_grad():
        latents, aux = treatment.draw(source, uniforms, t.embed)
    torch.testing.assert_close(record["latents"], latents)
    torch.testing.assert_close(record["latent_aux"], aux)
    density = float(treatment.log_density(source, latents, aux))
    assert float(record["rollout_log_probs"][1]) == pytest.approx(density, abs=1e-5)


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
