"""A rank's files of a checkpoint: digested where they were written, compared where they are loaded.

Ranks of several nodes may each see their own files only, and together they read faster than one.
"""

from __future__ import annotations

import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from grpo_latent.common.files import sync
from grpo_latent.common.manifest import (
    MANIFEST_FILE,
    Entries,
    digest,
    digests,
    files_below,
    write_manifest,
)

_OF_RANK = re.compile(r"_rank_(\d+)\.pt$")
HF_FOLDER = "huggingface"


def is_own(name: str, rank: int) -> bool:
    """Whether a rank writes and loads a file below `actor`; those of no rank are rank 0's.

    >>> is_own("optim_world_size_2_rank_1.pt", 1), is_own("fsdp_config.json", 1)
    (True, False)
    """
    found = _OF_RANK.search(name)
    return rank == (int(found[1]) if found else 0)


class PartDigests:
    """Digests of what a rank has just written, made beside what the rank does next."""

    def __init__(self, folder: str | Path, rank: int):
        pool = ThreadPoolExecutor(1)
        self._future: Future[Entries] = pool.submit(_digest_own, Path(folder), rank)
        pool.shutdown(wait=False)

    def result(self) -> Entries:
        """Waits for them; by path below `actor`."""
        return self._future.result()


def _digest_own(folder: Path, rank: int) -> Entries:
    """Digests files that are on the disk by then, and gives the model's folder its own manifest.

    That folder is also read alone: by evaluation, or by the next run.
    """
    names = [name for name in files_below(folder) if is_own(name, rank)]
    names = [name for name in names if name != f"{HF_FOLDER}/{MANIFEST_FILE}"]
    for name in names:
        sync(folder / name)
    entries = digests(folder, names)
    prefix = f"{HF_FOLDER}/"
    of_model = {n.removeprefix(prefix): e for n, e in entries.items() if n.startswith(prefix)}
    if of_model:
        write_manifest(folder / HF_FOLDER, of_model)
        entries[prefix + MANIFEST_FILE] = digest(folder / HF_FOLDER / MANIFEST_FILE)
    return entries
