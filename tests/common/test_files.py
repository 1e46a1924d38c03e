"""One atomic write. Not covered: a power cut; only the order of sync and rename is checked."""

import json
import os
import stat
import threading

import pytest
import torch
from safetensors.torch import load_file

from grpo_latent.common import files
from grpo_latent.common.files import (
    replacing_file,
    replacing_folder,
    write_bytes,
    write_json,
    write_tensors,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_each_kind_of_content_makes_its_folders_and_leaves_nothing_else(tmp_path):
    folder = tmp_path / "a" / "b"
    for _ in range(2):  # the second time over the first
        write_bytes(folder / "x.bin", b"\0\1")
        write_text(folder / "x.txt", "größer\n")
        write_json(folder / "x.json", {"a": [1, 2]})
        write_tensors(folder / "x.safetensors", {"t": torch.arange(6).view(2, 3).T}, {"k": "v"})
    assert names(folder) == ["x.bin", "x.json", "x.safetensors", "x.txt"]
    assert (folder / "x.bin").read_bytes() == b"\0\1"
    assert (folder / "x.txt").read_text(encoding="utf-8") == "größer\n"
    assert json.loads((folder / "x.json").read_text()) == {"a": [1, 2]}
    assert torch.equal(load_file(folder / "x.safetensors")["t"], torch.arange(6).view(2, 3).T)


def test_a_file_has_the_mode_that_open_gives(tmp_path):
    write_text(tmp_path / "ours", "")
    (tmp_path / "plain").write_text("")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "plain")]
    assert modes[0] == modes[1]


def test_a_failed_write_keeps_the_old_content_and_leaves_no_part(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, object())
    with pytest.raises(KeyError), replacing_file(path) as part:
        part.write_text("half")
        raise KeyError
    assert json.loads(path.read_text()) == 1 and names(tmp_path) == ["x.json"]


def test_readers_never_see_half_a_file_of_two_writers(tmp_path):
    path, size, is_done = tmp_path / "x", 1 << 16, threading.Event()
    contents = [bytes([value]) * size for value in (1, 2)]
    write_bytes(path, contents[0])

    def write(content):
        while not is_done.is_set():
            write_bytes(path, content)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    try:
        seen = [path.read_bytes() for _ in range(200)]
    finally:
        is_done.set()
        for writer in writers:
            writer.join()
    assert set(seen) <= set(contents) and names(tmp_path) == ["x"]


def test_content_is_synced_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    events, path = [], tmp_path / "x"
    replace = os.replace
    monkeypatch.setattr(files, "sync", lambda target: events.append(("sync", target.is_dir())))
    monkeypatch.setattr(
        os, "replace", lambda *args: (events.append(("rename", None)), replace(*args))
    )
    write_text(path, "x")
    assert events == [("sync", False), ("rename", None), ("sync", True)]


def test_of_two_files_the_first_one_named_becomes_visible_last(tmp_path, monkeypatch):
    order, replace = [], os.replace
    monkeypatch.setattr(
        os, "replace", lambda part, path: (order.append(path.name), replace(part, path))
    )
    with replacing_file(tmp_path / "index") as index, replacing_file(tmp_path / "data") as data:
        index.write_text("i")
        data.write_text("d")
    assert order == ["data", "index"]
    with (
        pytest.raises(KeyError),
        replacing_file(tmp_path / "index"),
        replacing_file(tmp_path / "data") as data,
    ):
        data.write_text("new")
        raise KeyError
    assert (tmp_path / "data").read_text() == "d" and names(tmp_path) == ["data", "index"]


def test_a_folder_is_replaced_whole(tmp_path):
    for version in ("1", "2"):
        with replacing_folder(tmp_path / "model") as part:
            (part / "sub").mkdir()
            (part / "sub" / version).write_text(version)
            if version == "2":
                assert (tmp_path / "model" / "sub" / "1").is_file(), (
                    "the old one stands while the new one is written"
                )
    assert names(tmp_path) == ["model"] and names(tmp_path / "model" / "sub") == ["2"]
    with pytest.raises(KeyError), replacing_folder(tmp_path / "model") as part:
        (part / "3").write_text("3")
        raise KeyError
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["sub"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path, monkeypatch):
    with replacing_folder(tmp_path / "model") as part:
        (part / "1").write_text("1")
    replace = os.replace

    def killed_at_the_second(source, target):
        if source.name.endswith(".part"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed_at_the_second)
        with replacing_folder(tmp_path / "model") as part:
            (part / "2").write_text("2")
    assert names(tmp_path) == [".model.old"]
    with pytest.raises(KeyError), replacing_folder(tmp_path / "model"):
        raise KeyError
    assert names(tmp_path / "model") == ["1"]
