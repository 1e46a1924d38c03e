"""World size 2 over gloo computes what world size 1 computes.

Loss, gradients, updated weights, saved and loaded state.

Ray's part in several ranks is covered by test_training.py.
"""

import os
import sys
from dataclasses import replace

import engine_helpers as helpers
import pytest
import torch
import torch.multiprocessing as mp

from grpo_latent.latent.treatments import parse_treatment
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import load_latent_model
from grpo_latent.trajectory import PositionKind
from grpo_latent.verl_plugin.worker.latent_loss import LatentLoss

NUM_ROWS = 8


# each in its own engine, all in one start of the ranks
TREATMENTS = {
    "one_hop": {"name": "recompute", "recompute": {"gradient": "one_hop"}},
    "bptt": {"name": "recompute", "recompute": {"gradient": "bptt"}},
    "gaussian": {
        "name": "gaussian",
        "gaussian": {"sigma": 0.5},
        "kl_coef": 0.2,
        "anchor_weight": 0.5,
    },
    "gaussian_head": {"name": "gaussian_head", "gaussian_head": {"sigma": 0.5}, "kl_coef": 0.2},
    "vmf": {"name": "vmf", "vmf": {"kappa": 50.0}, "kl_coef": 0.2},
}
WITHOUT_LATENTS = (4, 5)  # with two ranks, the whole first micro-batch of the second
# groups of two that the ranks have in part: 0 0 1 2 | 1 2 3 3
TORN = (0, 1, 2, 4, 3, 5, 6, 7)


def rank_batch(
    folder, rank, world_size, treatment=None, without_latents=(), order=range(NUM_ROWS)
):
    """This rank's rows of the global batch, with old log-probs and advantages."""
    treatment = parse_treatment(treatment)[0]
    rolled = helpers.roll_out(folder, treatment=treatment, num_prompts=4, group_size=2)
    loaded, trajectories, images, expected, positions = rolled
    for i in without_latents:
        trajectories[i], expected[i], positions[i] = text_of(
            trajectories[i], expected[i], positions[i]
        )
    # whole groups on each rank, as the trainer gives them: each micro-batch is a shared prompt
    share = NUM_ROWS // world_size
    rows = list(order[rank * share : (rank + 1) * share])
    pick = lambda values: [values[i] for i in rows]  # noqa: E731
    batch = helpers.make_batch(
        pick(trajectories),
        pick(images),
        pick(positions),
        ModelAdapter(loaded.model, loaded.mechanism),
        calculate_entropy=True,
        global_batch_size=NUM_ROWS,
        use_remove_padding=False,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=2,
        use_fused_kernels=False,
    )
    nested = lambda values: torch.nested.as_nested_tensor(values, layout=torch.jagged)  # noqa: E731
    batch["old_log_probs"] = nested([expected[i] - 0.05 * (i % 3) for i in rows])
    batch["ref_log_prob"] = nested([expected[i] - 0.1 for i in rows])
    advantages = [(1.0 - 0.4 * i) * trajectories[i].response_mask().float() for i in rows]
    batch["advantages"] = nested(advantages)
    batch["ref_latent_means"] = nested([trajectories[i].latents + 0.1 * i for i in rows])
    return batch


def text_of(trajectory, log_probs, positions):
    """The text of a completion, without its spans."""
    is_text = trajectory.kinds == PositionKind.TEXT
    fields = {
        n: getattr(trajectory, n)[is_text]
        for n in ("token_ids", "kinds", "rollout_log_probs", "sampling_log_probs")
    }
    changed = replace(trajectory, latents=trajectory.latents[:0], **fields)
    return (
        changed,
        log_probs[is_text],
        positions[:, : len(trajectory.prompt_ids) + int(is_text.sum())],
    )


def actor_loss():
    """verl's ppo_loss with this package's policy loss and a KL term."""
    from functools import partial

    from verl.workers.config import FSDPActorConfig
    from verl.workers.config.actor import PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=2,
        ppo_mini_batch_size=NUM_ROWS,
        ppo_micro_batch_size_per_gpu=2,
        use_dynamic_bsz=False,
        use_kl_loss=True,
        kl_loss_coef=0.3,
        policy_loss=PolicyLossConfig(loss_mode="grpo_latent"),
    )
    return partial(ppo_loss, config=config)


def train_one_step(rank, world_size, store, folder, out, fsdp_size=-1):
    """One update; with `fsdp_size`, in shards of so many ranks, of which the others have copies."""
    sys.path.insert(0, os.path.dirname(os.path.dirname(__file__)))
    torch.set_num_threads(1)
    helpers.start_process_group(rank, world_size, store)
    batch = rank_batch(folder, rank, world_size)
    engine = helpers.make_engine(folder, micro=2, fsdp_size=fsdp_size)
    with engine.train_mode(disable_auto_offload=True):
        engine.optimizer_zero_grad()
        output = engine.forward_backward_batch(batch, actor_loss())
        grads = {
            n: p.grad.full_tensor().clone()
            for n, p in engine.module.named_parameters()
            if p.grad is not None
        }
        engine.optimizer_step()
    loss = torch.tensor(sum(output["loss"]))
    torch.distributed.all_reduce(loss)
    weights = {name: tensor.clone() for name, tensor in engine.get_per_tensor_param()[0]}
    engine.save_checkpoint(f"{out}/checkpoint", global_step=1)
    again = helpers.make_engine(folder, micro=2, fsdp_size=fsdp_size)
    again.load_checkpoint(f"{out}/checkpoint")
    reloaded = {name: tensor.clone() for name, tensor in again.get_per_tensor_param()[0]}
    assert all(torch.equal(weights[name], reloaded[name]) for name in weights)
    if rank == 0:
        torch.save(
            {"loss": loss / world_size, "grads": grads, "weights": weights}, f"{out}/result.pt"
        )
    torch.distributed.destroy_process_group()


def treated_gradients(rank, world_size, store, folder, out):
    """The gradients of one update with each treatment."""
    sys.path.insert(0, os.path.dirname(os.path.dirname(__file__)))
    torch.set_num_threads(1)
    helpers.start_process_group(rank, world_size, store)
    batches = {
        n: rank_batch(folder, rank, world_size, values, WITHOUT_LATENTS)
        for n, values in TREATMENTS.items()
    }
    results = {}
    for name, values in TREATMENTS.items():
        treatment, terms = parse_treatment(values)
        engine, loss = helpers.make_engine(folder, micro=2, treatment=values), actor_loss()
        if treatment.is_action:
            loss = LatentLoss(
                loss,
                terms,
                frozenset({int(PositionKind.LATENT)}),
                "token-mean",
                treatment=treatment,
            )
        with engine.train_mode(disable_auto_offload=True):
            engine.optimizer_zero_grad()
            engine.forward_backward_batch(batches[name], loss)
            named = engine.module.named_parameters()
            results[name] = {
                n: p.grad.full_tensor().clone() for n, p in named if p.grad is not None
            }
    if rank == 0:
        torch.save(results, f"{out}/treated{world_size}.pt")
    torch.distributed.destroy_process_group()


def shared_and_alone(rank, world_size, store, folder, out):
    """Scores and gradients of an update with each row's own prompt, and with prompts shared."""
    sys.path.insert(0, os.path.dirname(os.path.dirname(__file__)))
    torch.set_num_threads(1)
    helpers.start_process_group(rank, world_size, store)
    treatments = {"mask": {"name": "mask"}, "bptt": TREATMENTS["bptt"]}
    cases = [(name, order) for name in treatments for order in (tuple(range(NUM_ROWS)), TORN)]
    # before verl patches transformers
    made = [
        [rank_batch(folder, rank, world_size, treatments[name], order=order) for _ in range(2)]
        for name, order in cases
    ]
    results = {}
    for (name, order), batches in zip(cases, made, strict=True):
        for shares, batch in zip((False, True), batches, strict=True):
            helpers.lay_out(batch, micro=NUM_ROWS // world_size)
            mask = batch["response_mask"].unbind()
            rows = [row * (i != rank) for i, row in enumerate(mask)]  # one of each rank is dropped
            dropped = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
            batch["response_mask"], batch["loss_mask"] = dropped, dropped.clone()
            engine = helpers.make_engine(
                folder, micro=NUM_ROWS, treatment=treatments[name], share_prompt=shares
            )
            text_loss, scores, num_rows = actor_loss(), {}, []
            engine.backbone.decoder.layers[0].register_forward_pre_hook(
                lambda _, args, found=num_rows: found.append(len(args[0]))
            )

            def loss(model_output, data, dp_group=None, kept=scores, text_loss=text_loss):
                kept |= {n: model_output[n].values().detach() for n in ("log_probs", "entropy")}
                return text_loss(model_output=model_output, data=data, dp_group=dp_group)

            with engine.train_mode(disable_auto_offload=True):
                engine.optimizer_zero_grad()
                engine.forward_backward_batch(batch, loss)
                named = engine.module.named_parameters()
                grads = {n: p.grad.full_tensor().clone() for n, p in named if p.grad is not None}
            assert set(num_rows) == {1 if shares else NUM_ROWS // world_size}
            results[name, order == TORN, shares] = scores, grads
    torch.save(results, f"{out}/shared{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_shared_prompt_on_two_ranks_trains_as_one_a_row(tmp_path):
    """With whole groups on each rank and with torn ones, rows of several lengths, dropped ones."""
    folder = helpers.make_checkpoint(tmp_path / "model", head="mlp", max_spans=3)
    arguments = (2, str(tmp_path / "store"), folder, str(tmp_path))
    mp.spawn(shared_and_alone, arguments, nprocs=2)
    for rank in range(2):
        results = torch.load(tmp_path / f"shared{rank}.pt")
        for name, is_torn, shares in results:
            if shares:
                continue
            (own, grads), (shared, shared_grads) = (
                results[name, is_torn, each] for each in (False, True)
            )
            for key, values in own.items():
                torch.testing.assert_close(shared[key], values, rtol=0, atol=1e-5)
            assert grads.keys() == shared_grads.keys() and len(grads) > 20
            for parameter, grad in grads.items():
                torch.testing.assert_close(
                    shared_grads[parameter], grad, rtol=0, atol=1e-5, msg=f"{name} {parameter}"
                )
            assert max(grad.abs().max() for grad in grads.values()) > 1e-2  # the tolerance is one


@pytest.mark.slow
@pytest.mark.long
def test_treatments_on_two_ranks_are_those_on_one(tmp_path):
    """Recomputed latents run the same forwards on every rank, one without any latent included.

    None waits for the other.
    """
    folder = helpers.make_checkpoint(tmp_path / "model", head="mlp", max_spans=3)
    for world_size in (1, 2):
        mp.spawn(
            treated_gradients,
            (world_size, str(tmp_path / f"store{world_size}"), folder, str(tmp_path)),
            nprocs=world_size,
        )
    one, two = (torch.load(tmp_path / f"treated{world_size}.pt") for world_size in (1, 2))
    for name in TREATMENTS:
        assert one[name].keys() == two[name].keys() and len(one[name]) > 20
        for parameter, grad in one[name].items():
            torch.testing.assert_close(
                two[name][parameter], grad, rtol=1e-3, atol=2e-5, msg=f"{name} {parameter}"
            )
        assert any(
            "lvr_head" in parameter and grad.abs().max() > 1e-4
            for parameter, grad in one[name].items()
        )
    assert one["gaussian_head"]["latent_treatment.linear.weight"].abs().max() > 1e-4
    assert any((one["bptt"][n] - one["one_hop"][n]).abs().max() > 1e-3 for n in one["bptt"])


def lvr_folder(folder):
    return helpers.make_checkpoint(folder / "model", head="mlp")


def gate_folder(folder):
    """The gate lets in much, so that it shows."""
    return helpers.make_gate_checkpoint(folder, initial_min=0.2, initial_max=0.6)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("make", "prefix", "trains"),
    [
        pytest.param(lvr_folder, "lvr_head.", False, id="lvr"),
        pytest.param(gate_folder, "hybrid_gate.", True, id="hybrid_gate"),
    ],
)
def test_two_ranks_train_as_one(make, prefix, trains, tmp_path):
    """Recorded latents give LVR's head no gradient; the gate's parameters get one each."""
    folder = make(tmp_path)
    results = {}
    for world_size in (1, 2):
        out = tmp_path / f"world{world_size}"
        out.mkdir()
        arguments = (world_size, str(out / "store"), folder, str(out))
        if world_size == 1:  # no process more than needed
            train_one_step(0, *arguments)
        else:
            mp.spawn(train_one_step, arguments, nprocs=world_size)
        results[world_size] = torch.load(out / "result.pt")
    one, two = results[1], results[2]
    assert one["grads"].keys() == two["grads"].keys() and len(one["grads"]) > 20
    torch.testing.assert_close(two["loss"], one["loss"], rtol=0, atol=1e-5)
    for name, grad in one["grads"].items():
        torch.testing.assert_close(two["grads"][name], grad, rtol=0, atol=1e-5, msg=name)
    assert max(grad.abs().max() for grad in one["grads"].values()) > 1e-2  # the tolerance is one
    own = [grad for name, grad in one["grads"].items() if name.startswith(prefix)]
    assert bool(own) == trains and all(grad.abs().max() > 1e-4 for grad in own)
    moved = load_latent_model(folder).model.state_dict()
    assert any(not torch.equal(moved[name], tensor) for name, tensor in two["weights"].items())
    saved = load_latent_model(
        tmp_path / "world2" / "checkpoint" / "huggingface"
    ).model.state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in two["weights"].items())
    assert any(name.startswith(prefix) for name in saved)
