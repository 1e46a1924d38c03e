"""Makes PyPI's torchvision importable beside a CPU build of torch.

PyPI has only the CUDA-linked torchvision. Beside a CPU torch its C extension does not load, so its
operators have no schema and `import torchvision` dies with `operator torchvision::nms does not
exist`; so then do transformers' Qwen-VL processors and vLLM's models. Declaring the schemas is all
that the import needs: resizing and normalising are tensor code. Nothing is faked: calling `nms`
still raises, as no kernel is behind it. `torchvision==0.28.0+cpu` of PyTorch's own index needs
none of this.

vLLM inspects models in subprocesses, which is why `make vllm` runs `python -m
grpo_latent.torchvision_ops`: that writes a `.pth` line into the environment, which calls `install`
at every start of its Python.
"""

from __future__ import annotations

import importlib.abc
import importlib.metadata
import sys
import sysconfig
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

PTH_NAME = "grpo_latent_torchvision_ops.pth"
PTH_LINE = "import grpo_latent.torchvision_ops as _g; _g.install()\n"
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries: list = []  # a torch Library takes its declarations with it when it is collected


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Declares the operators when torchvision is first imported.

    The import itself it leaves to the other finders.
    """

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            declare_operators()
        return None


def install() -> None:
    """Arms the declaration; costs nothing until torchvision is imported."""
    if "torchvision" not in sys.modules and not any(
        isinstance(f, _BeforeTorchvision) for f in sys.meta_path
    ):
        sys.meta_path.insert(0, _BeforeTorchvision())


def declare_operators() -> None:
    """Declares the schemas of `torchvision::nms` and `torchvision::qnms` where they are missing.

    Only beside a torch without CUDA.
    """
    import torch

    # PyTorch's own builds carry a local version (0.28.0+cpu): they load, and declare the operators
    # themselves
    try:
        is_own_build = "+" in importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return  # somebody asks whether it is there: it is not
    if is_own_build or torch.version.cuda is not None or torch.version.hip is not None:
        return
    for name in ("nms", "qnms"):
        try:
            torch._C._get_schema(f"torchvision::{name}", "")
        except RuntimeError:
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{name}{_SCHEMA}")
            _libraries.append(library)


def write_pth() -> Path:
    """Writes the `.pth` line into this environment's site-packages."""
    path = Path(sysconfig.get_paths()["purelib"]) / PTH_NAME
    path.write_text(PTH_LINE)
    return path


if __name__ == "__main__":
    print(write_pth())
