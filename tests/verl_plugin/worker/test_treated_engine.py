"""Treatments through verl's engine, in one process: log-densities, gradients, the loss.

Gradients are those of recomputed latents.

Does not cover: several ranks (test_two_ranks.py), Ray and TransferQueue (test_training.py).
"""

from functools import partial

import engine_helpers as helpers
import pytest
import torch
from verl.workers.utils.padding import no_padding_2_padding

from grpo_latent.errors import ConfigError, LatentMismatchError
from grpo_latent.latent.treatments import parse_treatment
from grpo_latent.models import tiny
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.recompute import GRADIENTS, recompute_latents
from grpo_latent.models.replay import replay
from grpo_latent.models.sequences import collate
from grpo_latent.trajectory import PositionKind as K
from grpo_latent.verl_plugin.trainer.replay_gap import state_error_metrics
from grpo_latent.verl_plugin.worker.latent_loss import LatentLoss
from grpo_latent.verl_plugin.worker.treated_forward import STATE_ERRORS

GAUSSIAN = {"name": "gaussian", "gaussian": {"sigma": 0.5}}
GUMBEL = {"name": "gumbel_soft", "gumbel_soft": {"top_k": 4}}
VMF = {"name": "vmf", "vmf": {"kappa": 20.0}}
# treatment, model, packed, visibility, spans a completion may open
CASES = {
    "gaussian": (GAUSSIAN, tiny.tiny_qwen2_5_vl, False, "full", dict(max_spans=3, head="mlp")),
    "gaussian latents_only": (
        GAUSSIAN,
        tiny.tiny_qwen2_5_vl,
        False,
        "latents_only",
        dict(max_spans=1),
    ),
    "gaussian packed": (GAUSSIAN, tiny.tiny_qwen3, True, "full", dict(max_spans=3)),
    "gumbel_soft": (GUMBEL, tiny.tiny_qwen2_5_vl, False, "latents_only", dict(max_spans=3)),
    "gumbel_soft packed": (GUMBEL, tiny.tiny_qwen3, True, "full", dict(max_spans=1)),
    "vmf": (VMF, tiny.tiny_qwen2_5_vl, False, "full", dict(max_spans=3, head="mlp")),
    "recompute": (
        {"name": "recompute"},
        tiny.tiny_qwen2_5_vl,
        False,
        "full",
        dict(max_spans=3, head="mlp"),
    ),
    "recompute latents_only": (
        {"name": "recompute"},
        tiny.tiny_qwen2_5_vl,
        False,
        "latents_only",
        dict(max_spans=3),
    ),
    "recompute packed": ({"name": "recompute"}, tiny.tiny_qwen3, True, "full", dict(max_spans=3)),
    "recompute slots": ({"name": "recompute"}, tiny.tiny_qwen2_5_vl, False, "full", helpers.SLOTS),
    "recompute coconut": (
        {"name": "recompute"},
        tiny.tiny_qwen3,
        True,
        "full",
        helpers.SLOTS | {"top_k_image": 0},
    ),
}
DENSITIES = [name for name in CASES if not name.startswith("recompute")]
RECOMPUTED = {
    "recompute": GRADIENTS,
    "recompute latents_only": ("bptt",),
    "recompute packed": ("one_hop", "bptt"),
    "recompute slots": ("bptt",),
    "recompute coconut": ("bptt",),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Makes rollouts, replays and reference gradients before verl patches transformers."""
    cases = {}
    for name, (values, build, _, visibility, changes) in CASES.items():
        folder = helpers.make_checkpoint(tmp_path_factory.mktemp("model"), build, **changes)
        rolled = helpers.roll_out(folder, visibility, parse_treatment(values)[0])
        references = reference_gradients(*rolled[:3], visibility, RECOMPUTED.get(name, ()))
        cases[name] = (folder, *rolled, references)
    return cases


def reference_gradients(loaded, trajectories, images, visibility, gradients) -> dict[str, dict]:
    """Gradients of the summed action log-probs, by `own_latents`.

    test_recompute.py compares that with finite differences.
    """
    adapter, found = ModelAdapter(loaded.model, loaded.mechanism), {}
    batch = collate(trajectories, images, adapter, visibility, "both")
    for gradient in gradients:
        loaded.model.zero_grad()
        latents_NH = recompute_latents(adapter, batch, gradient)
        latents_NH = latents_NH.detach() if gradient == "cut" else latents_NH
        log_probs_BT, _ = replay(
            adapter, batch.with_latents(latents_NH), temperature=helpers.TEMPERATURE
        )
        log_probs_BT.sum().backward()
        found[gradient] = {
            n: p.grad.clone() for n, p in loaded.model.named_parameters() if p.grad is not None
        }
    return found


def batch_of(case, packed, micro=2, **changes):
    _, loaded, trajectories, images, _, positions = case[:6]
    batch = helpers.make_batch(
        trajectories, images, positions, ModelAdapter(loaded.model, loaded.mechanism)
    )
    return helpers.lay_out(batch, packed, micro, global_batch_size=len(trajectories), **changes)


def gradients(engine, batch, loss):
    with engine.train_mode(disable_auto_offload=True):
        engine.optimizer_zero_grad()
        output = engine.forward_backward_batch(batch, loss)
        grads = {
            n: p.grad.full_tensor().clone()
            for n, p in engine.module.named_parameters()
            if p.grad is not None
        }
    return grads, output


def text_sum(model_output, data, dp_group=None, seen=None):
    """Sum of the action log-probs."""
    log_probs_BT = no_padding_2_padding(model_output["log_probs"], data)
    mask_BT = torch.nested.to_padded_tensor(data["response_mask"], 0).bool()
    if seen is not None:
        seen.append(log_probs_BT.detach()[mask_BT])
    return log_probs_BT[mask_BT].sum(), {}


@pytest.mark.parametrize("name", DENSITIES)
def test_log_densities_stand_at_the_latents(name, recorded, gloo):
    """Rollout, plain replay and verl's engine give one number, at actions and at latents."""
    values, _, packed, visibility, _ = CASES[name]
    folder, loaded, trajectories, images, expected, positions, _ = recorded[name]
    engine = helpers.make_engine(folder, packed, visibility=visibility, treatment=values)
    batch = helpers.make_batch(
        trajectories, images, positions, ModelAdapter(loaded.model, loaded.mechanism)
    )
    rows = helpers.infer(engine, batch, packed)
    for row, plain, trajectory in zip(rows, expected, trajectories, strict=True):
        acted = trajectory.response_mask() | trajectory.latent_mask
        assert (row - plain)[acted].abs().max() <= 1e-4
        assert (row - trajectory.rollout_log_probs)[acted].abs().max() <= 1e-4
    densities = torch.cat([row[t.latent_mask] for row, t in zip(rows, trajectories, strict=True)])
    assert len(densities) >= 3 and densities.std() > 1e-2


def test_latents_of_another_row_are_other_densities(recorded, gloo):
    """Negative control, and what a shifted pairing would do."""
    folder, loaded, trajectories, images, expected, positions, _ = recorded["gaussian"]
    engine = helpers.make_engine(folder, treatment=GAUSSIAN)
    batch = helpers.make_batch(
        trajectories, images, positions, ModelAdapter(loaded.model, loaded.mechanism)
    )
    rows = [row.roll(1, 0) for row in batch["latent_embeds"].unbind()]
    batch["latent_embeds"] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    pairs = zip(helpers.infer(engine, batch), expected, trajectories, strict=True)
    assert max((a - b)[t.latent_mask].abs().max() for a, b, t in pairs if len(t.latents)) > 0.1


@pytest.mark.parametrize("name", RECOMPUTED)
def test_the_old_policys_pass_measures_how_latents_replay(name, recorded, gloo):
    """Rounding for what was recorded.

    For one vector that was changed, its own change, at its own place.
    """
    _, _, packed, visibility, _ = CASES[name]
    folder, _, trajectories, *_ = recorded[name]
    engine = helpers.make_engine(
        folder, packed, freeze_vision=name == "recompute slots", visibility=visibility
    )

    def errors_of(batch):
        with engine.eval_mode(disable_auto_offload=True):
            rows = engine.infer_batch(batch)["model_output"][STATE_ERRORS].unbind()
        assert [len(row) for row in rows] == [
            int((t.kinds == K.LATENT).sum()) for t in trajectories
        ]
        return rows

    metrics = state_error_metrics(errors_of(batch_of(recorded[name], packed)))
    assert (
        0 < metrics["latent/replay_state_err"] <= 1e-4
        and 0 < metrics["latent/replay_state_err_rel"] <= 1e-4
    )
    batch = batch_of(recorded[name], packed)
    changed = next(row for row, t in enumerate(trajectories) if len(t.latents) >= 2)
    latents = [row.clone() for row in batch["latent_embeds"].unbind()]
    latents[changed][-1, 3] += 0.5  # the row's last LATENT: no other's source comes after it
    batch["latent_embeds"] = torch.nested.as_nested_tensor(latents, layout=torch.jagged)
    rows = errors_of(batch)
    assert rows[changed][-1, 0] == pytest.approx(0.5, abs=1e-4)
    assert rows[changed][-1, 1] == pytest.approx(
        0.5 / float(latents[changed][-1].norm()), rel=1e-3
    )
    others = torch.cat([rows[changed][:-1], *rows[:changed], *rows[changed + 1 :]])
    assert others[:, 0].max() <= 1e-4


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputed_latents_and_their_gradients(name, recorded, gloo):
    """The update's log-probs equal the replay's, and each gradient is `own_latents`'.

    Whatever vectors were recorded.
    """
    _, _, packed, visibility, _ = CASES[name]
    folder, loaded, trajectories, _, expected, _, references = recorded[name]
    norms = {}
    for gradient in RECOMPUTED[name]:
        values = {"name": "recompute", "recompute": {"gradient": gradient}}
        slots = (
            name == "recompute slots"
        )  # the reference feeds recorded image embeddings: no gradient to the tower
        engine = helpers.make_engine(
            folder,
            packed,
            freeze_vision=slots,
            checkpointing=name == "recompute latents_only",  # verl's default
            visibility=visibility,
            treatment=values,
        )
        batch, seen = batch_of(recorded[name], packed), []
        is_own = torch.cat([t.kinds[t.latent_mask] == K.LATENT for t in trajectories])
        zeroed = batch["latent_embeds"].values() * ~is_own[:, None]
        batch["latent_embeds"] = torch.nested.nested_tensor_from_jagged(
            zeroed, batch["latent_embeds"].offsets()
        )
        grads, _ = gradients(engine, batch, partial(text_sum, seen=seen))
        replayed = torch.cat(
            [row[t.response_mask()] for row, t in zip(expected, trajectories, strict=True)]
        )
        assert (torch.cat(seen) - replayed).abs().max() <= 1e-5
        reference = references[gradient]
        moved = {
            n
            for n, g in reference.items()
            if g.abs().max() > 0 and not (slots and ".visual." in n)
        }
        assert moved <= grads.keys() <= reference.keys() and len(grads) > 20
        for parameter, grad in grads.items():
            scale = float(reference[parameter].abs().max())
            torch.testing.assert_close(
                grad, reference[parameter], rtol=1e-3, atol=1e-4 * scale + 1e-6, msg=parameter
            )
        norms[gradient] = torch.cat(
            [grad.flatten() for n, grad in grads.items() if "lvr_head" not in n]
        )  # cut has none
    bptt = norms["bptt"]
    assert all(
        (norms[name] - bptt).norm() > 1e-3 * bptt.norm() for name in norms if name != "bptt"
    )


def test_only_the_update_recomputes(recorded, gloo):
    """Old and reference log-probs are those of the recorded latents."""
    folder, loaded, trajectories, images, expected, positions, _ = recorded["recompute"]
    engine = helpers.make_engine(
        folder, treatment={"name": "recompute", "recompute": {"gradient": "bptt"}}
    )
    batch = helpers.make_batch(
        trajectories, images, positions, ModelAdapter(loaded.model, loaded.mechanism)
    )
    assert helpers.gap(helpers.infer(engine, batch), expected, trajectories) <= 1e-5
    batch["latent_embeds"] = torch.nested.as_nested_tensor(
        [row * 0 for row in batch["latent_embeds"].unbind()], layout=torch.jagged
    )
    assert helpers.gap(helpers.infer(engine, batch), expected, trajectories) > 1e-2


def no_text(model_output, data, dp_group=None):
    return model_output["log_probs"].values().sum() * 0, {}


def latent_loss(text_loss, values, acts=True):
    return LatentLoss(
        text_loss,
        parse_treatment(values)[1],
        frozenset({int(K.LATENT)} if acts else ()),
        "token-mean",
    )


def with_scores(batch, case):
    """Old, reference log-probs and advantages of a batch."""
    _, _, trajectories, _, expected, _ = case[:6]
    nested = partial(torch.nested.as_nested_tensor, layout=torch.jagged)
    batch["old_log_probs"] = nested([row - 0.05 * (i % 3) for i, row in enumerate(expected)])
    batch["ref_log_prob"] = nested([row - 0.1 for row in expected])
    batch["advantages"] = nested(
        [(1.0 - 0.4 * i) * t.response_mask().float() for i, t in enumerate(trajectories)]
    )
    return batch


def test_sigma_to_infinity_is_masked_grpo(recorded, gloo):
    from test_two_ranks import actor_loss

    folder = recorded["gaussian"][0]
    masked = helpers.make_engine(folder)
    expected, _ = gradients(
        masked,
        with_scores(batch_of(recorded["gaussian"], False), recorded["gaussian"]),
        actor_loss(),
    )
    found = {}
    for sigma in (1.0, 1e6, float("inf")):
        # the old densities are those of sigma 0.5: the ratios are far off, and the dual clip would
        # leave no gradient
        values = {
            "name": "gaussian",
            "gaussian": {"sigma": sigma, "sigma_rollout": 0.5},
            "clip_ratio_c": None,
        }
        engine = helpers.make_engine(folder, treatment=values)
        batch = with_scores(batch_of(recorded["gaussian"], False), recorded["gaussian"])
        grads, _ = gradients(engine, batch, latent_loss(actor_loss(), values))
        found[sigma] = max((grads[name] - grad).abs().max() for name, grad in expected.items())
    assert found[float("inf")] == 0 and found[1e6] <= 1e-6 and found[1.0] > 1e-3


def test_the_loss_does_not_depend_on_micro_batches(recorded, gloo):
    """Micro-batches of 1, 2 and 6 rows give the same value, metrics and gradients.

    With latent policy term, KL and anchor.
    """
    values = GAUSSIAN | {"kl_coef": 0.3, "anchor_weight": 0.7, "clip_low": 0.3, "clip_high": 0.3}
    folder = recorded["gaussian"][0]
    engine = helpers.make_engine(folder, treatment=values)
    with_ref = batch_of(recorded["gaussian"], False)
    with engine.eval_mode(disable_auto_offload=True):
        means = engine.infer_batch(with_ref)["model_output"]["ref_latent_means"]
    results = {}
    for micro in (1, 2, 6):
        batch = with_scores(batch_of(recorded["gaussian"], False, micro), recorded["gaussian"])
        shifted = [row + 0.1 * torch.arange(row.shape[1]) for row in means.unbind()]
        batch["ref_latent_means"] = torch.nested.as_nested_tensor(shifted, layout=torch.jagged)
        grads, output = gradients(engine, batch, latent_loss(no_text, values))
        metrics = {
            k: sum(v.values) for k, v in output["metrics"].items() if k.startswith("latent/")
        }
        results[micro] = (grads, {"loss": sum(output["loss"]), **metrics})
    whole, numbers = results[6]
    assert {
        "latent/kl",
        "latent/anchor",
        "latent/ratio_mean",
        "latent/clipfrac",
        "latent/log_density",
    } < numbers.keys()
    assert numbers["latent/anchor"] > 1e-3 and abs(numbers["latent/kl"]) > 1e-4
    for micro in (1, 2):
        assert results[micro][1] == pytest.approx(numbers, rel=1e-4, abs=1e-6)
        for name, grad in whole.items():
            torch.testing.assert_close(
                results[micro][0][name], grad, rtol=1e-3, atol=1e-5, msg=name
            )
    assert max(grad.abs().max() for grad in whole.values()) > 1e-2


def test_what_the_engine_refuses(recorded, gloo):
    folder = recorded["gumbel_soft"][0]
    engine = helpers.make_engine(folder, visibility="latents_only", treatment=GUMBEL)
    batch = batch_of(recorded["gumbel_soft"], False)
    del batch["latent_aux"]
    with pytest.raises(LatentMismatchError, match="aux does not fit"):
        helpers.infer(engine, batch)
    with pytest.raises(ConfigError, match="head: a mixture of token embeddings"):
        helpers.make_engine(recorded["gaussian"][0], treatment=GUMBEL)
    anchored = GAUSSIAN | {"anchor_weight": 1.0}
    engine = helpers.make_engine(recorded["gaussian"][0], treatment=anchored)
    batch = with_scores(batch_of(recorded["gaussian"], False), recorded["gaussian"])
    with pytest.raises(LatentMismatchError, match="no reference for the latent anchor"):
        gradients(engine, batch, latent_loss(text_sum, anchored))
