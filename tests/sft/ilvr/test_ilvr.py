"""ILVR's SFT: rows, the teacher's targets against a slow reading, both stages' sums."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ilvr_cases import PLANS, record, write_images
from latent_cases import build_case, case
from omegaconf import OmegaConf

from grpo_latent.data.formats import ilvr_jsonl
from grpo_latent.data.formats.ilvr_jsonl import parse_ilvr_record
from grpo_latent.errors import CheckpointError, DataError, LatentMismatchError
from grpo_latent.models.attention_rows import recording_last_row
from grpo_latent.models.prompts import assistant_header
from grpo_latent.models.tiny import word_tokenizer
from grpo_latent.models.visibility import attention_bias
from grpo_latent.rewards.functions import load_function, specs_from_config
from grpo_latent.rewards.view import reward_view
from grpo_latent.sft.common.rows import IGNORED
from grpo_latent.sft.ilvr import teacher
from grpo_latent.sft.ilvr.forward import stage1_loss_sums, stage2_loss_sums
from grpo_latent.sft.ilvr.rows import ILVREncoder, collate_rows, with_targets
from grpo_latent.sft.ilvr.teacher import teacher_targets
from grpo_latent.trajectory import PositionKind as K
from grpo_latent.trajectory import Trajectory

STEPS = 3


def encoder(c, **changes):
    return ILVREncoder(
        tokenizer=c.tokenizer,
        processor=c.processor,
        mechanism=c.mechanism(steps=STEPS),
        eos_id=c.eos_id,
        vision_ids=c.adapter.vision_ids,
        **changes,
    )


@functools.cache
def examples(folder):
    write_images(folder)
    questions = ("read red ?", "green ? ? ? read blue ?", "?")
    return [
        parse_ilvr_record(record(*plan, question=question), f"row {idx}", folder)
        for idx, (plan, question) in enumerate(zip(PLANS, questions, strict=True))
    ]


@pytest.fixture
def rows(tmp_path_factory):
    return [
        encoder(case("qwen2_5_vl"))(example)
        for example in examples(tmp_path_factory.getbasetemp())
    ]


def test_positions_of_a_row(rows):
    c, row = case("qwen2_5_vl"), rows[0]
    completion = row.kinds > K.VISION
    span = ["<|lvr_start|>"] + ["<|lvr|>"] * STEPS + ["<|lvr_end|>"]
    words = ["read", "red", *span, "3", "?", *span, "<answer>", "7", "</answer>", "<|im_end|>"]
    assert c.tokenizer.convert_ids_to_tokens(row.input_ids[completion].tolist()) == words
    kinds = {"<|lvr_start|>": K.START, "<|lvr|>": K.LATENT, "<|lvr_end|>": K.FORCED}
    assert row.kinds[completion].tolist() == [kinds.get(word, K.TEXT) for word in words]
    expected = [IGNORED if word == "<|lvr|>" else c.token_id(word) for word in words]
    assert (
        row.labels[completion].tolist() == expected and (row.labels[~completion] == IGNORED).all()
    )
    assert (
        row.helper_images.image_grid_thw.tolist() == [[1, 4, 4], [1, 6, 6]]
        and rows[2].helper_images is None
    )


def test_what_follows_an_unknown_text_is_not_scored(tmp_path):
    c = case("qwen2_5_vl")
    write_images(tmp_path)
    plan = [
        {"type": "text", "content": "red"},
        {"type": "latent", "helper_image": "h3.png"},
        {"type": "text", "content": None},
        {"type": "text", "content": "blue ?"},
        {"type": "latent", "helper_image": "h3.png"},
        {"type": "text", "content": None},
    ]
    content = record() | {
        "sequence_plan": plan,
        "original_final_answer": None,
        "has_answer": False,
    }
    row = encoder(c)(parse_ilvr_record(content, "row 1", tmp_path))
    completion = row.kinds > K.VISION
    span = ["<|lvr_start|>"] + ["<|lvr|>"] * STEPS + ["<|lvr_end|>"]
    words = ["red", *span, "blue", "?", *span]
    assert c.tokenizer.convert_ids_to_tokens(row.input_ids[completion].tolist()) == words, "no EOS"
    expected = [IGNORED if word in ("<|lvr|>", "blue") else c.token_id(word) for word in words]
    assert row.labels[completion].tolist() == expected
    assert (
        row.helper_images is not None
        and encoder(c, reads_helpers=False)(
            parse_ilvr_record(content, "row 1", tmp_path)
        ).helper_images
        is None
    )


def test_a_policy_that_writes_what_stage_1_taught_is_rewarded(tmp_path):
    """The published record, read as SFT reads it, is scored as the paper-scale RL scores.

    It is the one of the reader's docstring.
    """
    doc = ilvr_jsonl.__doc__
    published = json.loads(doc[doc.index('{"text_input"') : doc.index("Each helper")])
    c = case("qwen2_5_vl")
    write_images(tmp_path)
    example = parse_ilvr_record(published, "row 0", tmp_path)
    words = " ".join(
        ["Q", *(segment.text for segment in example.segments if segment.text)]
    ).split()
    tokenizer = word_tokenizer(words)
    row = dataclasses.replace(encoder(c), tokenizer=tokenizer)(example)
    ids, kinds = row.input_ids[row.kinds > K.VISION], row.kinds[row.kinds > K.VISION]
    zeros = torch.zeros(len(ids))
    trajectory = Trajectory(row.input_ids, ids, kinds, torch.zeros(STEPS, 32), zeros, zeros, "eos")
    view = reward_view(
        trajectory, functools.partial(tokenizer.decode, skip_special_tokens=False), {c.eos_id}
    )
    config = OmegaConf.load(Path(__file__).parents[3] / "recipes/ilvr/ilvr_grpo.yaml")
    (spec,) = specs_from_config(OmegaConf.to_container(config.latent.reward.functions))
    score = functools.partial(
        load_function(spec), "ilvr", view.solution_str, extra_info={"latent": view.latent}
    )
    assert view.latent["num_spans"] == 1 and view.solution_str.endswith("The answer is B.")
    assert score(example.answer, **spec.kwargs) == 1.0 and score("A", **spec.kwargs) == 0.0


def test_batch_aligns_completions(rows):
    batch = collate_rows(rows)
    for row, source in enumerate(rows):
        for name in ("input_ids", "kinds", "labels"):
            assert torch.equal(batch[name][row][batch["valid"][row]], getattr(source, name))
        starts = {
            int((values[valid] <= K.VISION).sum() + valid.long().argmax())
            for values, valid in zip(batch["kinds"], batch["valid"], strict=True)
        }
    assert len(starts) == 1 and len({len(row.input_ids) for row in rows}) == 3


@torch.no_grad()
def plain_hidden(c, row):
    """Last hidden states [T, H] of an ordinary forward, latents as placeholder tokens."""
    output = c.model(
        input_ids=row.input_ids[None],
        mm_token_type_ids=(row.input_ids == c.adapter.image_token_id).int()[None],
        pixel_values=row.images.pixel_values,
        image_grid_thw=row.images.image_grid_thw,
        output_hidden_states=True,
        use_cache=False,
    )
    return output.hidden_states[-1][0]


def count_forwards(c, action):
    calls = []
    handle = c.adapter.decoder.register_forward_hook(lambda *_: calls.append(1))
    result = action()
    handle.remove()
    return result, len(calls)


def test_targets_of_a_batch_equal_those_of_single_rows_in_one_forward(rows):
    c, batch = case("qwen2_5_vl"), collate_rows(rows)
    targets, num_forwards = count_forwards(c, lambda: teacher_targets(c.adapter, batch, "full"))
    assert num_forwards == 1 and len(targets) == 4
    single = [t for row in rows for t in teacher_targets(c.adapter, collate_rows([row]), "full")]
    for first, second in zip(targets, single, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-4)
    assert [len(t) for t in targets] == [STEPS, STEPS, 1, STEPS], "h3 has one token"


@torch.no_grad()
def test_targets_against_a_slow_reading(rows):
    """Both spans of row 0, by loops over heads and positions.

    The recorded queries and keys have their own test.
    """
    c, row = case("qwen2_5_vl"), rows[0]
    batch = collate_rows([row])
    hidden_TH = plain_hidden(c, row)
    vision = c.model.model.get_image_features(
        row.helper_images.pixel_values, row.helper_images.image_grid_thw
    ).pooler_output
    is_image = row.input_ids == c.adapter.image_token_id
    is_question = row.kinds == K.PROMPT
    with recording_last_row(c.adapter.text_config, keep_last_layer=True) as recorder:
        c.adapter.forward_hidden(
            batch["input_ids"],
            attention_bias(batch["kinds"], batch["valid"], "full", torch.float32),
            c.adapter.position_ids(batch["input_ids"], batch["valid"], row.images),
            row.images,
        )
    queries, keys = recorder.queries_BATD[0], recorder.keys_BASD[0]
    weights = torch.zeros(int(is_image.sum()))
    for head in range(queries.shape[0]):
        for position in is_question.nonzero()[:, 0].tolist():
            scores = [
                float(queries[head, position] @ keys[0, m]) / 4
                for m in is_image.nonzero()[:, 0].tolist()
            ]
            weights += torch.tensor(scores).softmax(0)
    weights /= queries.shape[0] * int(is_question.sum())
    u = (hidden_TH[is_question].mean(0) + (weights[:, None] * hidden_TH[is_image]).sum(0)) / 2
    start = int((row.kinds <= K.VISION).sum())
    first_query = (u + hidden_TH[start : start + 2].mean(0)) / 2
    first = targets_by_hand(first_query, vision[0])
    text = hidden_TH[start + 2 + STEPS + 2 : start + 2 + STEPS + 4].mean(0)
    second = targets_by_hand((u + text + first.mean(0)) / 3, vision[1])
    for found, expected in zip(
        teacher_targets(c.adapter, batch, "full"), (first, second), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


HEADED = "{%- if add_generation_prompt -%}<|im_start|> read {%- endif -%}"


@torch.no_grad()
def test_the_assistants_header_is_no_question_and_no_text(tmp_path, monkeypatch):
    """With a header of two tokens: the same query as by hand, over what stands before it."""
    c = case("qwen2_5_vl")
    example = examples(tmp_path)[0]
    template = (c.tokenizer.chat_template or c.processor.chat_template) + HEADED
    monkeypatch.setattr(c.tokenizer, "chat_template", template)
    monkeypatch.setattr(c.processor, "chat_template", template)
    row = encoder(c)(example)
    prompt_length = int((row.kinds <= K.VISION).sum())
    header = c.tokenizer.convert_ids_to_tokens(row.input_ids[prompt_length - 2 : prompt_length])
    assert header == ["<|im_start|>", "read"] and row.header_length == 2
    asked = []
    monkeypatch.setattr(
        teacher,
        "question_vector",
        lambda text_QH, image_MH, weights_M: asked.append(text_QH) or text_QH.mean(0),
    )
    texts = []
    monkeypatch.setattr(
        teacher,
        "span_query",
        lambda question_H, text_TH, selected_NH: texts.append(text_TH) or question_H,
    )
    # a longer prompt beside it: the columns of padding are no header
    longer = dataclasses.replace(
        row,
        input_ids=torch.cat([row.input_ids[:1], row.input_ids]),
        kinds=torch.cat([row.kinds[:1], row.kinds]),
        labels=torch.cat([row.labels[:1], row.labels]),
    )
    batch = collate_rows([row, longer])
    assert batch["header_lengths"].tolist() == [2, 2]
    teacher_targets(c.adapter, batch, "full")
    hidden_TH = plain_hidden(c, row)
    is_question = row.kinds == K.PROMPT
    is_question[prompt_length - 2 : prompt_length] = False
    torch.testing.assert_close(asked[0], hidden_TH[is_question], rtol=0, atol=1e-4)
    torch.testing.assert_close(
        texts[0], hidden_TH[prompt_length : prompt_length + 2], rtol=0, atol=1e-4
    )
    assert len(asked[1]) == len(asked[0]) + 1


def test_a_template_that_ends_otherwise_is_an_error(monkeypatch):
    c = case("qwen2_5_vl")
    ids = c.tokenizer("read red ?", return_tensors="pt").input_ids[0]
    assert assistant_header(c.tokenizer, c.processor, ids) == 0
    template = (c.tokenizer.chat_template or c.processor.chat_template) + HEADED
    monkeypatch.setattr(c.tokenizer, "chat_template", template)
    monkeypatch.setattr(c.processor, "chat_template", template)
    with pytest.raises(CheckpointError, match="does not end prompts by a header"):
        assistant_header(c.tokenizer, c.processor, ids)


def targets_by_hand(query, tokens):
    cosines = [float(F.cosine_similarity(query, token, dim=0)) for token in tokens]
    order = sorted(range(len(cosines)), key=lambda i: -cosines[i])
    return tokens[order[:STEPS]]


def test_targets_become_latents_and_the_rest_placeholders(rows):
    c, batch = case("qwen2_5_vl"), collate_rows(rows)
    targets = [torch.full((count, 32), float(idx)) for idx, count in enumerate((2, 3, 1, 3))]
    placed = with_targets(batch, targets, 32)
    is_latent_BT = placed["kinds"] == K.LATENT
    assert (
        is_latent_BT.sum(-1).tolist() == [5, 4, 0]
        and placed["targets"][:, 0].tolist() == [0] * 2 + [1] * 3 + [2] + [3] * 3
    )
    dropped_BT = (batch["kinds"] == K.LATENT) & ~is_latent_BT
    assert (placed["kinds"][dropped_BT] == K.FORCED).all() and (
        placed["labels"][dropped_BT] == IGNORED
    ).all()
    assert (placed["input_ids"][dropped_BT] == c.token_id("<|lvr|>")).all()
    first_span = (batch["kinds"][0] == K.LATENT).nonzero()[:STEPS, 0]
    assert placed["kinds"][0, first_span].tolist() == [K.LATENT, K.LATENT, K.FORCED]
    for wrong in (
        targets[:3],
        [torch.zeros(4, 32), *targets[1:]],
        [torch.zeros(0, 32), *targets[1:]],
    ):
        with pytest.raises(LatentMismatchError, match="do not fit the spans"):
            with_targets(batch, wrong, 32)
    with pytest.raises(LatentMismatchError, match="helper images do not match the spans"):
        teacher_targets(c.adapter, {k: v for k, v in batch.items() if "helper" not in k}, "full")


def test_stage_1_sums_equal_plain_forwards_row_by_row(rows):
    c = case("qwen2_5_vl")
    batch = collate_rows(rows)
    targets = teacher_targets(c.adapter, batch, "full")
    sums = stage1_loss_sums(
        c.adapter, with_targets(batch, targets, 32), c.mechanism(), noise_std=0.0
    )
    ce = distance = 0.0
    remaining = list(targets)
    for row in rows:
        embeds = c.model.get_input_embeddings()(row.input_ids).clone()
        numbers = (row.kinds == K.LATENT).nonzero()[:, 0].tolist()
        pairs = []
        for start in numbers[::STEPS]:
            rows_of_span = remaining.pop(0)
            embeds[start : start + len(rows_of_span)] = rows_of_span
            pairs += [(start + k - 1, target) for k, target in enumerate(rows_of_span)]
        position_ids = c.adapter.position_ids(
            row.input_ids[None], torch.ones(1, len(row.input_ids), dtype=torch.bool), row.images
        )
        with torch.no_grad():
            output = c.model(
                inputs_embeds=embeds[None],
                position_ids=position_ids,
                pixel_values=row.images.pixel_values,
                image_grid_thw=row.images.image_grid_thw,
                output_hidden_states=True,
                use_cache=False,
            )
        ce += float(F.cross_entropy(output.logits[0, :-1], row.labels[1:], reduction="sum"))
        hidden_TH = output.hidden_states[-1][0]
        distance += sum(
            1 - float(F.cosine_similarity(hidden_TH[t], target, dim=0)) for t, target in pairs
        )
    assert sums["ce"].item() == pytest.approx(ce, rel=1e-4) and sums[
        "latent"
    ].item() == pytest.approx(distance, abs=1e-3)


def test_stage_2_feeds_its_own_latents_and_reaches_them_with_the_gradient(rows):
    values = {}
    for gradient in ("cut", "bptt"):
        c = build_case("qwen2_5_vl")
        batch = collate_rows(rows)
        sums = stage2_loss_sums(c.adapter, batch, c.mechanism(), gradient)
        sums["ce"].backward()
        values[gradient] = (
            sums["ce"].item(),
            c.adapter.decoder.layers[0].mlp.up_proj.weight.grad.clone(),
        )
    assert values["cut"][0] == pytest.approx(values["bptt"][0], rel=1e-5)
    assert float((values["cut"][1] - values["bptt"][1]).norm()) > 1e-3 * float(
        values["bptt"][1].norm()
    )


def test_reserved_tokens_and_long_rows_are_errors(tmp_path):
    c = case("qwen2_5_vl")
    write_images(tmp_path)
    example = parse_ilvr_record(record("red <|lvr|>"), "row 5", tmp_path)
    with pytest.raises(DataError, match="^row 5: a reserved token"):
        encoder(c)(example)
    with pytest.raises(DataError, match="^row 5: row too long"):
        encoder(c, max_length=10)(parse_ilvr_record(record("red"), "row 5", tmp_path))
