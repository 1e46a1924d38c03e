"""`latent.share_prompt` through verl's engine, in one process: true gives what false gives.

Loss, metrics, log-probs, entropies and all gradients, with several groups in a micro-batch, their
rows in mixed order, rows of different lengths, and a dropped one. That either equals a plain
replay, test_engine.py, test_treated_engine.py and test_choice_engine.py show: groups of two are
micro-batches there.

Does not cover: several ranks (test_two_ranks.py).
"""

import engine_helpers as helpers
import pytest
import torch
from internvl_case import tiny_internvl
from test_two_ranks import actor_loss

from grpo_latent.errors import LatentMismatchError
from grpo_latent.latent.treatments import parse_treatment
from grpo_latent.models import tiny
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.trajectory import PositionKind as K
from grpo_latent.verl_plugin.worker.finite import GROUPS
from grpo_latent.verl_plugin.worker.latent_loss import LatentLoss

NUM_ROWS, MICRO = 12, 6
SCORES = ("log_probs", "entropy")
ANCHOR = {"anchor_weight": 0.5, "kl_coef": 0.2}
LVR = dict(max_spans=3, head="mlp")
# treatment, model, visibility, settings of the mechanism
CASES = {
    "mask": ({"name": "mask"}, tiny.tiny_qwen2_5_vl, "full", LVR),
    "mask latents_only": ({"name": "mask"}, tiny.tiny_qwen2_5_vl, "latents_only", LVR),
    "internvl": ({"name": "mask"}, tiny_internvl, "full", dict(max_spans=3)),
    "qwen3_vl": ({"name": "mask"}, tiny.tiny_qwen3_vl, "full", dict(max_spans=3)),
    "slots": ({"name": "mask"}, tiny.tiny_qwen2_vl, "full", helpers.SLOTS),
    "gaussian": ({"name": "gaussian", **ANCHOR}, tiny.tiny_qwen2_5_vl, "full", LVR),
    "gaussian_head": ({"name": "gaussian_head", **ANCHOR}, tiny.tiny_qwen3, "full", LVR),
    "gumbel_soft": (
        {"name": "gumbel_soft"},
        tiny.tiny_qwen3_vl,
        "latents_only",
        dict(max_spans=3),
    ),
    "vmf": ({"name": "vmf", **ANCHOR}, tiny.tiny_qwen2_5_vl, "full", LVR),
    **{
        gradient: (
            {"name": "recompute", "recompute": {"gradient": gradient}},
            tiny.tiny_qwen2_5_vl,
            "latents_only" if gradient == "bptt" else "full",
            LVR,
        )
        for gradient in ("cut", "one_hop", "bptt")
    },
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Rollouts of each case, made before verl patches transformers."""
    cases = {}
    for name, (values, build, visibility, changes) in CASES.items():
        folder = helpers.make_checkpoint(tmp_path_factory.mktemp("model"), build, **changes)
        treatment = parse_treatment(values)[0]
        cases[name] = folder, helpers.roll_out(folder, visibility, treatment, group_size=4)
    return cases


def batch_of(name, rolled):
    """A batch whose groups of four are torn into micro-batches of six, with one row dropped."""
    loaded, trajectories, images, log_probs, positions = rolled
    rows = [0, 4, 1, 5, 2, 8, 3, 6, 9, 7, 10, 11]
    pick = lambda values: [values[i] for i in rows]  # noqa: E731
    trajectories, log_probs = pick(trajectories), pick(log_probs)
    adapter = ModelAdapter(loaded.model, loaded.mechanism)
    batch = helpers.make_batch(
        trajectories, pick(images), pick(positions), adapter, calculate_entropy=True
    )
    nested = lambda values: torch.nested.as_nested_tensor(values, layout=torch.jagged)  # noqa: E731
    masks = [t.response_mask().long() * (i != 2) for i, t in enumerate(trajectories)]
    batch["response_mask"], batch["loss_mask"] = nested(masks), nested(masks)
    batch["old_log_probs"] = nested([p - 0.05 * (i % 3) for i, p in enumerate(log_probs)])
    batch["ref_log_prob"] = nested([p - 0.1 for p in log_probs])
    batch["advantages"] = nested([(1 - 0.2 * i) * m.float() for i, m in enumerate(masks)])
    batch["ref_latent_means"] = nested([t.latents + 0.1 for t in trajectories])
    return helpers.lay_out(batch, micro=MICRO, global_batch_size=NUM_ROWS)


def trained(name, folder, batch, shares):
    values, _, visibility, _ = CASES[name]
    treatment, terms = parse_treatment(values)
    engine = helpers.make_engine(
        folder, micro=MICRO, treatment=values, visibility=visibility, share_prompt=shares
    )
    text_loss, outputs = actor_loss(), []

    def loss(model_output, data, dp_group=None):
        outputs.append({key: model_output[key].values().detach() for key in SCORES})
        return text_loss(model_output=model_output, data=data, dp_group=dp_group)

    if treatment.is_action:
        kinds = frozenset({int(K.LATENT)})
        loss = LatentLoss(loss, terms, kinds, "token-mean", treatment=treatment)
    with engine.train_mode(disable_auto_offload=True):
        engine.optimizer_zero_grad()
        output = engine.forward_backward_batch(batch, loss)
        named = engine.module.named_parameters()
        grads = {n: p.grad.full_tensor().clone() for n, p in named if p.grad is not None}
    scores = {key: torch.cat([each[key] for each in outputs]) for key in SCORES}
    return output, scores, grads


@pytest.mark.parametrize("name", CASES)
def test_a_shared_prompt_trains_as_one_a_row(name, recorded, gloo):
    folder, rolled = recorded[name]
    assert len({len(t.token_ids) for t in rolled[1]}) > 1
    (alone, own, grads), (shared, scores, shared_grads) = (
        trained(name, folder, batch_of(name, rolled), shares) for shares in (False, True)
    )
    torch.testing.assert_close(shared["loss"], alone["loss"], rtol=0, atol=1e-5)
    for key, values in own.items():
        torch.testing.assert_close(scores[key], values, rtol=0, atol=1e-5)
    assert (own["entropy"] != 0).sum() > 50
    assert alone["metrics"].keys() == shared["metrics"].keys()
    assert grads.keys() == shared_grads.keys() and len(grads) > 20
    largest = float(max(grad.abs().max() for grad in grads.values()))
    bound = 1e-5 * max(1.0, largest)  # densities at a large concentration give gradients of 60
    for parameter, grad in grads.items():
        torch.testing.assert_close(
            shared_grads[parameter], grad, rtol=0, atol=bound, msg=parameter
        )
    assert largest > 0.1


def test_each_prompt_and_its_image_are_run_once(recorded, gloo):
    folder, rolled = recorded["mask"]
    engine = helpers.make_engine(folder, micro=MICRO)
    lengths, grids = [], []
    engine.backbone.decoder.layers[0].register_forward_pre_hook(
        lambda _, args: lengths.append(args[0].shape[1])
    )
    engine.backbone.base.visual.register_forward_pre_hook(
        lambda _, args, kwargs: grids.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    batch = batch_of("mask", rolled)
    groups = batch[GROUPS].split(MICRO)
    prompts, responses = (
        torch.split(batch[key].offsets().diff(), MICRO) for key in ("prompts", "responses")
    )
    with engine.eval_mode(disable_auto_offload=True):
        engine.infer_batch(batch)
    expected = [
        sum({int(g): int(p) for g, p in zip(*pair, strict=True)}.values()) + int(own.sum())
        for *pair, own in zip(groups, prompts, responses, strict=True)
    ]
    assert lengths == expected and grids == [len(set(each.tolist())) for each in groups] == [3, 3]


def test_groups_are_those_that_the_trainer_says(recorded, gloo):
    """Rows without a number of their group run alone; one number for two prompts is refused."""
    folder, rolled = recorded["mask"]
    engine = helpers.make_engine(folder, micro=MICRO)
    batch = batch_of("mask", rolled)
    del batch[GROUPS]
    lengths = []
    engine.backbone.decoder.layers[0].register_forward_pre_hook(
        lambda _, args: lengths.append(len(args[0]))
    )
    with engine.eval_mode(disable_auto_offload=True):
        engine.infer_batch(batch)
        assert lengths == [MICRO, MICRO]
        batch = batch_of("mask", rolled)
        batch[GROUPS] = torch.zeros(NUM_ROWS, dtype=torch.long)
        with pytest.raises(LatentMismatchError, match="one group have different prompts"):
            engine.infer_batch(batch)
