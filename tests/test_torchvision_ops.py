"""The declaration of torchvision's operators.

Not covered: a CUDA build of torch, PyTorch's own CPU build of torchvision.
"""

import importlib.util
import subprocess
import sys

import pytest
import torch

from grpo_latent import torchvision_ops


def has_pypi_torchvision() -> bool:
    if importlib.util.find_spec("torchvision") is None:
        return False
    return "+" not in importlib.metadata.version("torchvision") and torch.version.cuda is None


def test_importing_the_module_is_cheap():
    """It runs at every start of the environment's Python."""
    code = "import sys, grpo_latent.torchvision_ops as t; t.install(); t.install(); print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "False"
    )


def test_the_pth_line_is_python():
    compile(torchvision_ops.PTH_LINE, "pth", "exec")
    assert (
        torchvision_ops.PTH_LINE.startswith("import ")
        and torchvision_ops.PTH_LINE.count("\n") == 1
    )


@pytest.mark.skipif(
    not has_pypi_torchvision(), reason="needs PyPI's torchvision beside a CPU torch"
)
def test_torchvision_imports_and_nothing_is_faked():
    install = "import grpo_latent.torchvision_ops as t; t.install(); "
    code = (
        install
        + "import torch, torchvision; torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0 and "NotImplementedError" in result.stderr, result.stderr[-500:]


def test_asking_for_a_torchvision_that_is_not_there(monkeypatch):
    """`importlib.util.find_spec` says None, as it does without the hook."""

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    hook = torchvision_ops._BeforeTorchvision()
    monkeypatch.setattr(sys, "meta_path", [hook, *sys.meta_path])
    assert hook.find_spec("torchvision") is None
