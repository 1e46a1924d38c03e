"""What a path in a config may be: one rule for all commands.

~/rows.parquet, rows.parquet    a file of this machine
s3://…, hdfs://…, any x://      somewhere else: whoever reads it fetches it, so nothing can be checked before
pkg://package.module            a Python module, verl's way to name one; also nothing to look for on the disk
"""

from __future__ import annotations

from pathlib import Path

from grpo_latent.errors import ConfigError

SCHEME = "://"


def is_remote(path: str | Path) -> bool:
    """Whether `path` names something that is no file of this machine.

    >>> is_remote("s3://bucket/rows.parquet"), is_remote("~/rows.parquet")
    (True, False)
    """
    return SCHEME in str(path)


def absolute(path: str) -> str:
    """A local path without `~`, from the root; a remote one as it is.

    Another process may have another working directory.

    >>> absolute("s3://bucket/x"), absolute("/data/x")
    ('s3://bucket/x', '/data/x')
    """
    return path if is_remote(path) else str(Path(path).expanduser().absolute())


def check_output_folder(path: object, where: str) -> None:
    """Raises `ConfigError` where a folder cannot be made at `path`; nothing is made."""
    if not isinstance(path, str) or not path.strip():
        raise ConfigError(
            "not a folder",
            where=where,
            got=repr(path),
            expected="a path",
            fix=f"Set {where}=<folder>.",
        )
    if is_remote(path):
        return
    folder = Path(path).expanduser()
    for place in (folder, *folder.parents):
        if place.is_dir():
            return
        if place.exists():
            raise ConfigError(
                "a file is where a folder should be",
                where=where,
                got=str(place),
                expected="a folder, or nothing yet",
                fix=f"Choose another {where}, or move the file.",
            )
