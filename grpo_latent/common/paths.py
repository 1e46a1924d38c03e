"""What a path in a config may be: one rule for all commands.

~/rows.parquet, rows.parquet    a file of this machine
s3://…, hdfs://…, any x://      somewhere else: who reads it fetches it; nothing to check before
pkg://package.module            a Python module, as verl names one: no file either
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from grpo_latent.errors import ConfigError

SCHEME = "://"
# keys of a training config, by what a run does with what they name
WRITTEN = ("latent.output_dir", "latent.dump_dir", "trainer.default_local_dir")
READ = (
    "data.train_files",
    "data.val_files",
    "data.custom_cls.path",
    "actor_rollout_ref.model.path",
    "reward.custom_reward_function.path",
    "latent.reward.functions",
    "trainer.resume_from_path",
)


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


def shipped_folder() -> Path | None:
    """Where this node has its copy of the working directory that a job was submitted with.

    Each node has one, at a path of its own that Ray removes some time after the job; the driver
    and all workers stand in it. None outside of such a job.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return Path.cwd() if job.get("runtime_env", {}).get("working_dir") else None


def for_all_nodes(path: str, key: str) -> str:
    """A path as every process of a run can use it: absolute, or within the shipped folder.

    Args:
        key: where the config names it.

    Raises:
        ConfigError: an output would lie in the shipped folder, and be lost with it.
    """
    full, shipped = absolute(path), shipped_folder()
    if is_remote(path) or shipped is None:
        return full
    inside = Path(os.path.normpath(full))
    if not inside.is_relative_to(shipped):
        return full
    if key in WRITTEN:
        raise ConfigError(
            "an output in the job's working directory, of which each node has its own copy",
            where=key,
            got=path,
            expected="a folder that all nodes share",
            fix=f"Set {key}=/absolute/path on a shared file system.",
        )
    return str(inside.relative_to(shipped))


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
