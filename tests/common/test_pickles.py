"""A checkpoint's files are loaded without running code, whatever the caller asks of torch.

The pickle here would write a marker. That verl's own loads are made so:
`tests/verl_plugin/worker/test_loading_without_code.py`.
"""

import os
import pickle
import random

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from folder_cases import WritesMarker

from grpo_latent.common.pickles import check_metadata, check_pickles, without_code
from grpo_latent.errors import CheckpointError

SWITCH = "latent.trust_pickles"


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


@pytest.fixture
def foreign(tmp_path, marker):
    path = tmp_path / "optim.pt"
    torch.save({"state": torch.ones(3), "more": WritesMarker(marker)}, path)
    return path


def test_code_is_not_run_even_where_it_is_asked_for(foreign, marker):
    with without_code(), pytest.raises(pickle.UnpicklingError):
        torch.load(foreign, weights_only=False)
    assert not marker.exists()
    with without_code(is_trusted=True):
        torch.load(foreign, weights_only=False)
    assert marker.exists(), "the pickle would have run"


def test_a_file_with_code_is_refused_by_name_unless_it_is_trusted(foreign, marker):
    with pytest.raises(CheckpointError, match=f"optim.pt: .*run code.*mkdir.*{SWITCH}=true"):
        check_pickles([foreign], False, SWITCH)
    assert not marker.exists()
    check_pickles([foreign], True, SWITCH)
    assert not marker.exists(), "a check loads nothing"


def test_what_training_saves_passes(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    state = {
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "numpy": np.random.RandomState(3).get_state(),
        "random": random.Random(3).getstate(),
        "torch": torch.get_rng_state(),
    }
    path = tmp_path / "extra.pt"
    torch.save(state, path)
    check_pickles([path], False, SWITCH)
    with without_code():
        loaded = torch.load(path, weights_only=False)
    assert loaded["random"] == state["random"] and torch.equal(loaded["torch"], state["torch"])
    assert np.array_equal(loaded["numpy"][1], state["numpy"][1])


@pytest.mark.parametrize("content", [b"", b"no pickle", None], ids=["empty", "other", "missing"])
def test_what_torch_cannot_read_is_named(tmp_path, content):
    path = tmp_path / "data.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="data.pt"):
        check_pickles([path], False, SWITCH)


def test_the_index_of_a_sharded_checkpoint_is_read_without_code(tmp_path, marker):
    """torch itself reads it by plain pickle."""
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optim": optimizer.state_dict()}
    torch.distributed.checkpoint.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    index = tmp_path / "dcp" / ".metadata"
    check_metadata(index)
    for foreign in (WritesMarker(marker), {"state_dict_metadata": WritesMarker(marker)}):
        index.write_bytes(pickle.dumps(foreign))
        with pytest.raises(CheckpointError, match="metadata: .*without running code; got .*mkdir"):
            check_metadata(index)
    # what Python up to 3.11.3 makes of an enumeration's member; of anything else it stays refused
    of_class = b"\x80\x04cbuiltins\ngetattr\nctorch.distributed.checkpoint.metadata\n"
    getattr_of = of_class + b"%s\nV%s\n\x86R."
    index.write_bytes(getattr_of % (b"_MEM_FORMAT_ENCODING", b"TORCH_CONTIGUOUS_FORMAT"))
    check_metadata(index)
    index.write_bytes(getattr_of % (b"TensorProperties", b"__init__"))
    with pytest.raises(CheckpointError, match="getattr is not allowed"):
        check_metadata(index)
    # a dotted name walks from an allowed module to anywhere
    index.write_bytes(b"\x80\x04\x8c\x05torch\x8c\x09os.getcwd\x93)R.")
    with pytest.raises(CheckpointError, match="torch.os.getcwd"):
        check_metadata(index)
    assert not marker.exists()
    index.write_bytes(b"")
    with pytest.raises(CheckpointError, match="metadata"):
        check_metadata(index)


@pytest.mark.parametrize("before", [None, "0"])
def test_the_environment_is_left_as_it_was(monkeypatch, before):
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    for name in names:
        monkeypatch.delenv(name, raising=False)
        if before is not None:
            monkeypatch.setenv(name, before)
    with without_code():
        assert os.environ[names[0]] == "1" and names[1] not in os.environ
    assert [os.environ.get(name) for name in names] == [before, before]
