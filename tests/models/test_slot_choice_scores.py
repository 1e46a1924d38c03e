"""Random selection: its rows of attention, its recorded log-probs, its gradient.

Against full attention maps and a replay.
"""

import dataclasses
import itertools

import pytest
import torch
from latent_cases import build_case, case, norms_in_double
from slot_cases import scored
from test_slots import as_batch, padded, prompts

from grpo_latent.algo.selection import NOT_CHOSEN
from grpo_latent.errors import LatentMismatchError
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.slot_choice import SlotDraws
from grpo_latent.models.slot_choice_scores import choice_log_probs, slot_choices
from grpo_latent.models.slots import prefill_with_slots
from grpo_latent.trajectory import PositionKind as K

TOP_K, TEMPERATURE = 4, 0.7


def drawn(c, requests, num_slots, row_to_prompt, uniforms_NSM, temperature=TEMPERATURE):
    adapter = ModelAdapter(c.model, c.mechanism("coconut"))
    draws = SlotDraws(torch.tensor(row_to_prompt), temperature, uniforms_NSM)
    return prefill_with_slots(
        adapter, padded(adapter, requests), torch.tensor(num_slots), TOP_K, draws=draws
    )


def uniforms_of(num_rows, num_slots=3, num_images=12, seed=0):
    return torch.rand(
        num_rows,
        num_slots,
        num_images,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    )


def batch_of(adapter, prefill, requests, row_to_prompt):
    return as_batch(adapter, prefill, [requests[prompt] for prompt in row_to_prompt])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_recorded_log_probs_are_those_of_a_replay_and_rows_draw_their_own(name):
    c, rows = case(name), [0, 0, 1, 1, 2, 0]
    requests, adapter = prompts(c), ModelAdapter(c.model, c.mechanism("coconut"))
    with torch.no_grad():
        prefill = drawn(c, requests, (2, 3, 1), rows, uniforms_of(6))
        batch = batch_of(adapter, prefill, requests, rows)
        _, log_probs_M = scored(adapter, batch, TEMPERATURE)
    recorded = torch.cat(
        [record.log_probs[record.kinds == K.SELECTED] for record in prefill.records]
    )
    torch.testing.assert_close(log_probs_M, recorded, rtol=0, atol=1e-4)
    assert (
        recorded.min() < -0.5
        and (torch.cat([r.log_probs[r.kinds == K.LATENT] for r in prefill.records]) == 0).all()
    )
    counts = [int((record.kinds == K.SELECTED).sum()) for record in prefill.records]
    assert counts == [8, 8, 6, 6, 0, 8], (
        "the second prompt has six image positions for three slots"
    )
    assert all(len(set(r.selected_idx.tolist())) == len(r.selected_idx) for r in prefill.records)
    assert prefill.records[0].selected_idx.tolist() != prefill.records[1].selected_idx.tolist()
    # h of the first slot, before any choice, is the same; that of the second is not
    firsts = [record.latents[record.kinds == K.LATENT] for record in prefill.records[:2]]
    torch.testing.assert_close(firsts[0][0], firsts[1][0], rtol=0, atol=1e-4)
    assert float((firsts[0][1] - firsts[1][1]).abs().max()) > 1e-2


@torch.no_grad()
def test_a_rows_draws_do_not_depend_on_its_batch_and_follow_the_stated_probability():
    c, uniforms_NSM = case("qwen2_vl"), uniforms_of(3)
    requests = prompts(c)
    together = drawn(c, requests, (2, 3, 1), [0, 1, 2], uniforms_NSM)
    alone = drawn(c, requests[1:2], (3,), [0], uniforms_NSM[1:2])
    assert together.records[1].selected_idx.tolist() == alone.records[0].selected_idx.tolist()
    best = drawn(c, requests, (2, 3, 1), [0, 1, 2], None)
    adapter = ModelAdapter(c.model, c.mechanism("coconut"))
    plain = prefill_with_slots(adapter, padded(adapter, requests), torch.tensor([2, 3, 1]), TOP_K)
    assert all(
        torch.equal(a.selected_idx, b.selected_idx)
        for a, b in zip(best.records, plain.records, strict=True)
    )
    num = 2000
    records = drawn(c, requests[1:2], (1,), [0] * num, uniforms_of(num, 1, 6, seed=3)).records
    firsts = torch.tensor([int(record.selected_idx[0]) for record in records])
    probs = {int(record.selected_idx[0]): float(record.log_probs[0].exp()) for record in records}
    assert sum(probs.values()) == pytest.approx(1, abs=1e-4)
    for place, expected in probs.items():
        assert float((firsts == place).double().mean()) == pytest.approx(
            expected, abs=4 * (expected / num) ** 0.5
        )


def test_the_gradient_reaches_the_weights_and_is_numerically_right(monkeypatch):
    """d log P / d weight by central differences, all of it in float64."""
    norms_in_double(monkeypatch)
    c = build_case("qwen2_vl")
    c.model.double()
    requests, adapter = prompts(c)[:2], ModelAdapter(c.model, c.mechanism("coconut"))
    images = [
        dataclasses.replace(r.images, pixel_values=r.images.pixel_values.double())
        for r in requests
    ]
    requests = [
        dataclasses.replace(r, images=image) for r, image in zip(requests, images, strict=True)
    ]
    with torch.no_grad():
        batch = batch_of(
            adapter, drawn(c, requests, (2, 2), [0, 1], uniforms_of(2)), requests, [0, 1]
        )
    weight = adapter.decoder.layers[0].self_attn.q_proj.weight

    def total():
        return scored(adapter, batch, TEMPERATURE)[1].double().sum()

    total().backward()
    for row, column in itertools.product((0, 7), (1, 20)):
        numbers = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[row, column] += sign * 1e-4
                numbers.append(float(total()))
                weight[row, column] -= sign * 1e-4
        expected = (numbers[0] - numbers[1]) / 2e-4
        assert weight.grad[row, column].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)
    assert float(weight.grad.abs().max()) > 1e-2


def test_choices_by_hand():
    """One sequence with two slots, the second with one place, and one without any."""
    kinds = [
        [K.VISION] * 3 + [K.SELECTED] * 2 + [K.LATENT, K.SELECTED, K.LATENT],
        [K.PROMPT] * 3 + [K.TEXT] * 5,
    ]
    kinds_BT = torch.tensor([[int(kind) for kind in row] for row in kinds])
    is_image_BT = kinds_BT == K.VISION
    valid_BT = torch.ones_like(is_image_BT)
    choices = slot_choices(kinds_BT, valid_BT, is_image_BT, torch.tensor([2, 0, 1]))
    assert choices.sources_BN.tolist() == [[2, 5], [0, 0]]
    assert choices.chosen_BNK.tolist() == [[[2, 0], [1, NOT_CHOSEN]], [[NOT_CHOSEN] * 2] * 2]
    assert choices.candidates_BNM[0].tolist() == [[True] * 3, [False, True, False]]
    attention_BNT = torch.zeros(2, 2, 8)
    attention_BNT[0, :, :3] = torch.tensor([0.2, 0.3, 0.1])
    log_probs = choice_log_probs(choices, attention_BNT, 1.0)
    torch.testing.assert_close(log_probs.exp(), torch.tensor([1 / 6, 2 / 5, 1.0]))
    cooler = choice_log_probs(choices, attention_BNT, 0.5)  # weights squared: 4, 9, 1
    torch.testing.assert_close(cooler.exp(), torch.tensor([1 / 14, 4 / 13, 1.0]))
    for wrong in ([2, 0], [2, 0, 3], [2, 2, 1]):
        with pytest.raises(LatentMismatchError):
            choice_log_probs(
                slot_choices(kinds_BT, valid_BT, is_image_BT, torch.tensor(wrong)),
                attention_BNT,
                1.0,
            )
