"""verl's own loads of a rank's files run no code, and what the rank wrote is digested as it lies.

On one rank, without Ray. Two ranks and the whole way through the trainer:
`trainer/test_training.py`.
"""

import engine_helpers as helpers
import pytest
import torch
from folder_cases import WritesMarker

from grpo_latent.common import manifest
from grpo_latent.errors import CheckpointError
from grpo_latent.verl_plugin.worker.parts import PartDigests, rank_of

EXTRA = "extra_state_world_size_1_rank_0.pt"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return helpers.make_checkpoint(tmp_path_factory.mktemp("model") / "model")


def test_a_foreign_checkpoint_runs_no_code(model, gloo, tmp_path):
    engine = helpers.make_engine(model)
    engine.save_checkpoint(str(tmp_path / "actor"), global_step=1)
    saved = engine.parts.result()
    marker, path = tmp_path / "marker", tmp_path / "actor" / EXTRA
    engine.load_checkpoint(str(tmp_path / "actor"))

    with torch.serialization.safe_globals([]):
        state = torch.load(path, weights_only=False)
    torch.save(state | {"more": WritesMarker(marker)}, path)
    with pytest.raises(CheckpointError, match=f"{EXTRA}: .*run code.*latent.trust_pickles=true"):
        engine.load_checkpoint(str(tmp_path / "actor"))
    assert not marker.exists()
    with pytest.raises(CheckpointError, match=f"{EXTRA}: a part of the checkpoint has another"):
        manifest.check_files(tmp_path / "actor", saved)

    trusting = helpers.make_engine(model, trust_pickles=True)
    trusting.load_checkpoint(str(tmp_path / "actor"))
    assert marker.exists(), "it would have run"
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{EXTRA}: a part of the checkpoint is missing"):
        trusting.load_checkpoint(str(tmp_path / "actor"))


def test_ranks_digest_their_own_files_and_the_model_gets_a_manifest(tmp_path):
    names = [
        f"{stem}_world_size_2_rank_{rank}.pt" for stem in ("model", "optim") for rank in (0, 1)
    ]
    others = ["fsdp_config.json", "huggingface/config.json", "huggingface/model.safetensors"]
    (tmp_path / "huggingface").mkdir()
    for name in names + others:
        (tmp_path / name).write_text(name)
    parts = [PartDigests(tmp_path, rank).result() for rank in (0, 1)]
    assert set(parts[1]) == {name for name in names if name.endswith("rank_1.pt")}
    listed = "huggingface/manifest.json"
    assert set(parts[0]) == {*names, *others, listed} - set(parts[1])
    assert all(rank_of(name) == rank for rank in (0, 1) for name in parts[rank])
    manifest.check_files(tmp_path, parts[0] | parts[1])
    assert manifest.check_folder(tmp_path / "huggingface") == []
    assert set(manifest.read_manifest(tmp_path / "huggingface")) == {
        "config.json",
        "model.safetensors",
    }
    again = PartDigests(tmp_path, 0).result()
    assert again == parts[0], "a manifest that lies there already is made anew"
