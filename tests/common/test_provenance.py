"""What a result file says of where it was made; what the file of a run keeps over its starts."""

import getpass
import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
import torch

from grpo_latent.common import provenance as module
from grpo_latent.common.provenance import (
    append_provenance,
    commit_of,
    processor,
    provenance,
    provenance_line,
    read_provenance,
    versions,
)
from grpo_latent.errors import DataError

X86 = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 207
model name\t: Intel(R) Xeon(R) Processor
stepping\t: 2
flags\t\t: fpu vme

processor\t: 1
model\t\t: 85
"""
ARM = "processor\t: 0\nBogoMIPS\t: 243.75\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n\n"


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    # in a hook git is told of the repository that it runs for
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), *identity, *arguments]
    subprocess.run(command, check=True, capture_output=True, env=env)


def test_a_record_holds_what_numbers_depend_on():
    record = provenance(3)
    assert json.loads(json.dumps(record)) == record
    assert record["seed"] == 3 and record["threads"] == torch.get_num_threads()
    assert record["versions"]["torch"] == torch.__version__
    assert {"python", "transformers", "numpy", "grpo_latent"} <= record["versions"].keys()
    assert record["usable_cores"] <= record["cores"] and record["memory_bytes"] > 2**20
    assert record["kernels"]["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert any("OpenMP" in text for text in record["kernels"]["built_with"])
    assert record["date"].endswith("+00:00")
    assert record["processor"] in provenance_line(record)


def test_a_record_names_no_path_host_or_user():
    text = json.dumps(provenance(0))
    forbidden = [str(Path.home()), str(Path.cwd()), str(Path(__file__).parents[2])]
    assert not [name for name in forbidden if len(name) > 1 and name in text]
    words = text.replace('"', " ").split()
    assert socket.gethostname() not in words and getpass.getuser() not in words
    assert "/opt" not in text, "of the machine that torch was built on"


def test_processors_of_one_name_differ_by_their_numbers(tmp_path):
    for name, text in (("x86", X86), ("arm", ARM)):
        (tmp_path / name).write_text(text)
    assert (
        processor(tmp_path / "x86")
        == "Intel(R) Xeon(R) Processor (family 6, model 207, stepping 2)"
    )
    assert processor(tmp_path / "arm").endswith("(CPU implementer 0x41, CPU part 0xd40)")
    assert processor(tmp_path / "absent")


def test_a_commit_is_the_sources_own(tmp_path, monkeypatch):
    """An environment inside a repository is not tracked by it, whatever that is at."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "code.py").write_text("a = 1\n")
    unknown = {"commit": None, "is_dirty": None}
    assert commit_of(package) == unknown, "no repository"
    git(tmp_path, "init", "-q")
    (tmp_path / "of_the_user.py").touch()
    git(tmp_path, "add", "of_the_user.py")
    git(tmp_path, "commit", "-qm", "one")
    assert commit_of(package) == unknown, "another's repository"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "two")
    clean = commit_of(package)
    assert len(clean["commit"]) == 40 and clean["is_dirty"] is False
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "absent"))
    assert commit_of(package) == clean
    (package / "code.py").write_text("a = 2\n")
    assert commit_of(package) == clean | {"is_dirty": True}
    monkeypatch.setenv("PATH", "")
    assert commit_of(package) == unknown, "no git"


def test_what_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(module, "PACKAGES", ("torch", "no-such-package"))
    assert versions().keys() == {"python", "torch"}


def test_a_run_keeps_a_record_of_every_start(tmp_path):
    assert read_provenance(tmp_path) == []
    for seed in (1, 2):
        append_provenance(tmp_path, seed)
    assert [record["seed"] for record in read_provenance(tmp_path)] == [1, 2]
    for text in ("{", "{}"):
        (tmp_path / "provenance.json").write_text(text)
        with pytest.raises(DataError, match="not a list of records; got {.*Delete the file"):
            append_provenance(tmp_path, 3)


def test_a_line_of_a_record():
    record = provenance(0) | {"accelerators": ["GPU X"], "commit": "0123456789", "is_dirty": True}
    assert ", GPU X, " in provenance_line(record) and provenance_line(record).endswith(
        "commit 01234567+"
    )
    assert "+" not in provenance_line(record | {"is_dirty": False}).split(",")[-1]
    assert "commit" not in provenance_line(record | {"commit": None})
