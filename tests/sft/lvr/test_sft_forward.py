"""Targets align with h at t - 1; teacher-forced inputs are what a rollout feeds.

The reference forward below is written with Hugging Face alone: inputs_embeds put together by hand,
one row at a time. Not covered: videos.
"""

import pytest
import torch
import torch.nn.functional as F
from latent_cases import VL_NAMES, sampling
from sft_cases import batch_of, encoder, example, latent_model, png

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.data.image_refs import ImageRef
from grpo_latent.errors import LatentMismatchError
from grpo_latent.latent.mechanisms.lvr import end_vector
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.rollout.protocol import LatentOverride, RolloutRequest
from grpo_latent.sft.common.images import visual_embeddings
from grpo_latent.sft.common.parameters import freeze_vision
from grpo_latent.sft.common.rows import IGNORED
from grpo_latent.sft.lvr import forward as forward_module
from grpo_latent.sft.lvr.forward import loss_sums, teacher_forced
from grpo_latent.sft.lvr.losses import LVRLossConfig
from grpo_latent.sft.lvr.rows import LVRRow, collate_rows
from grpo_latent.trajectory import PositionKind as K

ROWS = [
    example(
        0,
        boxes=((0.0, 0.0, 0.6, 0.4), (0.7, 0.6, 1.0, 1.0)),
        response="red <lvr> blue <lvr> <answer> 7 </answer>",
    ),
    example(1, answer=None),
    example(
        2, num_images=2, boxes=((0.0, 0.0, 1.0, 1.0),), box_images=(1,), question="read blue red ?"
    ),
]


def fed_back(model, hidden):
    """What is fed of a hidden state: the head's output if there is a head.

    Without the mechanism's own code.
    """
    head = getattr(model, "lvr_head", None)
    return hidden if head is None else head(hidden)


def reference_row(latent, row, loss, shift=1):
    """(CE sum, latent sum, end sum) of one row, from a forward put together by hand."""
    model, base = latent.model, latent.model.model
    output = base.visual(row.images.pixel_values, grid_thw=row.images.image_grid_thw)
    visual, deepstack = output.pooler_output, getattr(output, "deepstack_features", None)
    ids = row.input_ids
    inputs, used, targets = [], 0, []
    rois = iter(row.roi_N.tolist())
    for token, kind in zip(ids.tolist(), row.kinds.tolist(), strict=True):
        if token == model.config.image_token_id:
            inputs.append(visual[used])
            used += 1
        elif kind == K.LATENT:
            roi = next(rois)
            targets.append(model.lvr_latent_end_emb if roi < 0 else visual[roi])
            inputs.append(targets[-1])
        else:
            inputs.append(base.get_input_embeddings().weight[token])
    is_image = (ids == model.config.image_token_id)[None]
    positions, _ = base.get_rope_index(
        ids[None], mm_token_type_ids=is_image.int(), image_grid_thw=row.images.image_grid_thw
    )
    extra = (
        {}
        if deepstack is None
        else dict(visual_pos_masks=is_image, deepstack_visual_embeds=deepstack)
    )
    hidden = base.language_model(
        inputs_embeds=torch.stack(inputs)[None], position_ids=positions, use_cache=False, **extra
    ).last_hidden_state[0]
    logits = model.lm_head(hidden)
    ce, latent_sum, end = 0.0, 0.0, 0.0
    latent_positions = [t for t, kind in enumerate(row.kinds.tolist()) if kind == K.LATENT]
    for t, label in enumerate(row.labels.tolist()):
        if label != IGNORED:
            ce -= logits[t - 1].log_softmax(-1)[label]
    for t, target in zip(latent_positions, targets, strict=True):
        predicted, target = fed_back(model, hidden[t - shift]), target.detach()
        latent_sum += {
            "mse": lambda p, v: ((p - v) ** 2).mean(),
            "mae": lambda p, v: (p - v).abs().mean(),
            "cosine": lambda p, v: 1 - p @ v / (p.norm() * v.norm()),
        }[loss.latent_loss](predicted, target)
        probability = logits[t].softmax(-1)[latent.mechanism.end_id]
        end -= probability.log() if row.kinds[t + 1] != K.LATENT else (1 - probability).log()
    return ce, latent_sum, end


@pytest.mark.parametrize("name", VL_NAMES)
@pytest.mark.parametrize(
    ("loss", "head"),
    [
        (LVRLossConfig(), "none"),
        (LVRLossConfig(latent_loss="mae", end="mode_switch"), "mlp"),
        (LVRLossConfig(latent_loss="cosine", end="latent_end"), "glu"),
    ],
    ids=["mse", "mae-mode_switch-mlp", "cosine-latent_end-glu"],
)
def test_sums_are_those_of_a_forward_written_by_hand(name, loss, head):
    has_end = loss.end == "latent_end"
    latent = latent_model(name, head=head, end=has_end)
    rows = [encoder(latent, has_end)(item) for item in ROWS]
    with torch.no_grad():
        sums = loss_sums(
            ModelAdapter(latent.model, latent.mechanism),
            collate_rows(rows),
            latent.mechanism,
            loss,
        )
        expected = [
            sum(parts)
            for parts in zip(*(reference_row(latent, row, loss) for row in rows), strict=True)
        ]
        shifted = sum(reference_row(latent, row, loss, shift=0)[1] for row in rows)
    torch.testing.assert_close(sums["ce"], expected[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums["latent"], expected[1], rtol=1e-5, atol=1e-4)
    if loss.end == "mode_switch":
        torch.testing.assert_close(sums["end"], expected[2], rtol=1e-4, atol=1e-4)
    else:
        assert "end" not in sums
    assert abs(float(shifted - expected[1])) > 0.01, "the reference would notice a shift by one"


@pytest.mark.parametrize("name", VL_NAMES)
@pytest.mark.parametrize("visibility", ["full", "latents_only"])
def test_training_on_what_a_rollout_did_scores_what_the_rollout_reported(name, visibility):
    """The same vectors fed give the same log-probs and the same next vectors.

    Teacher forcing is inference.
    """
    latent = latent_model(name, head="mlp", visibility=visibility, steps=2)
    row = encoder(latent)(ROWS[0])
    length = int((row.labels != IGNORED).nonzero()[0, 0])
    adapter = ModelAdapter(latent.model, latent.mechanism)
    with torch.no_grad():
        visual = visual_embeddings(adapter, row.images)
    # every span of the rollout is fed visual tokens 4, 1, 4, 1, …
    fed = torch.tensor([4, 1] * 12)
    banned = set(range(len(latent.tokenizer))) - {
        latent.mechanism.start_id,
        latent.tokenizer.eos_token_id,
    }
    engine = HFRolloutEngine(latent.model, latent.mechanism, latent.eos_ids, banned)
    request = RolloutRequest(
        row.input_ids[:length],
        [1, 2, 3, 4],
        row.images,
        latent_override=LatentOverride(visual[fed]),
    )
    (group,) = engine.generate([request], sampling(12))
    seen_spans = 0
    for trajectory in group:
        seen_spans += len(trajectory.spans)
        sampled = (trajectory.kinds == K.TEXT) | (trajectory.kinds == K.START)
        labels = torch.where(sampled, trajectory.token_ids, IGNORED)
        as_row = LVRRow(
            input_ids=torch.cat([trajectory.prompt_ids, trajectory.token_ids]),
            kinds=torch.cat([adapter.prompt_kinds(trajectory.prompt_ids), trajectory.kinds]),
            labels=torch.cat([torch.full((length,), IGNORED), labels]),
            roi_N=fed[: trajectory.latents.shape[0]],
            images=row.images,
            num_visual_tokens=row.num_visual_tokens,
        )
        with torch.no_grad():
            sums = loss_sums(adapter, collate_rows([as_row]), latent.mechanism, LVRLossConfig())
        torch.testing.assert_close(
            sums["ce"], -trajectory.rollout_log_probs.sum(), rtol=1e-4, atol=1e-4
        )
    assert seen_spans >= 2


@pytest.mark.parametrize("visibility", ["full", "latents_only"])
def test_the_prediction_is_what_a_rollout_would_feed(visibility):
    latent = latent_model("qwen2_5_vl", head="mlp", visibility=visibility, steps=1)
    row = encoder(latent)(example())
    length = int((row.labels != IGNORED).nonzero()[0, 0])
    banned = set(range(len(latent.tokenizer))) - {latent.mechanism.start_id}
    engine = HFRolloutEngine(
        latent.model, latent.mechanism, latent.eos_ids, banned | set(latent.eos_ids)
    )
    request = RolloutRequest(row.input_ids[:length], [1], row.images)
    ((trajectory,),) = engine.generate([request], sampling(2))
    assert trajectory.kinds.tolist() == [K.START, K.LATENT]
    adapter = ModelAdapter(latent.model, latent.mechanism)
    with torch.no_grad():
        target = visual_embeddings(adapter, row.images)[row.roi_N]
        distance = ((trajectory.latents - target) ** 2).mean(-1).sum()
        sums = loss_sums(adapter, collate_rows([row]), latent.mechanism, LVRLossConfig())
    torch.testing.assert_close(sums["latent"], distance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("term", ["ce", "latent", "end"])
def test_each_term_reads_its_own_positions_only(monkeypatch, term):
    latent = latent_model("qwen2_5_vl")
    batch = batch_of(latent, ROWS)
    hidden = torch.randn(*batch["input_ids"].shape, 32, requires_grad=True)
    monkeypatch.setattr(forward_module, "replay_hidden", lambda *args: hidden)
    sums = loss_sums(
        ModelAdapter(latent.model, latent.mechanism),
        batch,
        latent.mechanism,
        LVRLossConfig(end="mode_switch"),
    )
    sums[term].backward()
    read = hidden.grad.abs().sum(-1) > 0
    following = {
        "ce": batch["labels"] != IGNORED,
        "latent": batch["kinds"] == K.LATENT,
    }
    expected = (
        batch["kinds"] == K.LATENT if term == "end" else F.pad(following[term][:, 1:], (0, 1))
    )
    assert torch.equal(read, expected)
    completion = batch["kinds"].ge(K.TEXT) & batch["valid"]
    labelled = completion & (batch["kinds"] != K.LATENT)
    assert torch.equal(batch["labels"] != IGNORED, labelled), (
        "start and end are scored, latents are not"
    )


def test_ids_at_latent_positions_change_nothing():
    latent = latent_model("qwen2_vl")
    adapter = ModelAdapter(latent.model, latent.mechanism)
    batch = batch_of(latent, ROWS)
    with torch.no_grad():
        before = loss_sums(adapter, batch, latent.mechanism, LVRLossConfig())
        for placeholder in (
            latent.tokenizer.eos_token_id,
            latent.mechanism.start_id,
            latent.mechanism.end_id,
        ):
            ids = batch["input_ids"].masked_fill(batch["kinds"] == K.LATENT, placeholder)
            after = loss_sums(
                adapter, batch | {"input_ids": ids}, latent.mechanism, LVRLossConfig()
            )
            assert all(torch.equal(before[name], after[name]) for name in before)


def test_target_variance_divides_the_latent_term_only():
    latent = latent_model("qwen2_vl")
    batch, adapter = batch_of(latent, ROWS), ModelAdapter(latent.model, latent.mechanism)
    with torch.no_grad():
        plain = loss_sums(adapter, batch, latent.mechanism, LVRLossConfig())
        scaled = loss_sums(adapter, batch, latent.mechanism, LVRLossConfig(), target_variance=4.0)
    assert torch.equal(plain["ce"], scaled["ce"])
    torch.testing.assert_close(scaled["latent"], plain["latent"] / 4)


@pytest.mark.parametrize(
    ("tower", "merger", "trained", "frozen"),
    [
        (True, True, (), ("blocks", "patch_embed", "merger", "deepstack")),
        (True, False, ("merger", "deepstack"), ("blocks", "patch_embed")),
        (False, False, ("blocks", "patch_embed", "merger", "deepstack"), ()),
        (False, True, ("blocks", "patch_embed"), ("merger", "deepstack")),
    ],
)
def test_frozen_parts_get_no_gradient(tower, merger, trained, frozen):
    latent = latent_model("qwen3_vl", head="mlp", end=True)
    freeze_vision(latent.model, tower, merger)
    batch = batch_of(latent, ROWS, has_end_vector=True)
    sums = loss_sums(
        ModelAdapter(latent.model, latent.mechanism),
        batch,
        latent.mechanism,
        LVRLossConfig(end="latent_end"),
    )
    (sums["ce"] + sums["latent"]).backward()
    moved = {
        name for name, parameter in latent.model.named_parameters() if parameter.grad is not None
    }
    for part in trained:
        assert any(f"visual.{part}" in name for name in moved), part
    for part in frozen:
        assert not any(f"visual.{part}" in name for name in moved), part
    decoder = {name for name, _ in latent.model.named_parameters() if "visual." not in name}
    assert decoder <= moved, "decoder, head and end vector train"


def test_targets_are_constants_and_the_end_vector_is_not():
    latent = latent_model("qwen2_5_vl", head="mlp", end=True)
    model = latent.model
    with torch.no_grad():  # the prediction no longer depends on anything but the head's bias
        model.lvr_head.mlp[2].weight.zero_()
    batch = batch_of(latent, ROWS, has_end_vector=True)
    loss_sums(
        ModelAdapter(model, latent.mechanism),
        batch,
        latent.mechanism,
        LVRLossConfig(end="latent_end"),
    )["latent"].backward()
    gradients = [
        parameter.grad
        for parameter in model.model.visual.parameters()
        if parameter.grad is not None
    ]
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients)
    # 2 (v - b) / H for each of the four spans
    expected = 4 * 2 * (end_vector(model) - model.lvr_head.mlp[2].bias) / 32
    torch.testing.assert_close(model.lvr_latent_end_emb.grad, expected.detach())


def test_hits_count_predictions_with_a_visual_target():
    latent = latent_model("qwen2_5_vl", end=True)
    batch = batch_of(latent, ROWS, has_end_vector=True)
    with torch.no_grad():
        sums = loss_sums(
            ModelAdapter(latent.model, latent.mechanism),
            batch,
            latent.mechanism,
            LVRLossConfig(end="latent_end"),
            count_hits=True,
        )
    assert float(sums["num_targets"]) == float((batch["roi"] >= 0).sum()) < batch["roi"].shape[0]
    assert 0 <= float(sums["hits"]) <= float(sums["num_targets"])


@pytest.mark.parametrize(("roi", "vector"), [([6], None), ([-1], None), ([-2], torch.ones(3))])
def test_a_latent_without_a_target_is_refused(roi, vector):
    with pytest.raises(LatentMismatchError, match="without a target"):
        teacher_forced(torch.zeros(6, 3), torch.tensor(roi), vector)


def test_swapping_the_image_under_the_same_latents_moves_no_text_behind_the_bottleneck():
    """With one latent a span, CE after `start` cannot see the image.

    The leak test of SFT's own forward.
    """
    latent = latent_model("qwen2_5_vl", visibility="latents_only", steps=1)
    adapter = ModelAdapter(latent.model, latent.mechanism)
    encode = encoder(latent)
    row, other = encode(example(0)), encode(example(5))
    assert torch.equal(row.input_ids, other.input_ids)
    labels = row.labels.clone()
    labels[labels == latent.mechanism.start_id] = (
        IGNORED  # the first response token is predicted by a sighted row
    )
    with torch.no_grad():
        visual = visual_embeddings(adapter, row.images)
        ces = {}
        for name, images in (("own", row.images), ("other", other.images)):
            batch = collate_rows(
                [
                    LVRRow(
                        row.input_ids, row.kinds, labels, row.roi_N, images, row.num_visual_tokens
                    )
                ]
            )
            for channel in ("latents_only", "full"):
                config = latent.mechanism.replace(visibility=channel)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(
                        forward_module, "teacher_forced", lambda _, roi, vector: visual[roi]
                    )
                    ces[name, channel] = loss_sums(adapter, batch, config, LVRLossConfig())["ce"]
    assert torch.equal(ces["own", "latents_only"], ces["other", "latents_only"])
    assert abs(float(ces["own", "full"] - ces["other", "full"])) > 1e-3


def test_images_of_a_row_are_counted_in_order():
    """The box's image decides the target, also when the images differ in size."""
    latent = latent_model("qwen2_5_vl")
    item = example(3, num_images=2, boxes=((0.0, 0.0, 0.2, 0.2),), box_images=(1,))
    wide = ImageRef("row 3: images[0]", data=png(99, size=(28, 84)))
    row = encoder(latent)(item.__class__(**{**vars(item), "images": (wide, item.images[1])}))
    adapter = ModelAdapter(latent.model, latent.mechanism)
    with torch.no_grad():
        visual = visual_embeddings(adapter, row.images)
        second = visual_embeddings(
            adapter, ImageInputs(row.images.pixel_values[48:], row.images.image_grid_thw[1:])
        )
    torch.testing.assert_close(visual[row.roi_N[0]], second[0], rtol=1e-5, atol=1e-5)
