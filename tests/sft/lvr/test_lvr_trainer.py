"""What LVR adds to the trainer: losses of the exits, variance as the unit of distances."""

import pytest
import torch
from sft_cases import NAME, batch_of, examples, latent_model, state, train, trainer

from grpo_latent.errors import ConfigError
from grpo_latent.sft.lvr.losses import LVRLossConfig
from grpo_latent.sft.lvr.trainer import VARIANCE_ROWS, check_exit

ROWS = examples(8)


@pytest.mark.parametrize(
    "loss", [LVRLossConfig(end="mode_switch"), LVRLossConfig(end="latent_end", latent_loss="mae")]
)
def test_end_variants_train_what_their_exit_reads(tmp_path, loss):
    exit_rule = {"mode_switch": "end_token", "latent_end": "latent_end"}[loss.end]
    latent = latent_model(NAME, head="mlp", end=loss.end == "latent_end", exit=exit_rule)
    before = state(latent.model)
    run = train(tmp_path, latent=latent, loss=loss, max_steps=1)
    assert ("end_loss" in run.state.log_history[0]) == (loss.end == "mode_switch")
    if loss.end == "latent_end":
        assert not torch.equal(latent.model.lvr_latent_end_emb, before["lvr_latent_end_emb"])


def test_exit_rules_need_their_training():
    check_exit("steps", "mode_switch")
    for exit_rule, end in (
        ("end_token", "none"),
        ("latent_end", "mode_switch"),
        ("end_token", "latent_end"),
    ):
        with pytest.raises(ConfigError, match="exit rule"):
            check_exit(exit_rule, end)


def test_variance_of_targets(tmp_path):
    latent = latent_model(NAME)
    loss = LVRLossConfig(latent_loss_norm="variance")
    run = trainer(latent, ROWS, tmp_path, loss=loss)
    batch = batch_of(latent, ROWS)
    with torch.no_grad():
        visual = latent.model.model.visual(
            batch["pixel_values"], grid_thw=batch["image_grid_thw"]
        ).pooler_output
    assert len(ROWS) <= VARIANCE_ROWS
    assert run.target_variance == pytest.approx(
        float(visual[batch["roi"]].var(0).mean()), rel=1e-5
    )
    with pytest.raises(ConfigError, match="targets that move"):
        trainer(latent_model(NAME), ROWS, tmp_path, loss=loss, frozen=False)
