"""Copies a recipe, and what its scripts use, into a folder to work in.

    grpo-latent init quickstart my_work
    bash my_work/recipes/quickstart/run.sh

The folder gets `recipes/` and `reward/`; scripts run in it, wherever they are started from, and
write to its `outputs/`. Nothing in it is overwritten: a file that is there and differs ends the
copying before it has begun.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo_latent.common.command import command
from grpo_latent.common.paths import check_output_folder
from grpo_latent.common.spelling import nearest_fix
from grpo_latent.errors import ConfigError, DataError

PACKAGE = Path(__file__).parent
RECIPES, REWARDS = "recipes", "reward"
_NAMED = re.compile(r"recipes/(\w+)")


def shipped() -> Path:
    """The folder with `recipes/` and `reward/`: the wheel's, or the repository's."""
    in_wheel = PACKAGE / "shipped"
    return in_wheel if in_wheel.is_dir() else PACKAGE.parent


def recipes(source: Path) -> list[str]:
    """Names of the recipes, in alphabetical order."""
    folders = (source / RECIPES).iterdir()
    return sorted(folder.name for folder in folders if folder.is_dir() and any(folder.glob("*.*")))


def with_dependencies(source: Path, recipe: str) -> list[str]:
    """The recipe and those that its files name as `recipes/<name>`, in the order found."""
    known, found = set(recipes(source)), [recipe]
    for name in found:  # grows while it is read
        for path in sorted((source / RECIPES / name).glob("*.*")):
            if path.suffix in (".sh", ".py", ".yaml"):
                named = set(_NAMED.findall(path.read_text())) & known
                found += sorted(named - set(found))
    return found


def files_of(source: Path, recipe: str) -> list[Path]:
    """What the recipe needs, relative to the source."""
    folders = [REWARDS, *(f"{RECIPES}/{name}" for name in with_dependencies(source, recipe))]
    paths = [path for path in (source / RECIPES).iterdir() if path.is_file()]
    paths += [path for folder in folders for path in (source / folder).rglob("*")]
    return sorted(
        path.relative_to(source)
        for path in paths
        if path.is_file() and "__pycache__" not in path.parts
    )


def copy_recipe(recipe: str, folder: Path) -> list[Path]:
    """Copies it; the files written, relative to the folder.

    Raises:
        ConfigError: no such recipe, or a file where the folder should be.
        DataError: a file of that name is there, with other contents.
    """
    source = shipped()
    if recipe not in recipes(source):
        raise ConfigError(
            "no such recipe",
            where="grpo-latent init",
            got=recipe,
            expected=f"one of {recipes(source)}",
            fix=nearest_fix("Write {}", recipe, recipes(source)),
        )
    check_output_folder(str(folder), "folder")
    paths = files_of(source, recipe)
    for path in paths:
        there = folder / path
        if there.exists() and there.read_bytes() != (source / path).read_bytes():
            raise DataError(
                "a file that differs is in the way",
                where=str(there),
                expected="a new folder, or one whose files are as shipped",
                fix="Choose another folder, or move the file.",
            )
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / path, folder / path)
    return paths


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help=", ".join(recipes(shipped())))
    parser.add_argument("folder", type=Path, help="to copy into; made if it is not there")
    options = parser.parse_args(arguments)
    paths = copy_recipe(options.recipe, options.folder)
    folder = options.folder / RECIPES / options.recipe
    print(f"{len(paths)} files in {options.folder}: its own in {folder}, and what they use")
    if (folder / "run.sh").is_file():
        print(f"next: bash {folder}/run.sh")


if __name__ == "__main__":
    sys.exit(main())
