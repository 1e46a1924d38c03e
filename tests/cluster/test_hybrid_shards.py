"""Four ranks over gloo, in shards of two of which each exists twice, compute what one computes.

The layout of two nodes with two GPUs each: shards within a node, copies between nodes.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

PLUGIN_TESTS = Path(__file__).resolve().parents[1] / "verl_plugin"
sys.path[:0] = [str(PLUGIN_TESTS), str(PLUGIN_TESTS / "worker")]

import test_two_ranks as ranks  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_four_ranks_in_hybrid_shards_train_as_one(tmp_path):
    folder = ranks.lvr_folder(tmp_path)
    results = {}
    for world_size, fsdp_size in ((1, -1), (4, 2)):
        out = tmp_path / f"world{world_size}"
        out.mkdir()
        arguments = (world_size, str(out / "store"), folder, str(out), fsdp_size)
        mp.spawn(ranks.train_one_step, arguments, nprocs=world_size)
        results[world_size] = torch.load(out / "result.pt")
    one, four = results[1], results[4]
    torch.testing.assert_close(four["loss"], one["loss"], rtol=0, atol=1e-5)
    assert one["grads"].keys() == four["grads"].keys() and len(one["grads"]) > 20
    for name, grad in one["grads"].items():
        torch.testing.assert_close(four["grads"][name], grad, rtol=0, atol=1e-5, msg=name)
    assert max(grad.abs().max() for grad in one["grads"].values()) > 1e-2  # the tolerance is one
    shards = sorted(path.name for path in (tmp_path / "world4" / "checkpoint").glob("model_*.pt"))
    assert shards == [f"model_world_size_4_rank_{rank}.pt" for rank in range(4)]
