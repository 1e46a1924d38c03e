"""The common trainer around LVR's loss: denominators, bfloat16, checkpoints, loud failures.

Also gradient accumulation.

Accumulation and checkpointing compare with plain autograd on one batch. Not covered here: several
processes (see test_sft_distributed.py and test_sft_sharded.py), DeepSpeed.
"""

import copy
import math

import pytest
import torch
from latent_cases import build_case
from sft_cases import NAME, batch_of, examples, latent_model, state, train, trainer

from grpo_latent.errors import CheckpointError, TrainingError
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import copy_weights, load_latent_model, read_tensors
from grpo_latent.sft.common.parameters import freeze_vision
from grpo_latent.sft.lvr.forward import loss_sums
from grpo_latent.sft.lvr.losses import LVRLossConfig

ROWS = examples(8)


def reference_step(latent, rows, loss, learning_rate):
    """One SGD step of CE / labels + weight * latent / latents over all rows at once."""
    freeze_vision(latent.model)
    batch = batch_of(latent, rows)
    sums = loss_sums(ModelAdapter(latent.model, latent.mechanism), batch, latent.mechanism, loss)
    total = (
        sums["ce"] / (batch["labels"] != -100).sum()
        + loss.latent_weight * sums["latent"] / batch["roi"].numel()
    )
    total.backward()
    with torch.no_grad():
        for parameter in latent.model.parameters():
            if parameter.grad is not None:
                parameter -= learning_rate * parameter.grad
    return float(total.detach())


@pytest.mark.parametrize(("size", "accumulation"), [(8, 1), (4, 2), (2, 4)])
def test_a_step_is_the_same_however_its_rows_are_accumulated(tmp_path, size, accumulation):
    loss = LVRLossConfig(latent_weight=0.5)
    expected = latent_model(NAME, head="mlp")
    total = reference_step(expected, ROWS, loss, 1e-2)
    run = train(
        tmp_path,
        loss=loss,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
    )
    assert run.state.log_history[0]["loss"] == pytest.approx(total, rel=1e-5)
    for name, tensor in run.latent.model.state_dict().items():
        torch.testing.assert_close(
            tensor, expected.model.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name
        )


def test_rows_differ_in_labels_and_latents():
    """Without this, a mean of micro-batch means would pass the test above."""
    batch = batch_of(latent_model(NAME), ROWS)
    assert len(set((batch["labels"] != -100).sum(-1).tolist())) > 1 and batch["roi"].numel() > len(
        ROWS
    )


def test_logged_metrics_are_means_over_the_logged_steps(tmp_path):
    latent = latent_model(NAME, head="mlp")
    batch = batch_of(latent, ROWS)
    with torch.no_grad():
        sums = loss_sums(
            ModelAdapter(latent.model, latent.mechanism),
            batch,
            latent.mechanism,
            LVRLossConfig(),
            count_hits=True,
        )
    # learning rate 0: both steps see the same model
    run = train(
        tmp_path,
        latent=latent,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=0.0,
        logging_steps=2,
    )
    logged = run.state.log_history[0]
    assert logged["ce"] == pytest.approx(
        float(sums["ce"] / (batch["labels"] != -100).sum()), rel=1e-5
    )
    assert logged["latent_loss"] == pytest.approx(
        float(sums["latent"] / batch["roi"].numel()), rel=1e-5
    )
    assert logged["latent_hit"] == pytest.approx(float(sums["hits"] / sums["num_targets"]))


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = train(tmp_path / "a", max_steps=1).latent.model.state_dict()
    checkpointed = train(
        tmp_path / "b",
        max_steps=1,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    ).latent.model.state_dict()
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-6) for name in plain)


def test_bfloat16_computes_in_bfloat16_over_float32_weights(tmp_path):
    exact = train(tmp_path / "a", learning_rate=0.0, max_steps=1)
    run = train(tmp_path / "b", learning_rate=0.0, max_steps=1, bf16=True)
    losses = [item.state.log_history[0]["loss"] for item in (exact, run)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.1)
    assert {parameter.dtype for parameter in run.latent.model.parameters()} == {torch.float32}


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    latent = latent_model(NAME)
    with torch.no_grad():
        latent.model.lm_head.weight[5] = float("nan")
    with pytest.raises(TrainingError, match="SFT step 1"):
        train(tmp_path, latent=latent)


def test_the_model_comes_back_as_it_was(tmp_path):
    latent = latent_model(NAME)
    config = copy.deepcopy(latent.model.config.to_dict())
    run = train(tmp_path, latent=latent, learning_rate=0.0)
    assert "forward" not in vars(latent.model) and latent.model.config.to_dict() == config
    assert run.state.global_step == 2


def test_cosine_schedule_with_a_horizon_of_its_own(tmp_path):
    run = train(
        tmp_path,
        learning_rate=1.0,
        max_steps=3,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=1,
        horizon_steps=11,
        optim="adamw_torch",
        frozen=True,
    )
    rates = [line["learning_rate"] for line in run.state.log_history if "learning_rate" in line]
    expected = [0.0, *(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 10)) for step in (0, 1))]
    assert rates == pytest.approx(expected, abs=1e-6)


# checkpoints


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_checkpoint_holds_every_weight_and_loads_as_a_latent_model(tmp_path, name):
    latent = latent_model(name, head="mlp", savable=True)
    run = train(tmp_path, latent=latent, save_strategy="steps", save_steps=2, optim="adamw_torch")
    folder = tmp_path / "checkpoint-2"
    own = state(latent.model)
    other = latent_model(name, head="mlp", savable=True, case=build_case(name, seed=7))
    assert any(
        not torch.equal(own[key], tensor) for key, tensor in other.model.state_dict().items()
    )
    copy_weights(other.model, read_tensors(folder, ("",)), str(folder))
    assert all(torch.equal(own[key], tensor) for key, tensor in other.model.state_dict().items())
    loaded = load_latent_model(folder)
    assert all(torch.equal(own[key], tensor) for key, tensor in loaded.model.state_dict().items())
    assert loaded.mechanism == run.latent.mechanism
    assert not (folder / "training_args.bin").exists(), "no pickle of ours"


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(tmp_path, latent=latent_model(NAME, savable=True), save_strategy="steps", save_steps=2)
    folder = str(tmp_path / "checkpoint-2")

    def load(model):
        copy_weights(model, read_tensors(folder, ("",)), folder)

    with pytest.raises(CheckpointError, match="weights are missing.*lvr_head"):
        load(latent_model(NAME, savable=True, head="mlp").model)
    with pytest.raises(CheckpointError, match="weight does not fit"):
        load(latent_model("qwen3_vl", savable=True).model)


def test_other_calls_of_the_model_are_left_alone(tmp_path):
    latent = latent_model(NAME)
    ids = torch.tensor([[1, 20, 21]])
    with torch.no_grad():
        before = latent.model(input_ids=ids).logits
        run = trainer(latent, ROWS, tmp_path)
        assert torch.equal(latent.model(input_ids=ids).logits, before)
        run.release()
        assert torch.equal(latent.model(input_ids=ids).logits, before)
