"""LoRA under the real trainer, and a run that goes on at another number of ranks. Slow.

first   world size 2, steps 1-4, saves at 2 and 4
second  what a kill after step 2 leaves, at world size 1, steps 3-4
"""

import json
import shutil

import pytest
import tiny_run
import torch

from grpo_latent.models.loading import load_latent_model
from grpo_latent.verl_plugin.trainer import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.long]

OPTIONS = (
    "actor_rollout_ref.model.lora_rank=4",
    "latent.lora_trains=[latents,lm_head]",
    "latent.usage.num_prompts=0",
    "trainer.total_training_steps=4",
    "trainer.save_freq=2",
    "trainer.test_freq=4",
    "actor_rollout_ref.actor.optim.lr=3e-4",
)


def test_adapters_train_and_go_on_at_another_number_of_ranks(
    local_ray, tmp_path, monkeypatch, capsys
):
    inputs = tiny_run.write_inputs(tmp_path, head="mlp")
    first, second = tmp_path / "first", tmp_path / "second"
    config = tiny_run.make_config(inputs, first, "trainer.n_gpus_per_node=2", *OPTIONS)
    tiny_run.train_here(config, monkeypatch)
    metrics = tiny_run.metrics_of(first)
    assert metrics[1]["actor/kl_loss"] == 0.0 and metrics[4]["actor/kl_loss"] > 1e-6
    assert all(metrics[step]["latent/replay_logp_gap_max"] < 1e-4 for step in range(1, 5))
    assert metrics[1]["latent/grad_norm_latent"] > 0

    shutil.copytree(first, second)
    shutil.rmtree(second / "checkpoints" / "global_step_4")
    checkpoint.write_tracker(second / "checkpoints", 2)
    capsys.readouterr()
    trainer = tiny_run.train_here(tiny_run.make_config(inputs, second, *OPTIONS), monkeypatch)
    assert trainer.resumed_from == 2 and checkpoint.read_tracker(second / "checkpoints") == 4
    assert (
        "resume: saved by 2 ranks, goes on with 1: weights, optimizer" in capsys.readouterr().out
    )
    assert (second / "checkpoints/global_step_4/actor/optim_world_size_1_rank_0.pt").is_file()
    resumed = tiny_run.metrics_of(second)
    for step in (3, 4):
        texts = [(run / f"rollouts/step_{step}.jsonl").read_text() for run in (first, second)]
        assert tokens_of(texts[0]) == tokens_of(texts[1])
        for name in ("actor/pg_loss", "actor/kl_loss", "critic/score/mean"):
            assert resumed[step][name] == pytest.approx(metrics[step][name], rel=0, abs=1e-6), name

    start = load_latent_model(inputs / "model")
    ends = [
        load_latent_model(run / "checkpoints" / "global_step_4" / "actor" / "huggingface")
        for run in (first, second)
    ]
    assert ends[0].mechanism == start.mechanism
    before, *after = (loaded.model.state_dict() for loaded in (start, *ends))
    trained = {name for name in before if not torch.equal(before[name], after[0][name])}
    assert "lm_head.weight" in trained and len(trained) == 1 + 2 * 7
    assert not any("visual" in name or "embed_tokens" in name for name in trained)
    for name, tensor in after[0].items():
        torch.testing.assert_close(after[1][name], tensor, rtol=0, atol=1e-5)


def tokens_of(text):
    return [json.loads(line)["token_ids"] for line in text.splitlines()]
