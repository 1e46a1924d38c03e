"""Whether folders and what they hold are the same to the bit."""

import hashlib
from pathlib import Path

import torch


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
