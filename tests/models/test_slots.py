"""Slots over a cache against a prefix recomputed for every slot, eager, row by row."""

import dataclasses

import pytest
import torch
from latent_cases import build_case, case

from grpo_latent.errors import ConfigError
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.recompute import recompute_latents
from grpo_latent.models.replay import replay_hidden
from grpo_latent.models.sequences import LatentSequences, prompt_sequences
from grpo_latent.models.slots import prefill_with_slots
from grpo_latent.trajectory import PositionKind as K

TOP_K = 4


def prompts(c):
    """Makes prompts of two images (12 image positions), one (6) and none.

    With K = 4 and three slots, the second has 2 left for its second slot and none for its
    third.
    """
    return [
        c.request("read ? ?", c.images(2, seed=2), image_first=True),
        c.request("read red ?", c.images(1, seed=1)),
        c.request("read blue ?"),
    ]


def padded(adapter, requests):
    prompts, images = (
        [request.prompt_ids for request in requests],
        [request.images for request in requests],
    )
    return prompt_sequences(prompts, images, adapter, "full")


@torch.no_grad()
def slow_slots(c, request, num_slots, top_k, order="index"):
    """Computes one prompt's slots without cache, by full maps and 1-D positions.

    Returns kinds, vectors, chosen positions, last hidden state and length.
    """
    is_image = request.prompt_ids == c.adapter.image_token_id if c.processor else torch.zeros(0)
    embeds_TH = c.model.get_input_embeddings()(request.prompt_ids).clone()
    image_columns = is_image.nonzero()[:, 0].tolist()
    if request.images is not None:
        embeds_TH[is_image] = torch.cat(
            tuple(
                c.model.model.get_image_features(
                    *dataclasses.astuple(request.images)
                ).pooler_output
            )
        )
    prompt_TH, fed, kinds, chosen = embeds_TH, [], [], []
    text_config = c.model.config.get_text_config()
    text_config._attn_implementation = "eager"
    try:
        for slot in range(num_slots + 1):
            length = len(embeds_TH)
            output = c.adapter.decoder(
                inputs_embeds=embeds_TH[None],
                position_ids=torch.arange(length).expand(3, 1, -1)
                if c.processor
                else torch.arange(length)[None],
                attention_mask=torch.full((length, length), torch.finfo(torch.float32).min).triu(
                    1
                )[None, None],
                output_attentions=True,
                use_cache=False,
            )
            if slot == num_slots:
                break
            weights = torch.stack([layer[0, :, -1] for layer in output.attentions]).mean((0, 1))
            left = [
                column for column in image_columns if image_columns.index(column) not in chosen
            ]
            best = sorted(left, key=lambda column: (-float(weights[column]), column))[:top_k]
            best = sorted(best) if order == "index" else best
            chosen += [image_columns.index(column) for column in best]
            vectors = [*(prompt_TH[column] for column in best), output.last_hidden_state[0, -1]]
            kinds += [int(K.SELECTED)] * len(best) + [int(K.LATENT)]
            fed += vectors
            embeds_TH = torch.cat([embeds_TH, torch.stack(vectors)])
    finally:
        text_config._attn_implementation = "sdpa"
    return kinds, fed, chosen, output.last_hidden_state[0, -1], len(embeds_TH)


def fast_slots(c, requests, num_slots, top_k, order="index"):
    adapter = ModelAdapter(c.model, c.mechanism("ivt_lr", selection_order=order))
    return prefill_with_slots(adapter, padded(adapter, requests), torch.tensor(num_slots), top_k)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("num_slots", [(3, 3, 3), (2, 3, 1), (0, 1, 2)])
@pytest.mark.parametrize("order", ["index", "attention"])
@torch.no_grad()
def test_cached_slots_equal_a_recomputed_prefix(name, num_slots, order):
    c = case(name)
    requests = prompts(c)
    prefill = fast_slots(c, requests, num_slots, TOP_K, order)
    for row, request in enumerate(requests):
        kinds, fed, chosen, hidden_H, length = slow_slots(c, request, num_slots[row], TOP_K, order)
        record = prefill.records[row]
        assert record.kinds.tolist() == kinds and record.selected_idx.tolist() == chosen
        assert len(set(chosen)) == len(chosen), "disjoint"
        assert prefill.next_position_B[row] == length == int(prefill.valid_BS[row].sum())
        torch.testing.assert_close(prefill.hidden_BH[row], hidden_H, rtol=0, atol=1e-4)
        if fed:
            torch.testing.assert_close(record.latents, torch.stack(fed), rtol=0, atol=1e-4)
    if num_slots == (3, 3, 3):
        counts = [(record.kinds == K.SELECTED).sum().item() for record in prefill.records]
        assert counts == [12, 6, 0], "what is left is taken, and no more"


@torch.no_grad()
def test_the_order_of_chosen_positions():
    """By index unless asked; one slot's set is the same either way, and recorded ones stay put."""
    c, mechanism = case("qwen2_vl"), case("qwen2_vl").mechanism("ivt_lr")
    assert mechanism.selection_order == "index"
    requests = prompts(c)[:2]
    by_index, by_attention = (
        [record.selected_idx for record in fast_slots(c, requests, (1, 1), TOP_K, order).records]
        for order in ("index", "attention")
    )
    for first, second in zip(by_index, by_attention, strict=True):
        assert first.tolist() == sorted(second.tolist())
    assert any(a.tolist() != b.tolist() for a, b in zip(by_index, by_attention, strict=True))
    adapter = ModelAdapter(c.model, mechanism)
    given = [torch.tensor([5, 0, 3, 1]), torch.tensor([2, 4, 0, 1])]
    recorded = prefill_with_slots(
        adapter, padded(adapter, requests), torch.tensor([1, 1]), TOP_K, selected_idx=given
    )
    assert [r.selected_idx.tolist() for r in recorded.records] == [g.tolist() for g in given]
    with pytest.raises(ConfigError, match="latent.selection_order"):
        c.mechanism("ivt_lr", selection_order="best")


@torch.no_grad()
def test_coconut_on_a_text_model():
    c = case("qwen2")
    requests = [c.request("read red ?"), c.request("? blue ? ? ?")]
    prefill = fast_slots(c, requests, (3, 2), 0)
    for row, (request, num) in enumerate(zip(requests, (3, 2), strict=True)):
        kinds, fed, _, hidden_H, _ = slow_slots(c, request, num, 0)
        assert prefill.records[row].kinds.tolist() == kinds == [K.LATENT] * num
        torch.testing.assert_close(
            prefill.records[row].latents, torch.stack(fed), rtol=0, atol=1e-4
        )
        torch.testing.assert_close(prefill.hidden_BH[row], hidden_H, rtol=0, atol=1e-4)


def as_batch(adapter, prefill, requests):
    """The slots as sequences: the prefill's own columns."""
    given = padded(adapter, requests)
    input_ids_BP, images = given.input_ids_BT, given.images
    num_more = prefill.kinds_BS.shape[1] - input_ids_BP.shape[1]
    input_ids_BS = torch.nn.functional.pad(input_ids_BP, (0, num_more))
    return LatentSequences.build(
        adapter,
        input_ids_BS,
        prefill.kinds_BS,
        prefill.valid_BS,
        torch.cat([record.latents for record in prefill.records]),
        "full",
        images,
        selected_idx_M=torch.cat([record.selected_idx for record in prefill.records]),
    )


@torch.no_grad()
def test_replay_and_recompute():
    c = case("qwen2_vl")
    adapter, requests = ModelAdapter(c.model, c.mechanism("coconut")), prompts(c)
    prefill = fast_slots(c, requests, (2, 3, 1), TOP_K)
    batch = as_batch(adapter, prefill, requests)
    hidden_BTH = replay_hidden(adapter, batch)
    torch.testing.assert_close(hidden_BTH[:, -1], prefill.hidden_BH, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        recompute_latents(adapter, batch), batch.latents_NH, rtol=0, atol=1e-4
    )
    is_own_N = (batch.kinds_BT == K.LATENT)[batch.recorded_mask_BT]
    spoiled = dataclasses.replace(
        batch, latents_NH=batch.latents_NH.masked_fill(is_own_N[:, None], 9.0)
    )
    torch.testing.assert_close(
        recompute_latents(adapter, spoiled), batch.latents_NH, rtol=0, atol=1e-4
    )


def test_h_is_cut_or_carries_its_gradient():
    """IVT-LR cuts the gradient at the slots, Coconut does not.

    Only then does the last hidden state depend on the weights through the slots.
    """
    gradients = []
    for cut in (True, False):
        c = build_case("qwen2")
        prompt = padded(c.adapter, [c.request("read red ?")])
        prefill = prefill_with_slots(c.adapter, prompt, torch.tensor([2]), 0, cut)
        prefill.hidden_BH.sin().sum().backward()
        gradients.append(c.model.model.layers[0].mlp.up_proj.weight.grad)
        assert prefill.records[0].latents.requires_grad is not cut
    assert float((gradients[0] - gradients[1]).norm()) > 1e-3 * float(gradients[1].norm())


@torch.no_grad()
def test_top_k_without_any_image():
    c = case("qwen2_vl")
    prefill = fast_slots(c, [c.request("read red ?")], (2,), TOP_K)
    assert (
        prefill.records[0].kinds.tolist() == [K.LATENT] * 2
        and prefill.records[0].selected_idx.numel() == 0
    )
