"""What this package uses of verl is still there, by name.

A failure here says which verl symbol changed.
"""

import json

import pytest
import torch

from grpo_latent.errors import DataError, PluginError
from grpo_latent.verl_plugin.boot import compat, metrics_file
from grpo_latent.verl_plugin.boot.seams import RAY_SEAMS, SEAMS, Seam


@pytest.mark.parametrize("seam", [*SEAMS, *RAY_SEAMS], ids=lambda seam: seam.name)
def test_seam(seam):
    seam.check()


def test_a_changed_seam_names_the_symbol():
    gone = Seam("some use", "verl.trainer.main_ppo:no_such_function", "it runs the training")
    with pytest.raises(
        PluginError, match="main_ppo:no_such_function: verl changed under some use"
    ):
        gone.check()
    changed = Seam(
        "some use", "verl.trainer.main_ppo:run_ppo", "it runs the training", ("config",)
    )
    with pytest.raises(PluginError, match="parameters .*task_runner_class"):
        changed.check()


def test_trainer_mode_is_compared_with_the_literal_that_we_set():
    """The base class branches on the string "sync" in places; `latent_sync` poses as it."""
    import inspect

    from verl.trainer.ppo.v1 import trainer_base

    assert inspect.getsource(trainer_base).count('self.trainer_mode == "sync"') >= 1


@pytest.mark.parametrize("lengths", [(5, 5, 5), (5, 7, 6), (4, 4), (5,)])
def test_position_ids_come_out_as_rows(lengths):
    """Rows are [4, L] in every form in which they arrive.

    Dense, ragged in the wrong dimension, ragged index lost.
    """
    rows = [torch.arange(4 * n).reshape(4, n) for n in lengths]
    forms = (
        [torch.nested.as_nested_tensor(rows, layout=torch.jagged)]
        if len(set(lengths)) == 1
        else []
    )
    if len(set(lengths)) == 1:
        forms.append(torch.stack(rows))
    from verl.utils import tensordict_utils as tu

    pickled = tu.nested_tensor_from_tensor_list(rows, ragged_idx=2)
    pickled._ragged_idx = 1
    for form in (*forms, pickled):
        fixed = compat.fix_position_ids(form)
        assert all(torch.equal(a, b) for a, b in zip(fixed.unbind(), rows, strict=True))
        again = compat.fix_position_ids(fixed)
        assert all(torch.equal(a, b) for a, b in zip(again.unbind(), rows, strict=True))


def test_metrics_are_rewound_to_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": s, "data": {"x": s}}) + "\n" for s in (0, 1, 2, 3))
        + '{"step": 1, "data": {}'
    )
    metrics_file.rewind_metrics(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]
    whole = path.read_bytes()
    for half in (b'{"step": 1, "da\xc3', b"\x00\x00\x00", b"7", b"null", b'{"data": {}}'):
        path.write_bytes(whole + half)
        metrics_file.rewind_metrics(path, 2)
        assert path.read_bytes() == whole, half
    path.write_bytes(b"\x00" + whole)
    with pytest.raises(DataError, match="metrics.jsonl line 1: not the metrics of a step"):
        metrics_file.rewind_metrics(path, 2)
    metrics_file.rewind_metrics(path, 0)
    assert path.read_text() == ""
    metrics_file.rewind_metrics(tmp_path / "none.jsonl", 3)
