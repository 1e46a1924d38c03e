"""What this package uses of libraries beyond their public names, compared with what is installed.

Each library has its table, beside what uses it: `models/seams.py` (transformers),
`verl_plugin/boot/seams.py` (verl, Ray), `rollout/vllm/contract.py` (vLLM, in a form of its own). A
test compares all rows, so an upgrade names the symbol that changed.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass

from grpo_latent.errors import PluginError

FIXES = {
    "verl": "Install verl>=0.9.1,<0.10, or adapt grpo_latent/verl_plugin/boot/seams.py and "
    "compat.py.",
    "ray": "Install ray>=2.50, or adapt grpo_latent/verl_plugin/boot/actor_watch.py.",
    "transformers": "Install transformers>=5.9,<5.11, or adapt what grpo_latent/models/seams.py "
    "names.",
}


@dataclass(frozen=True)
class Seam:
    """One thing of a library that is not a public extension point.

    Attributes:
        name: of the use, for messages.
        symbol: `module:attribute.attribute`.
        why: what breaks here when it changes.
        parameters: of its signature, in order; None where it is no callable of interest.
        abstract: methods that a subclass has to have; None where it is no class of interest.
    """

    name: str
    symbol: str
    why: str
    parameters: tuple[str, ...] | None = None
    abstract: frozenset[str] | None = None

    @property
    def package(self) -> str:
        return self.symbol.split(".")[0].split(":")[0]

    def resolve(self) -> object:
        """The library's object.

        Raises:
            PluginError: it is gone.
        """
        module_name, path = self.symbol.split(":")
        try:
            value = importlib.import_module(module_name)
            for attribute in path.split("."):
                value = getattr(value, attribute)
        except (ImportError, AttributeError) as error:
            raise self._changed(str(error), self.why) from error
        return value

    def check(self) -> None:
        """Raises `PluginError` if the symbol is gone, or asks for something else."""
        value = self.resolve()
        if self.abstract is not None:
            found_methods = frozenset(getattr(value, "__abstractmethods__", ()))
            if found_methods != self.abstract:
                raise self._changed(
                    f"abstract methods {sorted(found_methods)}",
                    f"{sorted(self.abstract)} ({self.why})",
                )
        if self.parameters is None:
            return
        # Ray's tracing adds a parameter to the methods of actor classes
        names = inspect.signature(value).parameters if callable(value) else ()
        found = tuple(name for name in names if name != "_ray_trace_ctx")
        if found != self.parameters:
            raise self._changed(f"parameters {found}", f"{self.parameters} ({self.why})")

    def _changed(self, got: str, expected: str) -> PluginError:
        return PluginError(
            f"{self.package} changed under {self.name}",
            where=self.symbol,
            got=got,
            expected=expected,
            fix=FIXES[self.package],
        )
