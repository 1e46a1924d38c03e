"""Damage of a folder's files is named before anything is loaded, the manifest's own included.

Does not cover that each loader asks: `tests/benchmarks/test_corruptions.py`.
"""

import json

import pytest

from grpo_latent.common import manifest
from grpo_latent.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "actor").mkdir()
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "config.json").write_text('{"a": 1}')
    (tmp_path / "actor" / "optim.pt").write_bytes(b"x" * 100)
    (tmp_path / "empty.txt").touch()
    manifest.write_manifest(tmp_path)
    return tmp_path


def test_a_whole_folder_is_passed_in_silence(folder):
    assert manifest.check_folder(folder) == []
    names = {"model.safetensors", "config.json", "actor/optim.pt", "empty.txt"}
    assert set(manifest.read_manifest(folder)) == names
    known = "9834876dcfb05cb167a5c24953eba58c4ac89b1adf57f28f2f9d09af107ee8f0"  # of "aaa"
    (folder / "aaa").write_text("aaa")
    assert manifest.digest(folder / "aaa") == manifest.Entry(3, known)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "actor/optim.pt"])
@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b""), "has another size; got 0 bytes"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has another size"),
        (lambda path: path.write_bytes(path.read_bytes() + b"0"), "has another size"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"), "has changed"),
    ],
    ids=["deleted", "emptied", "cut", "grown", "flipped"],
)
def test_what_is_missing_or_changed_is_named(folder, name, damage, match):
    damage(folder / name)
    with pytest.raises(CheckpointError, match=f"{name}: a part of the checkpoint {match}"):
        manifest.check_folder(folder)


def test_every_byte_of_the_manifest_counts(folder):
    """Digits of a digest, too: otherwise another file would be blamed."""
    path = folder / manifest.MANIFEST_FILE
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match="manifest.json: the manifest is damaged"):
            manifest.check_folder(folder)
    for cut in (0, 1, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(CheckpointError, match="manifest.json: the manifest is damaged"):
            manifest.check_folder(folder)


@pytest.mark.parametrize(
    "values", [[], {}, {"files": []}, {"files": {"a": 1}}, {"files": {"a": {"size": 1}}}]
)
def test_what_is_no_manifest_is_named(folder, values):
    (folder / manifest.MANIFEST_FILE).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="manifest.json: the manifest is damaged"):
        manifest.read_manifest(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "model-2.safetensors", "actor/more.pt"])
def test_a_file_that_would_be_loaded_is_listed_or_refused(folder, name):
    (folder / "README.md").write_text("mine")
    (folder / ".config.json.0a1b.part").write_text("what a kill left")
    assert manifest.check_folder(folder) == []
    (folder / name).touch()
    with pytest.raises(CheckpointError, match=f"{name}: a file that is no part"):
        manifest.check_folder(folder)


def test_digests_can_be_left_out_and_that_is_said(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1] + b"!")
    (note,) = manifest.check_folder(folder, verify_digests=False)
    assert note.startswith("verify_digests=false") and str(folder) in note
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        manifest.check_folder(folder, verify_digests=False)


def test_a_folder_without_a_manifest_is_said_once(tmp_path, capsys):
    notes = manifest.check_folder(tmp_path)
    assert notes == [manifest.no_manifest(tmp_path)]
    manifest.say_once(notes)
    manifest.say_once(notes)
    assert capsys.readouterr().err == f"note: {notes[0]}\n"
