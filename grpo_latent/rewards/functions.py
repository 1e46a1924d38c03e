"""Which reward functions to call, with which weight, and how to load them from a file."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from grpo_latent.common.settings import build
from grpo_latent.errors import ConfigError
from grpo_latent.rewards.exceptions import in_one_line

DEFAULT_NAME = "compute_score"
PACKAGE_PREFIX = "pkg://"  # verl's way to name a module of an installed package
ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")


@dataclass(frozen=True)
class FunctionSpec:
    """One reward function of a run.

    Attributes:
        path: a Python file, or `pkg://package.module`.
        name: of the function in it.
        weight: of its score in the reward.
        term: name under which its score is logged (`rewards/<term>/mean`); the file's name where
            the function is called `compute_score`, else the function's.
        kwargs: passed to each call.
    """

    path: str
    name: str = DEFAULT_NAME
    weight: float = 1.0
    term: str = ""
    kwargs: dict = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.path, str) or not self.path:
            raise ConfigError(
                "a reward function needs a file",
                where="latent.reward.functions.path",
                got=self.path,
            )
        is_number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if not is_number or not math.isfinite(self.weight):
            raise ConfigError(
                "a weight is no finite number",
                where=f"reward function {self.path}",
                got=self.weight,
                expected="a float",
            )
        if not isinstance(self.kwargs, Mapping):
            raise ConfigError(
                "kwargs are no mapping", where=f"reward function {self.path}", got=self.kwargs
            )
        if not self.term:
            stem = (
                self.path.removeprefix(PACKAGE_PREFIX)
                .replace("/", ".")
                .removesuffix(".py")
                .rpartition(".")[2]
            )
            object.__setattr__(self, "term", stem if self.name == DEFAULT_NAME else self.name)


def specs_from_config(entries: Iterable[Mapping]) -> list[FunctionSpec]:
    """Reads `latent.reward.functions`, a list of {path, name, weight, term, kwargs}.

    All but `path` are optional.

    Raises:
        ConfigError: no function, an unknown key, or two functions under one term.
    """
    specs = []
    for i, entry in enumerate(entries):
        where = f"latent.reward.functions[{i}]"
        if not isinstance(entry, Mapping) or "path" not in entry:
            raise ConfigError(
                "not a reward function",
                where=where,
                got=entry,
                expected="{path, name, weight, term, kwargs}",
            )
        # plain, because the function runs in a process without OmegaConf's types
        values = {
            k: dict(v) if isinstance(v, Mapping) else v for k, v in entry.items() if v is not None
        }
        specs.append(build(FunctionSpec, values, where))
    if not specs:
        raise ConfigError(
            "no reward function",
            where="latent.reward.functions",
            got="an empty list",
            expected="at least one function",
            fix="Set reward.custom_reward_function.path=<file>, or list functions under "
            "latent.reward.functions.",
        )
    terms = [spec.term for spec in specs]
    repeated = sorted({t for t in terms if terms.count(t) > 1})
    if repeated:
        raise ConfigError(
            "two reward functions have the same name in the log",
            where="latent.reward.functions",
            got=repeated,
            expected="a term of its own for each",
            fix="Give each function a `term`.",
        )
    return specs


def load_function(spec: FunctionSpec) -> Callable:
    """Imports the file (which runs it) and takes the function out of it.

    Raises:
        ConfigError: the file is missing or fails to import, lacks the function, or the function
            cannot be called as `f(data_source=…, solution_str=…, ground_truth=…, extra_info=…,
            **kwargs)`.
    """
    module = _load_module(spec.path)
    function = getattr(module, spec.name, None)
    if not callable(function):
        names = sorted(
            n
            for n, v in vars(module).items()
            if inspect.isfunction(v) and v.__module__ == module.__name__
        )
        raise ConfigError(
            f"no function {spec.name!r} in the file",
            where=spec.path,
            got=f"functions {names}",
            expected=spec.name,
            fix="Name it with `name`, or reward.custom_reward_function.name.",
        )
    signature = inspect.signature(function)
    try:
        signature.bind(**dict.fromkeys(ARGUMENTS), **spec.kwargs)
    except TypeError as error:
        raise ConfigError(
            f"{spec.name} cannot be called as verl calls a reward: {error}",
            where=spec.path,
            got=f"{spec.name}{signature}",
            expected=f"{spec.name}(data_source, solution_str, ground_truth, "
            "extra_info=None, **kwargs)",
        ) from error
    return function


def source_digest(spec: FunctionSpec) -> str:
    """Digests the file that a loaded function lies in; not what that file imports.

    Raises:
        ConfigError: a module without a file, such as one that is built in.
    """
    file = source_file(spec)
    if file is None:
        raise ConfigError(
            "a reward function without a file",
            where=spec.path,
            got="a module that comes from no file",
            expected="a Python file, or a module of a package that is one",
        )
    return hashlib.blake2b(Path(file).read_bytes(), digest_size=16).hexdigest()


def source_file(spec: FunctionSpec) -> str | None:
    """The file that a function lies in; None of a module that comes from no file."""
    if not spec.path.startswith(PACKAGE_PREFIX):
        return str(Path(spec.path).expanduser())
    module_spec = importlib.util.find_spec(_module_name(spec.path))
    return module_spec.origin if module_spec is not None and module_spec.has_location else None


def _module_name(path: str) -> str:
    return path.removeprefix(PACKAGE_PREFIX).replace("/", ".")


def _load_module(path: str):
    try:
        if path.startswith(PACKAGE_PREFIX):
            return importlib.import_module(_module_name(path))
        file = Path(path).expanduser()
        if not file.is_file():
            raise ConfigError(
                "no such reward file",
                where=path,
                got=f"nothing at {file.absolute()}",
                expected="a Python file, or pkg://package.module",
            )
        _find_neighbours(file)
        name = f"grpo_latent_reward_{file.stem}"
        module_spec = importlib.util.spec_from_file_location(name, file)
        if module_spec is None or module_spec.loader is None:
            raise ConfigError(
                "not a Python file", where=path, got=file.name, expected="a name that ends in .py"
            )
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[name] = module  # dataclasses and pickle look their module up there
        module_spec.loader.exec_module(module)
        return module
    except ConfigError:
        raise
    except BaseException as error:  # the file runs foreign code, which may even call exit()
        raise ConfigError(
            "the reward file fails to import",
            where=path,
            got=in_one_line(error, None if path.startswith(PACKAGE_PREFIX) else str(file)),
            expected="a file that imports",
            fix="Run it with python to see the whole traceback.",
        ) from error


_neighbourhoods: list[Path] = []


def _find_neighbours(file: Path) -> None:
    """Lets a reward file import the files beside it, as it may where Python runs it.

    Installed packages come first: a neighbour must not stand in for one.

    Raises:
        ConfigError: a file beside it has the name of one that another reward imported.
    """
    folder = file.absolute().parent
    if folder in _neighbourhoods:
        return
    for other in _neighbourhoods:
        for path in sorted(folder.glob("*.py")):
            imported = getattr(sys.modules.get(path.stem), "__file__", None)
            if imported is not None and Path(imported).parent == other:
                raise ConfigError(
                    "two reward files have neighbours of one name",
                    where=str(file),
                    got=f"{path} beside it, and {imported} is imported already",
                    expected="names that differ",
                    fix="Rename one of them, or put the reward files into one folder.",
                )
    _neighbourhoods.append(folder)
    sys.path.append(str(folder))
