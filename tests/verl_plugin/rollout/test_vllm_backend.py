"""What `vllm_latent` leans on in verl's vLLM backend is still there.

And how that is imported beside vLLM's CPU build.
"""

import importlib.metadata

import pytest

pytestmark = pytest.mark.vllm


def test_seams():
    from grpo_latent.verl_plugin.rollout.vllm_compat import VLLM_SEAMS

    for seam in VLLM_SEAMS:
        seam.check()


def test_the_cpu_build_answers_to_the_name_that_verl_asks_for():
    from grpo_latent.verl_plugin.rollout import vllm_compat  # noqa: F401

    # isort: split
    from verl.third_party.vllm import vllm_version
    from vllm.platforms import current_platform

    assert vllm_version == importlib.metadata.version("vllm")
    assert current_platform.is_cpu() == ("cpu" in vllm_version)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("no-such-distribution")


def test_the_extension_fits_the_latent_workers():
    """vLLM refuses an extension that redefines what the worker has.

    The methods that it needs must be the worker's.
    """
    from grpo_latent.rollout.vllm.cpu_worker import LatentCPUWorker
    from grpo_latent.verl_plugin.rollout.vllm_worker import LatentWorkerExtension

    clashes = [
        name
        for name in dir(LatentWorkerExtension)
        if not name.startswith("__") and hasattr(LatentCPUWorker, name)
    ]
    assert not clashes and hasattr(LatentCPUWorker, "latent_reload")
