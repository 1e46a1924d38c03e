"""Examples to rows, and rows to batches, against layouts written out by hand.

And which rows make a batch.
"""

import dataclasses

import pytest
import torch
from sft_cases import batch_of, encoder, example, latent_model

from grpo_latent.data.image_refs import ImageRef
from grpo_latent.errors import DataError
from grpo_latent.models.prompts import encode_prompt
from grpo_latent.sft.common.rows import IGNORED
from grpo_latent.sft.lvr.rows import END_VECTOR, collate_rows
from grpo_latent.trajectory import PositionKind as K


@pytest.fixture(scope="module")
def latent():
    return latent_model("qwen2_5_vl")


@pytest.fixture(scope="module")
def latent_with_end():
    return latent_model("qwen2_5_vl", end=True)


def words(latent, ids):
    return latent.tokenizer.convert_ids_to_tokens([int(token) for token in ids])


IMAGE = ["<|vision_start|>", *["<|image_pad|>"] * 6, "<|vision_end|>"]
SPAN = ["<|lvr_start|>", "<|lvr|>", "<|lvr_end|>"]


def test_layout_of_one_span(latent):
    row = encoder(latent)(example())
    prompt = ["<|im_start|>", "read", "red", "?", *IMAGE, "<|im_end|>"]
    completion = [*SPAN, "<answer>", "7", "</answer>", "<|im_end|>"]
    assert words(latent, row.input_ids) == prompt + completion
    kinds = (
        [K.PROMPT] * 4 + [K.VISION] * 8 + [K.PROMPT, K.START, K.LATENT, K.FORCED] + [K.TEXT] * 4
    )
    assert row.kinds.tolist() == kinds
    assert row.labels.tolist() == [
        IGNORED if kind in (K.PROMPT, K.VISION, K.LATENT) else token
        for kind, token in zip(kinds, row.input_ids.tolist(), strict=True)
    ]
    assert row.roi_N.tolist() == [0] and row.num_visual_tokens == 6


def test_layout_of_spans_between_text_over_two_images(latent):
    boxes = ((0.0, 0.0, 0.3, 0.4), (0.4, 0.1, 1.0, 0.9))
    item = example(
        boxes=boxes,
        box_images=(1, 0),
        num_images=2,
        response="<lvr> red <lvr>\n<answer> 7 </answer>",
        answer="7",
    )
    row = encoder(latent)(item)
    start = row.kinds.tolist().index(K.START)
    four = ["<|lvr_start|>", *["<|lvr|>"] * 4, "<|lvr_end|>"]
    assert words(latent, row.input_ids[start:]) == [
        *SPAN,
        "red",
        *four,
        "<answer>",
        "7",
        "</answer>",
        "<|im_end|>",
    ]
    # the first box lies in the second image (tokens 6..11), the second covers the two right
    # columns of the first one
    assert row.roi_N.tolist() == [6, 1, 2, 4, 5] and row.num_visual_tokens == 12


def test_row_without_an_answer_stops_before_it_and_never_sees_it(latent):
    item = example(answer=None)
    row = encoder(latent)(item)
    assert words(latent, row.input_ids[-4:]) == [*SPAN, "<answer>"]
    assert words(latent, row.labels[row.labels != IGNORED]) == [
        "<|lvr_start|>",
        "<|lvr_end|>",
        "<answer>",
    ]
    told = encoder(latent)(dataclasses.replace(item, answer="7"))
    assert torch.equal(told.input_ids, row.input_ids) and torch.equal(told.labels, row.labels)


def test_end_vector_is_one_more_latent_of_each_span(latent_with_end):
    row = encoder(latent_with_end, has_end_vector=True)(example(boxes=((0.0, 0.0, 0.6, 0.4),)))
    span = row.kinds.tolist()[row.kinds.tolist().index(K.START) :][:5]
    assert span == [K.START, K.LATENT, K.LATENT, K.LATENT, K.FORCED]
    assert row.roi_N.tolist() == [0, 1, END_VECTOR]


def test_a_sampled_end_is_written_by_both_tokens_and_scored():
    """As the published data have it; with the learned end vector that stands for the first."""
    own = dict(latent_end_token="<|lvr_latent_end|>", span_end="sampled")
    plain = latent_model("qwen2_5_vl")
    latent_end_id = plain.tokenizer.convert_tokens_to_ids("<|lvr_latent_end|>")
    for end_vector, tokens, kinds in (
        (False, ["<|lvr|>", "<|lvr_latent_end|>", "<|lvr_end|>"], [K.LATENT, K.END, K.END]),
        (True, ["<|lvr|>", "<|lvr|>", "<|lvr_end|>"], [K.LATENT, K.LATENT, K.END]),
    ):
        mechanism = plain.mechanism.replace(
            **own, latent_end_id=latent_end_id, end_vector=end_vector
        )
        latent = dataclasses.replace(plain, mechanism=mechanism)
        row = encoder(latent, has_end_vector=end_vector)(example())
        start = row.kinds.tolist().index(K.START)
        span = slice(start, start + 4)
        assert words(latent, row.input_ids[span]) == ["<|lvr_start|>", *tokens]
        assert row.kinds[span].tolist() == [K.START, *kinds]
        scored = [
            IGNORED if kind == K.LATENT else int(token)
            for kind, token in zip(row.kinds[span].tolist(), row.input_ids[span], strict=True)
        ]
        assert row.labels[span].tolist() == scored


def test_prompt_is_the_one_that_rollouts_get(latent):
    item = example(num_images=2)
    row = encoder(latent)(item)
    pictures = [image.open() for image in item.images]
    prompt = encode_prompt(latent.tokenizer, latent.processor, item.messages, pictures, "here")
    assert torch.equal(row.input_ids[: len(prompt.ids)], prompt.ids)
    assert row.kinds[len(prompt.ids)] == K.START
    assert torch.equal(row.images.pixel_values, prompt.images.pixel_values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(response="<lvr> <|lvr|> <answer> 7 </answer>"), "reserved token"),
        (dict(response="<lvr> <|image_pad|> <answer> 7 </answer>"), "reserved token"),
        (dict(response="<answer> 7 </answer>"), "spans do not match the boxes"),
        (dict(response="<lvr> <lvr> <answer> 7 </answer>"), "spans do not match the boxes"),
        (dict(images=(ImageRef("row 0: images[0]", data=b"no image"),)), "not a readable image"),
        (dict(images=()), "images do not match the prompt"),
    ],
)
def test_malformed_examples_name_the_row(latent, change, message):
    with pytest.raises(DataError, match=message) as caught:
        encoder(latent)(dataclasses.replace(example(), **change))
    assert "row 0" in str(caught.value)


def test_too_long_rows_are_refused(latent):
    length = len(encoder(latent)(example()).input_ids)
    encoder(latent, max_length=length)(example())
    with pytest.raises(DataError, match="row too long"):
        encoder(latent, max_length=length - 1)(example())


def test_batch_pads_right_and_counts_visual_tokens_over_rows(latent):
    rows = [
        encoder(latent)(item)
        for item in (example(0), example(1, answer=None, boxes=((0.0, 0.0, 0.6, 0.4),)))
    ]
    batch = collate_rows(rows)
    lengths = [len(row.input_ids) for row in rows]
    assert batch["valid"].sum(-1).tolist() == lengths and batch["input_ids"].shape == (
        2,
        max(lengths),
    )
    for row, item in enumerate(rows):
        for name in ("input_ids", "kinds", "labels"):
            assert torch.equal(batch[name][row, : lengths[row]], getattr(item, name))
        assert (batch["labels"][row, lengths[row] :] == IGNORED).all()
    assert batch["roi"].tolist() == [0, 6, 7] and batch["num_visual_tokens"].tolist() == [6, 6]
    assert batch["pixel_values"].shape[0] == 48 and batch["image_grid_thw"].shape == (2, 3)


def test_batch_of_rows_without_images_has_no_pixels(latent):
    text = example(num_images=0, boxes=(), response="<answer> 7 </answer>")
    batch = batch_of(latent, [text, text])
    assert "pixel_values" not in batch and batch["roi"].shape == (0,)
