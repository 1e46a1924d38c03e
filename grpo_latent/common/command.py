"""How every `python -m grpo_latent.…` ends: a line to act on, one meaning for each exit code.

    0    done
    1    something broke that is no fault of what was given: a traceback of ours
    2    what was given cannot be used: command line, config, data, checkpoint, reward, cluster; or
         the run stopped on a typed error. stderr has `ErrorType: message`, with what, where, got,
         expected and the fix
    130  interrupted from the keyboard (128 + SIGINT, as shells count)
    141  whoever reads its output is gone, such as `head` behind `--help` (128 + SIGPIPE); what
         rich prints ends with rich's own code, 1

2 is also what argparse ends with where a command line does not parse. With `--check` a command
that has a config finds out which of 0 and 2 it would be, says what it would do, and writes
nothing.
"""

from __future__ import annotations

import argparse
import errno
import functools
import os
import re
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from grpo_latent.common.spelling import nearest_fix
from grpo_latent.errors import ConfigError, GrpoLatentError

if TYPE_CHECKING:
    from omegaconf import DictConfig

DONE, FAILED, REFUSED, INTERRUPTED, UNREAD = 0, 1, 2, 130, 141
CHECK = "--check"
_HYDRA_RAISES = "HYDRA_FULL_ERROR"
# what the operating system says of a place that was given, which no code of ours can mend
_OF_A_PLACE = {
    errno.ENOTDIR: "a file is where a folder should be",
    errno.EISDIR: "a folder is where a file should be",
    errno.EEXIST: "something else of that name is there",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EROFS: "the file system is read-only",
    errno.ENAMETOOLONG: "the name is too long",
}
_OF_THE_DISK = {  # a write that fails names no file
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
}
_NO_KEY = re.compile(r"Could not override '([^']+)'")

Args = ParamSpec("Args")


def command(main: Callable[Args, int | None]) -> Callable[Args, int]:
    """Wraps the `main` of an entry point: it then returns the exit code.

    That is 0 where `main` returns nothing. What is no error of this package, of hydra, of omegaconf
    or of a place on disk leaves as it came: Python prints the traceback and ends with 1.

        @command
        def main(argv=None): ...

        if __name__ == "__main__":
            sys.exit(main())
    """

    @functools.wraps(main)
    def run(*args: Args.args, **kwargs: Args.kwargs) -> int:
        try:
            try:
                code = main(*args, **kwargs) or DONE
            except SystemExit:  # argparse's, behind --help
                _flush()
                raise
            _flush()
            return code
        except GrpoLatentError as error:
            print_error(error)
            return REFUSED
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _reader_is_gone():
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return UNREAD
            told = _as_ours(error)
            if told is None:
                raise
            print_error(told)
            return REFUSED

    return run


def _flush() -> None:
    """Writes what is left of the output: where that fails when Python ends, nobody can say why."""
    if sys.stdout is not None:  # it was closed by whoever started us
        sys.stdout.flush()


def _reader_is_gone() -> bool:
    """Whether nobody reads our output any more; else a pipe that broke is one to a worker, say."""
    if sys.stdout is None:
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # a broken pipe is told unasked
    return bool(poll.poll(0))


def add_verify_digests(parser: argparse.ArgumentParser) -> None:
    """Adds the switch that all commands which load a model have."""
    parser.add_argument(
        "--no-verify-digests",
        dest="verify_digests",
        action="store_false",
        help="compare names and sizes alone with the checkpoint's manifest.json",
    )


def config_command(
    config_name: str, check: Callable[[DictConfig], None] | None = None
) -> Callable[[Callable[[DictConfig], int | None]], Callable[..., int]]:
    """Wraps a `main(config)` whose config hydra composes.

    Of `grpo_latent/config/<config_name>.yaml` and the command line. The wrapped function is a
    `command`. Called with a config, it runs on that one and hydra has no say in it.

    Args:
        check: runs in place of `main` where the command line has `--check`.
    """

    def decorate(task: Callable[[DictConfig], int | None]) -> Callable[..., int]:
        @command
        @functools.wraps(task)
        def main(config: DictConfig | None = None) -> int | None:
            if config is not None:
                return task(config)
            try:
                _with_hydra(_asked_for(task, check), config_name)
            except Exception as error:
                misspelt = _misspelt(error, config_name)
                if misspelt is None:
                    raise
                raise misspelt from error
            return DONE

        return main

    return decorate


def _asked_for(
    task: Callable[[DictConfig], int | None], check: Callable[[DictConfig], None] | None
) -> Callable[[DictConfig], int | None]:
    """The check where the command line has its switch, which is taken off: hydra refuses it."""
    if CHECK not in sys.argv[1:] or check is None:
        return task
    sys.argv.remove(CHECK)
    return check


def _with_hydra(task: Callable[[DictConfig], int | None], config_name: str) -> None:
    import hydra

    raised: list[Exception] = []

    @functools.wraps(task)
    def job(config: DictConfig) -> None:
        # kept from hydra, which would print a line of its own about it
        try:
            task(config)
        except Exception as error:
            raised.append(error)

    with _hydra_raising():
        hydra.main(
            config_path="pkg://grpo_latent.config", config_name=config_name, version_base=None
        )(job)()
    if raised:
        raise raised[0]


def _misspelt(error: Exception, config_name: str) -> ConfigError | None:
    """An override of a key that is not there, with the nearest one that is; None for other errors.

    hydra itself says to add the key, misspelt as it is.
    """
    found = _NO_KEY.search(str(error)) if _is_of_config_library(error) else None
    if found is None:
        return None
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    from grpo_latent.common.schema import leaves, nearest_keys

    GlobalHydra.instance().clear()
    with initialize_config_module("grpo_latent.config", version_base=None):
        shipped: Any = OmegaConf.to_container(compose(config_name), resolve=False)
    key = found.group(1)
    near = nearest_keys(key, list(leaves(shipped)))
    return ConfigError(
        "unknown key",
        where=key.rpartition(".")[0] or "the config",
        got=key,
        expected=" or ".join(near) if near else "a key of the config",
        fix=f"Write {near[0]}, the nearest spelling." if near else "Take it out.",
    )


@contextmanager
def _hydra_raising() -> Iterator[None]:
    """Makes hydra raise what is wrong with a command line or config.

    Left to itself it prints that and ends with 1.
    """
    before = os.environ.get(_HYDRA_RAISES)
    os.environ[_HYDRA_RAISES] = "1"
    try:
        yield
    finally:
        del os.environ[_HYDRA_RAISES]
        if before is not None:
            os.environ[_HYDRA_RAISES] = before


def print_error(error: GrpoLatentError | OSError) -> None:
    """Prints `ErrorType: message` to stderr.

    Every message that ends a command, or that a command survives, has this form.
    """
    print(f"{type(error).__name__}: {error}", file=sys.stderr)


def _is_of_config_library(error: Exception) -> bool:
    # by name: commands without a config import neither
    return type(error).__module__.split(".")[0] in ("hydra", "omegaconf")


def _as_ours(error: Exception) -> ConfigError | None:
    """What another library or the system says of what was given; None of all else."""
    if _is_of_config_library(error):  # first: hydra's of a config that is not there is an OSError
        return _as_config_error(error)
    return _as_place_error(error) if isinstance(error, OSError) else None


def _as_place_error(error: OSError) -> ConfigError | None:
    """What the operating system says of a place on disk as an error of ours; None of all else."""
    known = _OF_THE_DISK if error.filename is None else _OF_A_PLACE | _OF_THE_DISK
    if error.errno not in known:  # a socket or a process that may not be touched, say
        return None
    return ConfigError(
        known[error.errno],
        where="the disk" if error.filename is None else str(error.filename),
        got=error.strerror,
        expected="a place that can be used",
        fix="Choose another one, or make room there.",
    )


def _no_such_config(name: str) -> ConfigError:
    """Of a `--config-name`, whose folder hydra does not name."""
    asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    asked.add_argument("--config-dir", "-cd", type=Path)
    folder = asked.parse_known_args()[0].config_dir
    names = sorted(path.stem for path in folder.glob("*.yaml")) if folder else []
    return ConfigError(
        "no such config",
        where="--config-name",
        got=name,
        expected=f"one of {names}, of {folder}" if folder else "a config of the package",
        fix=nearest_fix("Write {}", name, names) or "Name its folder: --config-dir.",
    )


def _as_config_error(error: Exception) -> ConfigError:
    """An error of hydra or omegaconf as one of ours."""
    name = getattr(error, "missing_cfg_file", None)
    if name is not None and "primary config" in str(error):
        return _no_such_config(str(name))
    # their messages take several lines, the first of which says most
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    what = lines[0].rstrip(".;") if lines else type(error).__name__
    return ConfigError(what, where="config", fix=" ".join(lines[1:3]) or None)
