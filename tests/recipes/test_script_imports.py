"""What shell scripts and the Makefile import of the package is there, also where a test cannot run them.

A module's names are read from its source, since some need vLLM to be imported.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [ROOT / "Makefile", *sorted(ROOT.rglob("recipes/**/*.sh"))]
IMPORT = re.compile(r"from (grpo_latent[\w.]*) import ([\w, ]+|\*)")
RUN = re.compile(r"-m (grpo_latent[\w.]*)")


def source_of(module):
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file if file.is_file() else None


def names_in(file):
    """That the module has after it was run: defined, assigned, imported."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)


def missing(text):
    """Modules and names of the package that the text imports or runs, and that are not there."""
    found = [module for module in RUN.findall(text) if source_of(module) is None]
    for module, names in IMPORT.findall(text):
        file = source_of(module)
        if file is None:
            found.append(module)
        elif names != "*":
            there = {*names_in(file)}
            wanted = [name.strip() for name in names.split(",")]
            submodules = [name for name in wanted if source_of(f"{module}.{name}")]
            found += [f"{module}.{name}" for name in wanted if name not in {*there, *submodules}]
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_import_what_is_there(script):
    assert missing(script.read_text()) == []


def test_what_was_renamed_is_found():
    text = "-m grpo_latent.gone; from grpo_latent.rollout.vllm.compat import check_installed"
    assert missing(text) == ["grpo_latent.gone", "grpo_latent.rollout.vllm.compat"]
    assert missing("from grpo_latent.rollout.vllm.supported import check_gone") == [
        "grpo_latent.rollout.vllm.supported.check_gone"
    ]
