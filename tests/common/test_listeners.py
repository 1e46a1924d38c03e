"""Where collectives listen: torch's store and gloo, asked of the kernel."""

import errno
import os
import socket
import subprocess
import sys
from datetime import timedelta

import psutil
import pytest
import torch.distributed as dist

from grpo_latent.common import listeners
from grpo_latent.common.listeners import rendezvous
from grpo_latent.errors import ConfigError

TIMEOUT = timedelta(seconds=20)


@pytest.fixture
def bound_stores(monkeypatch):
    monkeypatch.setattr(rendezvous, "_create_c10d_store", rendezvous._create_c10d_store)
    listeners.bind_stores()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def addresses_of(port: int) -> set[str]:
    connections = psutil.Process().net_connections("tcp")
    return {c.laddr.ip for c in connections if c.status == "LISTEN" and c.laddr.port == port}


def store(rank: int, port: int):
    return next(
        rendezvous._tcp_rendezvous_handler(
            f"tcp://127.0.0.1:{port}?rank={rank}&world_size=1", timeout=TIMEOUT
        )
    )[0]


def test_a_store_listens_where_it_is_said_to(bound_stores):
    listeners.bind_stores()  # twice, as with several models in a process
    port = free_port()
    first = store(0, port)
    first.set("key", "value")
    assert addresses_of(port) == {"127.0.0.1"}
    # clients, and whoever begins with the same port in this process, meet it
    assert store(1, port).get("key") == store(0, port).get("key") == b"value"


def test_torch_itself_listens_everywhere():
    """What the binding is for; where torch has learnt it, it can go."""
    port = free_port()
    kept = store(0, port)
    assert addresses_of(port) == {"::"} and kept is not None


def test_a_port_of_another_process_is_refused_as_by_torch(bound_stores):
    command = "import socket, sys\nserver = socket.create_server(('127.0.0.1', 0))\n"
    command += "print(server.getsockname()[1], flush=True)\nsys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other, pytest.raises(dist.DistNetworkError) as raised:
        store(0, int(other.stdout.readline()))
    assert os.strerror(errno.EADDRINUSE).lower() in str(raised.value).lower()


def test_an_address_of_another_machine_is_refused(bound_stores):
    url = f"tcp://203.0.113.9:{free_port()}?rank=0&world_size=1"
    with pytest.raises(ConfigError, match="rendezvous at 203.0.113.9:.* cannot listen"):
        next(rendezvous._tcp_rendezvous_handler(url, timeout=TIMEOUT))


def test_the_interface_has_the_address(monkeypatch):
    for variable in listeners.INTERFACE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "the user's")
    monkeypatch.setattr(rendezvous, "_create_c10d_store", rendezvous._create_c10d_store)
    listeners.listen_on("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == listeners.interface_of("127.0.0.1")
    assert os.environ["NCCL_SOCKET_IFNAME"] == "the user's"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    with pytest.raises(
        ConfigError, match="node's address; got 203.0.113.9; expected an address of"
    ):
        listeners.listen_on("203.0.113.9")
