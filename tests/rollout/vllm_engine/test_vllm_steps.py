"""A worker's steps without vLLM: chunked prompts, preempted requests, vLLM's report."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from grpo_latent.errors import RolloutError
from grpo_latent.latent.mechanisms import LVR
from grpo_latent.rollout.vllm.skeleton import WorkerOptions
from grpo_latent.rollout.vllm.steps import LatentSteps

START, LATENT, END, WORD, OTHER = 0, 1, 2, 3, 4
HIDDEN, VOCAB = 4, 6


def steps():
    options = WorkerOptions(LVR("s", "l", "e", START, LATENT, END, steps=2), (LATENT, END), 8)
    sizes = dict(num_seats=2, max_length=16, hidden_size=HIDDEN)
    return LatentSteps(
        options,
        nn.Module(),
        nn.Embedding(VOCAB, HIDDEN),
        dtype=torch.float32,
        device=torch.device("cpu"),
        **sizes,
    )


def recorded(key):
    return {"latent": {"key": key, "seed": 1, "temperature": 0.0, "top_k": -1, "top_p": 1.0}}


def run(steps, rows, best, hidden=0.0, drawn=None, with_report=False):
    """One step of `rows`, (request, first position, count, whether it chooses) each.

    Returns inputs, ids, report.
    """
    names, starts, counts, choosing = zip(*rows, strict=True)
    embeds = torch.full((sum(counts), HIDDEN), -1.0)
    steps.begin(embeds, list(names), np.array(starts), np.array(counts), np.array(choosing))
    logits = torch.zeros(len(rows), VOCAB)
    logits[torch.arange(len(rows)), torch.tensor(best)] = 5.0
    ids = torch.tensor(drawn or [OTHER] * len(rows), dtype=torch.int32)[:, None]
    report = SimpleNamespace(
        logprob_token_ids=ids.clone(), logprobs=torch.full((len(rows), 1), -9.0)
    )
    steps.choose(
        torch.full((len(rows), HIDDEN), hidden), logits, ids, report if with_report else None
    )
    return embeds[:, 0].tolist(), ids[:, 0].tolist(), report.logprobs[:, 0].tolist()


def test_a_prompt_in_chunks_then_a_span_then_all_of_it_again():
    s = steps()
    s.add("a", 3, recorded("a"))
    assert run(s, [("a", 0, 2, False)], [WORD])[1] == [
        OTHER
    ]  # nothing is chosen before the prompt is done
    ids = [run(s, [("a", 2, 1, True)], [START])[1][0]]
    for position, hidden in ((3, 7.0), (4, 8.0), (5, 9.0)):
        inputs, chosen, _ = run(s, [("a", position, 1, True)], [WORD], hidden)
        ids += chosen
    assert ids == [START, LATENT, LATENT, END] and inputs == [
        8.0
    ]  # the last input was the second latent
    assert s.num_replayed_rows == 0
    s.add(
        "a", 3, recorded("a")
    )  # as the V2 runner announces a request that comes back after a preemption
    inputs, _, _ = run(s, [("a", 0, 4, False)], [WORD])
    assert inputs == [-1.0] * 4
    inputs, chosen, _ = run(s, [("a", 4, 3, True)], [WORD])
    assert inputs == [7.0, 8.0, -1.0] and chosen == [WORD] and s.num_replayed_rows == 4
    s.finish(["a"])
    assert s.table.pop(["a"])["a"]["latents"][:, 0].tolist() == [7.0, 8.0] and not s.prompt_lengths


def test_rows_of_a_batch_and_vllms_own_report():
    s = steps()
    s.add("recorded", 1, recorded("r"))
    s.add("served", 1, None)
    rows = [("recorded", 0, 1, True), ("served", 0, 1, True)]
    _, ids, report = run(s, rows, [START, START], drawn=[OTHER, START], with_report=True)
    full = float(torch.tensor([5.0] + [0.0] * 5).log_softmax(0)[0])
    assert ids == [START, START] and report == [
        pytest.approx(full, abs=1e-6),
        -9.0,
    ]  # vLLM's own stands where it drew
    assert s.has_served_rows
    masked = s.without_banned(torch.zeros(2, VOCAB))
    assert masked[0].isinf().tolist() == [False, True, True, False, False, False]
    rows = [("served", 1, 1, True), ("recorded", 1, 1, True)]
    _, ids, report = run(s, rows, [WORD, WORD], drawn=[OTHER, OTHER], with_report=True)
    assert ids == [LATENT, LATENT] and report == [0.0, 0.0]  # nothing was sampled
    s.begin(torch.zeros(1, HIDDEN), ["recorded"], np.array([2]), np.array([1]), np.array([True]))
    assert not s.has_served_rows


def test_a_prompt_that_grows_is_refused():
    s = steps()
    s.add("a", 3, None)
    with pytest.raises(RolloutError, match="prompt grows; got 5 prompt ids, before 3"):
        s.add("a", 5, None)
