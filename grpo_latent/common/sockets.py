"""Sockets in the temporary folder: those of a data loader's processes, and Ray's."""

from __future__ import annotations

import os
import tempfile
from multiprocessing import util

from grpo_latent.errors import ConfigError

MAX_PATH_BYTES = 107  # of a socket, on Linux
_NAME = "/pymp-xxxxxxxx/listener-xxxxxxxx"  # as multiprocessing names one
_RAYS = "/session_2026-11-29_00-45-36_778875_4194304/sockets/plasma_store"


def keep_socket_paths_short() -> None:
    """Moves multiprocessing's own folder to /tmp where TMPDIR is too long for a socket's path.

    To be called before worker processes start, which take the folder over. Where the path is too
    long a worker dies of an OSError, or its tensors never come.
    """
    if len((tempfile.gettempdir() + _NAME).encode()) <= MAX_PATH_BYTES:
        return
    given, tempfile.tempdir = tempfile.tempdir, "/tmp"
    try:
        util.get_temp_dir()  # made once a process, and removed at its end
    finally:
        tempfile.tempdir = given


def check_ray_folder(given: str | None) -> None:
    """Raises where the folder is too deep in which a Ray of our own puts its sockets.

    Args:
        given: ray_kwargs.ray_init._temp_dir; None leaves it to Ray: RAY_TMPDIR, or TMPDIR.

    Raises:
        ConfigError: it is; Ray itself raises an OSError.
    """
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder = given or f"{os.environ.get(name, '/tmp')}/ray"
    num_bytes, room = len(folder.encode()), MAX_PATH_BYTES - len(_RAYS.encode())
    if num_bytes > room:
        raise ConfigError(
            "too long a folder for Ray's sockets",
            where="ray_kwargs.ray_init._temp_dir" if given else name,
            got=f"{folder}, {num_bytes} bytes",
            expected=f"at most {room}",
            fix="Set RAY_TMPDIR to a shorter one, such as /tmp.",
        )
