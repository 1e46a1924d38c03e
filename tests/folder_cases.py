"""Whether folders and what they hold are the same to the bit."""

import hashlib
import os
from pathlib import Path

import torch

from grpo_latent.common.manifest import MANIFEST_FILE


def without_manifest(folder):
    """As of an older release or another program: damage is then told by what it breaks."""
    (Path(folder) / MANIFEST_FILE).unlink()
    return folder


class WritesMarker:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def digests(folder):
    """Of every file, by its path below the folder."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def same_nested(a, b):
    """Whether tensors in dicts and lists, and whatever else is in there, are equal."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_nested(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same_nested(x, y) for x, y in zip(a, b, strict=True))
    return a == b
