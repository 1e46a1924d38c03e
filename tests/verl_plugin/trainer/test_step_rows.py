"""Groups on their way to ranks, and what the console says of prompts that are not shared."""

import pytest
from omegaconf import OmegaConf

from grpo_latent.verl_plugin.boot.layout import sharing_notes
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.trainer.step_rows import whole_groups


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
