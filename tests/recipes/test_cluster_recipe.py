"""`recipes/cluster` up to `ray start`, which a script plays, and a machine without namespaces."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "recipes" / "cluster"
sys.path.insert(0, str(FOLDER))

import namespaces  # noqa: E402


def start(tmp_path, *arguments, **variables):
    """What `ray` is called with, and the settings of its health checks."""
    ray = tmp_path / "ray"
    ray.write_text(
        '#!/usr/bin/env bash\necho "$RAY_AUTH_MODE $RAY_health_check_failure_threshold $*" > "$LOG"\n'
    )
    ray.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log"), **variables}
    done = subprocess.run(
        ["bash", FOLDER / "start.sh", *arguments], env=env, capture_output=True, text=True
    )
    return done, (tmp_path / "log").read_text().strip() if done.returncode == 0 else done.stderr


def test_a_head_and_a_node_are_bound_to_their_addresses_and_ask_for_the_token(tmp_path):
    _, head = start(tmp_path, "head", "10.0.0.1", "--num-cpus=8")
    assert head == (
        "token 3 start --head --node-ip-address=10.0.0.1 --port=6379 --dashboard-host=127.0.0.1 "
        "--num-cpus=8"
    )
    _, node = start(
        tmp_path, "node", "10.0.0.2", "10.0.0.1", "--block", RAY_health_check_failure_threshold="9"
    )
    assert node == "token 9 start --address=10.0.0.1:6379 --node-ip-address=10.0.0.2 --block"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "head or node"),
        (("head",), "address of this node"),
        (("node", "10.0.0.2"), "address of the head"),
        (("tail", "10.0.0.2"), "tail: expected head or node"),
    ],
)
def test_what_is_missing_is_said(tmp_path, arguments, message):
    done, text = start(tmp_path, *arguments)
    assert done.returncode != 0 and message in text


def test_without_root_or_the_command_there_is_no_cluster_but_a_reason(monkeypatch, capsys):
    monkeypatch.setattr(namespaces.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "argv", ["namespaces.py", "--", "true"])
    monkeypatch.setattr(namespaces.signal, "signal", lambda *of: None)
    assert namespaces.main() == 2
    assert "no local cluster: network namespaces need root" in capsys.readouterr().err
    monkeypatch.setattr(namespaces.os, "geteuid", lambda: 0)
    monkeypatch.setattr(namespaces.shutil, "which", lambda name: None)
    with pytest.raises(namespaces.Unavailable, match="no ip command"):
        namespaces.check_available()
