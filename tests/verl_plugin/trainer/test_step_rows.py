"""Groups on their way to ranks, and what the console says of prompts that are not shared."""

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from grpo_latent.verl_plugin.boot.layout import sharing_notes
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.trainer.step_rows import whole_groups
from grpo_latent.verl_plugin.trainer.trainer import LatentPPOTrainer


def keys(*groups):
    """verl's keys of trajectories, `<group>_<session>_<output>`; a group's name may have a _."""
    seen = {}
    sessions = [seen.update({g: seen.get(g, -1) + 1}) or seen[g] for g in groups]
    return [f"g_{group}_{session}_0" for group, session in zip(groups, sessions, strict=True)]


def test_ranks_get_whole_groups_one_after_the_other():
    """Of a batch that verl has torn apart; the two long groups go to different ranks."""
    torn = keys(*"abcdbacddcba")
    lengths = [{"a": 100, "b": 90, "c": 10, "d": 5}[key[2]] for key in torn]
    parts = whole_groups(torn, lengths, 2)
    assert sorted(row for part in parts for row in part) == list(range(12))
    names = ["".join(torn[row][2] for row in part) for part in parts]
    assert sorted(names) == ["aaaddd", "bbbccc"]


def test_one_rank_keeps_the_order_of_groups():
    assert whole_groups(keys(*"aabbcc"), [9, 9, 1, 1, 5, 5], 1) == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("groups", ["aabbcc", "aab"])
def test_ranks_that_cannot_have_equally_many_whole_groups_keep_verls_rows(groups):
    assert whole_groups(keys(*groups), [1] * len(groups), 2) is None


@pytest.mark.parametrize(
    ("shares", "mini_batch", "asks_verl"),
    [(True, 6, False), (False, 6, True), (True, 4, True)],
    ids=["whole groups", "not shared", "to be filled up"],
)
def test_verl_orders_a_batch_only_where_groups_cannot_stay_whole(
    monkeypatch, shares, mini_batch, asks_verl
):
    asked = []

    def by_verl(self, batch, metrics, *more):
        asked.append(list(batch.keys))
        return batch

    monkeypatch.setattr(PPOTrainerSync, "_balance_batch", by_verl)
    trainer = object.__new__(LatentPPOTrainer)
    trainer.options = LatentOptions(share_prompt=shares)
    trainer.use_critic, trainer.global_steps = False, 1
    trainer.config = OmegaConf.create(
        {
            "trainer": {"critic_warmup": 0},
            "actor_rollout_ref": {
                "actor": {"ppo_mini_batch_size": mini_batch // 2},
                "rollout": {"n": 2},
            },
        }
    )
    trainer.actor_rollout_wg = SimpleNamespace(
        _dispatch_info={}, _query_dispatch_info=lambda mesh: [0, 1, 1] if mesh == "actor" else []
    )
    names = keys(*"aabbccddeeff" if mini_batch == 6 else "aabbcc")
    lengths = [{"a": 90}.get(key[2], 10) for key in names]
    batch = KVBatchMeta(
        keys=list(names), tags=[{"seq_len": n} for n in lengths], partition_id="train"
    )
    metrics = {}
    ordered = trainer._balance_batch(batch, metrics)
    assert asked == ([names] if asks_verl else [])
    if not asks_verl:
        ranks = ordered.keys[:6], ordered.keys[6:]
        assert sorted(ordered.keys) == names
        assert all(len({key[2] for key in rank}) == 3 for rank in ranks)
        assert metrics["global_seqlen/max"] == 220 and metrics["global_seqlen/min"] == 60


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"model.use_remove_padding": True}, "runs its own prompt"),
        ({"model.override_config.attn_implementation": "eager"}, "runs its own prompt"),
        ({"actor.use_dynamic_bsz": True}, "sorts trajectories by length"),
        ({"actor.ppo_micro_batch_size_per_gpu": 12}, "tear groups of 8 apart"),
        ({"actor.ppo_micro_batch_size_per_gpu": 4}, "tear groups of 8 apart"),
    ],
)
def test_what_is_not_shared_is_said(changes, said):
    config = OmegaConf.create(
        {
            "model": {
                "use_remove_padding": False,
                "override_config": {"attn_implementation": "sdpa"},
            },
            "actor": {"use_dynamic_bsz": False, "ppo_micro_batch_size_per_gpu": 16},
            "rollout": {"n": 8},
        }
    )
    for key, value in changes.items():
        OmegaConf.update(config, key, value)
    notes = sharing_notes(config, LatentOptions())
    assert (said in " ".join(notes)) if said else not notes
    assert not sharing_notes(config, LatentOptions(share_prompt=False))
