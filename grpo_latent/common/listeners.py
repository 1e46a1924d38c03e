"""On which addresses the collectives of a process listen: that of its node, and no other.

torch's store listens on all interfaces, whatever host it is given, and whoever reaches its port
reads and sets its keys; gloo and NCCL take the interface of the host's name, or the first one.
"""

from __future__ import annotations

import errno
import functools
import importlib
import os
import socket
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from grpo_latent.errors import ConfigError

FIX = "Start Ray with --node-ip-address=<an address of this machine>."
rendezvous: Any = importlib.import_module(
    "torch.distributed.rendezvous"
)  # a function has its name too

LOOPBACK = "127.0.0.1"
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
QUEUED_CONNECTIONS = 4096  # as torch's own store


def listen_on(address: str) -> None:
    """Makes the collectives that this process starts listen on `address`; idempotent.

    What the user has set of gloo's and NCCL's variables stays.

    Args:
        address: of this node, as the other nodes of the run know it; 127.0.0.1 for one machine.

    Raises:
        ConfigError: no interface of this machine has it.
    """
    unset = [variable for variable in INTERFACE_VARIABLES if not os.environ.get(variable)]
    if unset:
        os.environ |= dict.fromkeys(unset, interface_of(address))
    bind_stores()


def interface_of(address: str) -> str:
    """The name of the interface that has `address`; raises `ConfigError` where none has."""
    address = address.strip("[]")  # of IPv6, as Ray writes it
    interfaces = psutil.net_if_addrs()
    for name, entries in interfaces.items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    raise ConfigError(
        "no interface of this machine has the node's address",
        where="ray",
        got=address,
        expected=f"an address of {sorted(interfaces)}",
        fix=FIX,
    )


def bind_stores() -> None:
    """Makes torch's stores of this process listen on the host that they are given; idempotent."""
    original = rendezvous._create_c10d_store
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def create(
        hostname: str,
        port: int,
        rank: int,
        world_size: int,
        timeout: timedelta,
        use_libuv: bool = True,
    ) -> dist.Store:
        listener = _listener(hostname, port) if rank == 0 and not _is_agents() else None
        if listener is None:
            return original(hostname, port, rank, world_size, timeout, use_libuv)
        return dist.TCPStore(
            host_name=hostname,
            port=listener.getsockname()[1],
            world_size=world_size,
            is_master=True,
            timeout=timeout,
            multi_tenant=True,
            master_listen_fd=listener.detach(),
            use_libuv=use_libuv,
        )

    rendezvous._create_c10d_store = create


def _is_agents() -> bool:
    """Whether torchrun holds the store, and all ranks are its clients."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _listener(hostname: str, port: int) -> socket.socket | None:
    """None where the port is taken.

    By a store of this process, which torch then shares, or by another process, which torch says.

    Raises:
        ConfigError: the host's address is none of this machine's.
    """
    family = socket.getaddrinfo(hostname, port, type=socket.SOCK_STREAM)[0][0]
    try:
        return socket.create_server((hostname, port), family=family, backlog=QUEUED_CONNECTIONS)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return None
        raise ConfigError(
            "torch's store cannot listen where it is looked for",
            where=f"rendezvous at {hostname}:{port}",
            got=str(error),
            expected="an address of this machine",
            fix=FIX,
        ) from error
