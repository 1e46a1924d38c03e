"""Sockets in the temporary folder, by which the processes of a data loader hand tensors over."""

from __future__ import annotations

import tempfile
from multiprocessing import util

MAX_PATH_BYTES = 107  # of a socket, on Linux
_NAME = "/pymp-xxxxxxxx/listener-xxxxxxxx"  # as multiprocessing names one


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
