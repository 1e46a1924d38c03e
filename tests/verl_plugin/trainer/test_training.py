"""Training end to end on Ray, with the tiniest model. Slow; runs share what they can.

world size 2, trainer in this process:
    A  steps 1-6, with a reward that fails on one row: its trajectories are dropped
    B  what a kill inside A's save of step 6 leaves, resumed from step 3: equal to A to the bit
world size 1, in this process:
    C  IVT-LR, steps 1-2 of 4: an alarm stops it
"""

import json
import sys
from pathlib import Path

import pytest
import ray
import tiny_run
import torch
from engine_helpers import SLOTS

from grpo_latent.errors import CheckpointError, ReplayGapError, RewardError
from grpo_latent.eval.dumps import read_dump
from grpo_latent.models import tiny
from grpo_latent.models.loading import load_latent_model
from grpo_latent.trajectory import PositionKind as K
from grpo_latent.verl_plugin.boot import remote_errors
from grpo_latent.verl_plugin.boot.actor_watch import ActorWatch
from grpo_latent.verl_plugin.trainer import checkpoint
from grpo_latent.verl_plugin.trainer.alarms import Alarms, Line
from grpo_latent.verl_plugin.trainer.console_line import short_line
from grpo_latent.verl_plugin.trainer.reports import Reporter, drain, start_report_queue

pytestmark = [pytest.mark.slow, pytest.mark.ray]
TWO_RANKS = "trainer.n_gpus_per_node=2"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny_run.write_inputs(tmp_path_factory.mktemp("inputs"))


def test_a_workers_error_reaches_the_driver_through_another_actor(local_ray):
    class Raises:  # a local class is pickled whole: workers cannot import this module
        def call(self):
            raise CheckpointError("a part has changed", where="x.pt")

    class Asks:
        def call(self, other):
            return ray.get(other.call.remote())

    worker, runner = (ray.remote(kind).options(num_cpus=0).remote() for kind in (Raises, Asks))
    with pytest.raises(CheckpointError) as caught:
        remote_errors.get(runner.call.remote(worker), "training", "train.log")
    assert str(caught.value) == "x.pt: a part has changed."
    ray.kill(worker), ray.kill(runner)


def test_reports_and_alarms_reach_the_driver(local_ray):
    queue, lines = start_report_queue(), []
    reporter = Reporter()
    reporter.report("step", 1, 4, {"critic/score/mean": 0.5})
    reporter.say([Line("vanished", "no latents"), Line("solved", "all right")], 1, 4)
    reporter.say([], 2, 4)
    watch = ActorWatch()
    drain(queue, ray.put(None), lambda report: lines.append(short_line(report)), watch)
    assert watch.position == "last step 1/4"
    ray.kill(queue)
    assert lines == [
        "step 1/4  reward 0.500",
        "step 1/4  ALARM  vanished: no latents",
        "step 1/4  solved: all right",
    ]


@pytest.mark.long
def test_a_killed_save_and_resume_at_world_size_2(local_ray, inputs, tmp_path, monkeypatch):
    first, second = tmp_path / "a", tmp_path / "b"

    def snapshot_inside_the_last_save(trainer):
        """Copies the output folder as a kill in the middle of that save would leave it."""
        save = trainer.actor_rollout_wg.save_checkpoint

        def saving(folder, remote, step, **kwargs):
            save(folder, remote, step, **kwargs)
            if step == 6:
                tiny_run.snapshot(first, second)
                half = second / "checkpoints" / "global_step_6"
                next((half / "actor").glob("optim_*_rank_1.pt")).unlink()
                (half / "stale").touch()

        trainer.actor_rollout_wg.save_checkpoint = saving

    reward = tmp_path / "reward.py"
    reward.write_text(
        tiny_run.REWARD.replace("    words", '    1 / (extra_info["index"] % 100)\n    words', 1)
    )
    drops = [f"reward.custom_reward_function.path={reward}", "latent.reward.on_error=drop"]
    tiny_run.train_here(
        tiny_run.make_config(inputs, first, TWO_RANKS, *drops),
        monkeypatch,
        snapshot_inside_the_last_save,
    )
    metrics = tiny_run.metrics_of(first)
    assert metrics[1]["actor/kl_loss"] == 0.0 and metrics[6]["actor/kl_loss"] > 0.0
    assert all(metrics[step]["latent/replay_logp_gap_max"] < 1e-4 for step in range(1, 7))
    check_dropped_rows(first, metrics)
    for step in (0, 3, 6):
        assert {"latent/usage_gap/shuffle", "latent/usage_gap/zero", "latent/drift_cosine"} <= set(
            metrics[step]
        )
    assert metrics[0]["latent/drift_relative"] == 0.0 < metrics[6]["latent/drift_relative"]
    assert metrics[1]["latent/grad_norm_latent"] > 0 and metrics[1]["latent/grad_norm_text"] > 0
    assert "latent/effective_rank" in metrics[1] and metrics[1]["latent/alarm_vanished"] == 0.0
    assert (
        checkpoint.read_tracker(first / "checkpoints") == 6
        and checkpoint.read_tracker(second / "checkpoints") == 3
    )
    assert 6 not in tiny_run.metrics_of(second) and 5 in tiny_run.metrics_of(second)

    trainer = tiny_run.train_here(
        tiny_run.make_config(inputs, second, TWO_RANKS, *drops), monkeypatch
    )
    assert trainer.resumed_from == 3 and checkpoint.read_tracker(second / "checkpoints") == 6
    assert not (second / "checkpoints" / "global_step_6" / "stale").exists()
    tiny_run.assert_equal_runs(first, second, range(1, 7), checkpoint=6)
    trained = load_latent_model(second / "checkpoints" / "global_step_6" / "actor" / "huggingface")
    start = load_latent_model(inputs / "model")
    assert trained.mechanism == start.mechanism
    assert not torch.equal(*(m.model.get_output_embeddings().weight for m in (trained, start)))


def test_prompt_slots_train(local_ray, tmp_path, monkeypatch):
    """IVT-LR trains with drawn image positions and a vision tower that trains.

    Choices, embeddings and h are recorded, replayed and dumped; the text's mask leaves them
    out, and the choices have a ratio of their own. An alarm at step 2 of 4 ends the run there,
    with a checkpoint.
    """
    inputs = tiny_run.write_inputs(tmp_path, build=tiny.tiny_qwen2_vl, **SLOTS)
    drawn = ("latent.selection=plackett_luce", "actor_rollout_ref.actor.freeze_vision_tower=false")
    output, sizes = tmp_path / "out", ("trainer.total_training_steps=4", "trainer.test_freq=-1")
    alarm = ("latent.alarm.stop=true", "latent.alarm.patience=1")

    def sound_at_step_2(trainer):
        alarms = trainer.guards.alarms
        alarms.sounds = lambda kind: trainer.global_steps == 2 or Alarms.sounds(alarms, kind)

    config = tiny_run.make_config(
        inputs, output, "trainer.val_before_train=false", *drawn, *sizes, *alarm
    )
    tiny_run.train_here(config, monkeypatch, sound_at_step_2)
    metrics = tiny_run.metrics_of(output)
    assert (
        max(metrics) == 2
        and metrics[2]["latent/alarm_unused"] == 1.0
        and metrics[1]["latent/alarm_unused"] == 0.0
    )
    assert checkpoint.read_tracker(output / "checkpoints") == 2
    assert (output / "usage_start.safetensors").is_file(), (
        "without a first validation drift still has its start"
    )
    for name in ("logp", "density"):
        assert all(metrics[step][f"latent/replay_{name}_gap_max"] < 1e-4 for step in (1, 2)), name
    assert (
        metrics[1]["latent/ratio_mean"] == pytest.approx(1, abs=1e-4)
        and metrics[1]["latent/log_density"] < -0.5
    )
    assert metrics[1]["actor/kl_loss"] == 0.0 and metrics[2]["actor/kl_loss"] > 0.0
    dumped = read_dump(output / "rollouts")
    assert not dumped.problems and len(dumped.trajectories) == 2 * 16
    slots = ([K.SELECTED] * 2 + [K.LATENT]) * 2
    for item in dumped.trajectories:
        trajectory = item.trajectory
        assert trajectory.kinds[:6].tolist() == slots and not item.response_mask[:6].any()
        assert len(set(trajectory.selected_idx.tolist())) == 4 and len(trajectory.kinds) <= 12
        assert item.response_mask[6:].all() and "<|lvr|>" not in item.text
    trained = load_latent_model(output / "checkpoints" / "global_step_2" / "actor" / "huggingface")
    start = load_latent_model(inputs / "model")
    assert trained.mechanism == start.mechanism
    assert not torch.equal(*(m.model.model.visual.merger.mlp[2].weight for m in (trained, start)))


def check_dropped_rows(output: Path, metrics: dict[int, dict]) -> None:
    """Row 0 of each epoch raises: its four trajectories act nowhere, and no mean counts them."""
    num_dropped = 0
    for step in range(1, 7):
        lines = (output / "rollouts" / f"step_{step}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        dropped = [row for row in rows if row["id"].startswith("0/")]
        kept = [row["reward"] for row in rows if row not in dropped]
        for row in dropped:
            assert (
                not any(row["response_mask"])
                and not any(row["advantages"])
                and row["reward"] == 0.0
            )
        assert metrics[step]["critic/score/mean"] == pytest.approx(sum(kept) / len(kept))
        assert metrics[step]["rewards/errors/exception"] == len(dropped)
        num_dropped += len(dropped)
    assert num_dropped >= 4
    # one of the three validation rows, with the index 100, raises too
    assert metrics[3]["val-aux/dropped_frac"] == pytest.approx(1 / 3)


@pytest.mark.long
@pytest.mark.parametrize(
    "treatment",
    [
        "latent.treatment.gaussian.sigma=0.5",
        "latent.treatment.gumbel_soft.top_k=4",
        # its density keeps H log sigma: below -1 for certain at a width above 1 only
        "latent.treatment.gaussian_head.sigma=3",
    ],
    ids=["gaussian", "gumbel_soft", "gaussian_head"],
)
def test_latents_that_act(local_ray, inputs, tmp_path, monkeypatch, treatment):
    """What the rollout drew, perturbed logits included, is what the engine scores.

    Two steps with a KL and an anchor.
    """
    changes = [
        f"latent.treatment.name={treatment.split('.')[2]}",
        treatment,
        "latent.treatment.kl_coef=0.1",
    ]
    changes += [
        "latent.treatment.anchor_weight=0.1",
        "trainer.total_training_steps=2",
        "trainer.save_freq=-1",
    ]
    config = tiny_run.make_config(inputs, tmp_path, *changes, "trainer.val_before_train=false")
    tiny_run.train_here(config, monkeypatch)
    metrics = tiny_run.metrics_of(tmp_path)
    check_one_process(config, inputs, metrics, num_steps=2)
    for step in (1, 2):  # one update a rollout: every ratio is 1
        assert metrics[step]["latent/replay_density_gap_max"] < 1e-4
        assert metrics[step]["latent/ratio_mean"] == pytest.approx(1, abs=1e-3)
        assert metrics[step]["latent/log_density"] < -1
    assert metrics[1]["latent/kl"] == 0 and metrics[1]["latent/anchor"] < 1e-8
    assert metrics[2]["latent/kl"] > 0 and metrics[2]["latent/anchor"] > 1e-6
    lines = (tmp_path / "rollouts" / "step_1.jsonl").read_text().splitlines()
    row = next(
        row for row in map(json.loads, lines) if K.LATENT in row["kinds"][len(row["prompt_ids"]) :]
    )
    kinds = row["kinds"][len(row["prompt_ids"]) :]
    first = kinds.index(K.LATENT)
    assert row["rollout_log_probs"][first] < -1 and not row["response_mask"][first]
    (width,) = {
        item.trajectory.latent_aux.shape[1]
        for item in read_dump(tmp_path / "rollouts").trajectories
    }
    assert width == (4 + 4 if "gumbel" in treatment else 0), (
        "what the treatment recorded is dumped"
    )


def check_one_process(config, inputs, metrics, num_steps):
    """`benchmarks/one_process.py` takes the same steps: rollouts, rewards, losses, gradients."""
    sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
    import one_process

    loaded = one_process.load(config, inputs / "model")
    rows = one_process.in_training_order(
        one_process.read_rows(inputs, "train", loaded), config.data.seed
    )
    with one_process.rewards_of(config, loaded) as scorer:
        training = one_process.OneProcess(config, loaded)
        rows = one_process.endless(rows)
        for step in range(1, num_steps + 1):
            log, own = training.step(step, rows, scorer), metrics[step]
            assert log.reward == pytest.approx(own["critic/rewards/mean"], abs=1e-6)
            assert log.length == pytest.approx(own["response_length/mean"], abs=1e-6)
            assert log.grad_norm == pytest.approx(own["actor/grad_norm"], rel=1e-3)
            assert log.entropy == pytest.approx(own["actor/entropy"], rel=1e-3)
            assert log.kl == pytest.approx(own["actor/kl_loss"], rel=1e-2, abs=1e-6)


FAILING_REWARD = """
import os
def compute_score(data_source, solution_str, ground_truth, extra_info):
    return float("nan") if os.path.exists({flag!r}) else float(len(solution_str))
"""


def test_failures_stop_the_run_with_their_own_error(local_ray, inputs, tmp_path, monkeypatch):
    """A policy that is not the one that acted, and a reward that is no number, end the run.

    One after the other, in the same workers.
    """
    import transfer_queue as tq

    from grpo_latent.verl_plugin.trainer.replay_buffer import LatentReplayBuffer

    config = tiny_run.make_config(
        inputs, tmp_path, "trainer.val_before_train=false", "trainer.save_freq=1"
    )
    reward, flag = tmp_path / "bad.py", tmp_path / "flag"
    reward.write_text(FAILING_REWARD.format(flag=str(flag)))
    config.reward.custom_reward_function.path = str(reward)
    materialize = LatentReplayBuffer._materialize_batch

    def corrupt(buffer, *args):
        """What the sampler reported is off by 1e-3 nats."""
        batch = materialize(buffer, *args)
        data = tq.kv_batch_get(batch.keys, batch.partition_id, select_fields=["rollout_log_probs"])
        data["rollout_log_probs"] = data["rollout_log_probs"] + 1e-3
        tq.kv_batch_put(batch.keys, batch.partition_id, fields=data)
        return batch

    def fail_twice(trainer):
        fit = trainer.fit

        def fit_until_rewards_fail(manager):
            bound = (
                "step 1, trajectory .* 0.001 nats; expected <= latent.replay_logp_gap_bound=0.0001"
            )
            with monkeypatch.context() as patch, pytest.raises(ReplayGapError, match=bound):
                patch.setattr(LatentReplayBuffer, "_materialize_batch", corrupt)
                fit(manager)
            tq.kv_clear(keys=list(tq.kv_list("train").get("train", {})), partition_id="train")
            flag.touch()
            fit(manager)

        trainer.fit = fit_until_rewards_fail

    with pytest.raises(RewardError, match="returned nan"):
        tiny_run.train_here(config, monkeypatch, fail_twice)
    assert not (tmp_path / "checkpoints").exists()
