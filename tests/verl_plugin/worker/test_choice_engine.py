"""Chosen image positions through verl's engine: replay by index.

Drawn choices' log-probs, their gradient, the loss on them.

Does not cover: several ranks; of the packed layout, more than the places (vision models need
flash-attn there).
"""

import dataclasses
from functools import partial

import engine_helpers as helpers
import pytest
import torch
from slot_cases import scored
from test_treated_engine import batch_of, gradients, no_text, text_sum
from verl.utils import tensordict_utils as tu
from verl.workers.utils.padding import no_padding_2_padding

from grpo_latent.errors import ConfigError, LatentMismatchError
from grpo_latent.models import tiny
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.replay import replay
from grpo_latent.models.sequences import collate
from grpo_latent.recorded_fields import NOT_SELECTED
from grpo_latent.trajectory import PositionKind as K
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.worker.choice_forward import ChoiceForward
from grpo_latent.verl_plugin.worker.latent_loss import LatentLoss
from grpo_latent.verl_plugin.worker.micro_batch import MicroBatch

DRAWN = dict(selection="plackett_luce", selection_temperature=0.5)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Gives (case of test_treated_engine.py, gradient of the choices' summed log-probs).

    Made before verl patches anything.
    """
    folder = helpers.make_checkpoint(
        tmp_path_factory.mktemp("model"), tiny.tiny_qwen2_vl, **helpers.SLOTS
    )
    loaded, trajectories, images, rows, positions = helpers.roll_out(
        folder, selection_temperature=0.5, group_size=4
    )
    adapter = ModelAdapter(loaded.model, loaded.mechanism)
    _, log_probs_M = scored(adapter, collate(trajectories, images, adapter, "full"), 0.5)
    log_probs_M.sum().backward()
    own = {
        name: p.grad.clone() for name, p in loaded.model.named_parameters() if p.grad is not None
    }
    parts = log_probs_M.detach().split([int((t.kinds == K.SELECTED).sum()) for t in trajectories])
    rows = [
        row.masked_scatter(t.kinds == K.SELECTED, part)
        for row, t, part in zip(rows, trajectories, parts, strict=True)
    ]
    return (folder, loaded, trajectories, images, rows, positions), own


@pytest.mark.parametrize(
    ("packed", "expected"),
    [
        (False, [[0, 1, 1], [3, 4, 5], [0, 1, 1], [1, 3, 1]]),
        (True, [[0, 0, 0], [3, 8, 9], [0, 0, 0], [1, 7, 5]]),
    ],
)
def test_chosen_places(packed, expected):
    """(row, position, image's row, image position) of each SELECTED position, by hand.

    Packed, the second sequence begins at 4.
    """
    module, _, _ = tiny.tiny_qwen2_vl(words=helpers.WORDS)
    image, chosen = module.config.image_token_id, K.SELECTED
    rows = {
        "prompts": [[image, image, 1], [1, image, image, image]],
        "input_ids": [[image, image, 1, 0], [1, image, image, image, 0, 0]],
        "position_kinds": [
            [K.VISION, K.VISION, K.PROMPT, chosen],
            [K.PROMPT, *3 * [K.VISION], chosen, chosen],
        ],
        "selected_idx": [[*3 * [NOT_SELECTED], 1], [*4 * [NOT_SELECTED], 2, 0]],
    }
    nested = {
        name: torch.nested.nested_tensor(
            [torch.tensor(row) for row in values], layout=torch.jagged
        )
        for name, values in rows.items()
    }
    choices = ChoiceForward(module, top_k_image=2, temperature=None)
    data = tu.get_tensordict(nested, {"use_remove_padding": packed})
    choices.feed(MicroBatch(data))
    assert [places_M.tolist() for places_M in choices.selection._places] == expected


def test_rollout_replay_and_engine_give_one_number(recorded, gloo):
    (folder, loaded, trajectories, images, expected, positions), _ = recorded
    assert len({tuple(t.selected_idx.tolist()) for t in trajectories[:4]}) > 1, (
        "a group must differ in its choices"
    )
    engine = helpers.make_engine(folder, freeze_vision=True, **DRAWN)
    batch = helpers.make_batch(
        trajectories, images, positions, ModelAdapter(loaded.model, loaded.mechanism)
    )
    for row, plain, t in zip(helpers.infer(engine, batch), expected, trajectories, strict=True):
        acted = t.response_mask() | (t.kinds == K.SELECTED)
        assert (row - plain)[acted].abs().max() <= 1e-5
        assert (row - t.rollout_log_probs)[acted].abs().max() <= 1e-4
        assert (t.rollout_log_probs[t.kinds == K.SELECTED] < -0.5).any()


def choice_sum(model_output, data, dp_group=None):
    log_probs_BT = no_padding_2_padding(model_output["log_probs"], data)
    kinds = [
        row[len(row) - n :]
        for row, n in zip(data["position_kinds"].unbind(), lengths(data), strict=True)
    ]
    kinds_BT = torch.nn.utils.rnn.pad_sequence(kinds, batch_first=True)
    return log_probs_BT[kinds_BT == K.SELECTED].sum(), {}


def lengths(data):
    return data["responses"].offsets().diff().tolist()


def test_the_gradient_is_the_replays(recorded, gloo):
    case, own = recorded
    engine = helpers.make_engine(case[0], freeze_vision=True, **DRAWN)
    found, _ = gradients(engine, batch_of(case, False), choice_sum)
    moved = [name for name, grad in found.items() if float(grad.abs().max()) > 0]
    assert any("q_proj" in name for name in moved) and not any("lm_head" in name for name in moved)
    for name in moved:
        scale = float(own[name].abs().max())
        torch.testing.assert_close(
            found[name], own[name], rtol=1e-3, atol=1e-4 * scale + 1e-6, msg=name
        )


def test_choices_have_a_clipped_ratio_of_their_own(recorded, gloo):
    case, _ = recorded
    folder, _, trajectories, _, expected, _ = case
    options = LatentOptions.from_mapping(DRAWN)
    assert options.act_kinds == {int(K.SELECTED)}
    loss = LatentLoss(no_text, options.terms, options.act_kinds, "token-mean")
    engine = helpers.make_engine(folder, freeze_vision=True, **DRAWN)
    batch = batch_of(case, False)
    batch["old_log_probs"] = torch.nested.as_nested_tensor(expected, layout=torch.jagged)
    scores = [(1.0 - 0.4 * i) * t.response_mask().float() for i, t in enumerate(trajectories)]
    batch["advantages"] = torch.nested.as_nested_tensor(scores, layout=torch.jagged)
    found, output = gradients(engine, batch, loss)
    metrics = {
        name: sum(value.values)
        for name, value in output["metrics"].items()
        if name.startswith("latent/")
    }
    assert (
        metrics["latent/ratio_mean"] == pytest.approx(1, abs=1e-4)
        and metrics["latent/clipfrac"] == 0
    )
    taken = torch.cat([t.rollout_log_probs[t.kinds == K.SELECTED] for t in trajectories])
    assert metrics["latent/log_density"] == pytest.approx(float(taken.mean()), abs=1e-4)
    assert max(float(grad.abs().max()) for name, grad in found.items() if "q_proj" in name) > 1e-6


def reference_gradient(loaded, trajectories, images):
    """Gradient of the summed action log-probs by a plain forward that is fed the choices.

    The chosen image embeddings carry their own.
    """
    adapter = ModelAdapter(loaded.model, loaded.mechanism)
    batch = collate(trajectories, images, adapter, "full")
    chosen = [
        adapter.encode_images(image)[t.selected_idx]
        for t, image in zip(trajectories, images, strict=True)
    ]
    is_selected_N = (batch.kinds_BT == K.SELECTED)[batch.recorded_mask_BT]
    latents_NH = batch.latents_NH.index_put((is_selected_N.nonzero()[:, 0],), torch.cat(chosen))
    loaded.model.zero_grad()
    replay(adapter, batch.with_latents(latents_NH), temperature=helpers.TEMPERATURE)[
        0
    ].sum().backward()
    return {
        name: p.grad.clone() for name, p in loaded.model.named_parameters() if p.grad is not None
    }


def test_chosen_embeddings_are_replayed_by_index_into_a_vision_tower_that_trains(recorded, gloo):
    case, _ = recorded
    folder, loaded, trajectories, images, expected, positions = case
    reference = reference_gradient(loaded, trajectories, images)
    spoiled = []
    for t in trajectories:
        is_selected_N = t.kinds[t.latent_mask] == K.SELECTED
        spoiled.append(
            dataclasses.replace(t, latents=t.latents.masked_fill(is_selected_N[:, None], 9.0))
        )
    case = (folder, loaded, spoiled, images, expected, positions)
    engine, seen = helpers.make_engine(folder), []
    found, _ = gradients(engine, batch_of(case, False), partial(text_sum, seen=seen))
    replayed = torch.cat(
        [row[t.response_mask()] for row, t in zip(expected, trajectories, strict=True)]
    )
    assert (torch.cat(seen) - replayed).abs().max() <= 1e-5
    assert any(".visual." in name and float(grad.abs().max()) > 0 for name, grad in found.items())
    for name, grad in found.items():
        scale = float(reference[name].abs().max())
        torch.testing.assert_close(
            grad, reference[name], rtol=1e-3, atol=1e-4 * scale + 1e-6, msg=name
        )


def test_what_cannot_be_scored_is_refused(recorded, gloo, tmp_path):
    case, _ = recorded
    engine = helpers.make_engine(case[0], freeze_vision=True, **DRAWN)
    batch = batch_of(case, False)
    del batch["selected_idx"]
    with pytest.raises(LatentMismatchError, match="batch without the chosen image positions"):
        helpers.infer(engine, batch)
    text = helpers.make_checkpoint(
        tmp_path / "text", tiny.tiny_qwen3, **helpers.SLOTS | dict(top_k_image=0)
    )
    with pytest.raises(
        ConfigError, match="latent.selection: there are no image positions to draw"
    ):
        helpers.make_engine(text, **DRAWN)
    for values in (dict(selection="best"), dict(selection_temperature=0.0)):
        with pytest.raises(ConfigError, match="latent.selection"):
            LatentOptions.from_mapping(values)
