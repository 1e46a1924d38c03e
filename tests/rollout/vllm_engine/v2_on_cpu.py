"""Engine vllm on vLLM's V2 model runner, on a CPU: its kernels run in Triton's interpreter.

A program, started by the tests.

    python v2_on_cpu.py CASE FOLDER < options.json

Prints the comparison with engine hf, and the engine's counters.

Triton's interpreter must be chosen before Triton is imported, and vLLM decides at its import
whether there is one: hence a process of its own. What it changes of vLLM is what a CPU lacks,
nothing of the runner.
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path


def pretend_triton_runs_here() -> None:
    """Names a Triton backend `cpu` and the version that vLLM asks for.

    The CPU wheel has neither.
    """
    import triton.backends

    from grpo_latent.rollout.vllm.supported import name_the_cpu_build

    name_the_cpu_build()
    triton.backends.backends["cpu"] = types.SimpleNamespace(
        driver=types.SimpleNamespace(is_active=lambda: True), compiler=None
    )


def keep_asynchronous_scheduling() -> None:
    """vLLM switches it off on CPU."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def keep_async(cls, vllm_config):
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(keep_async)


def main(name: str, folder: str) -> None:
    from vllm_cases import build_vllm_case, compare, sampling

    from grpo_latent.latent.treatments import parse_treatment

    given = json.load(sys.stdin)
    if given.get("async"):
        keep_asynchronous_scheduling()
    case = build_vllm_case(name, Path(folder), **given.get("mechanism", {}))
    treatment, _ = parse_treatment(given.get("treatment"))
    engine = case.vllm_engine(treatment=treatment, **given["engine"])
    config = engine._llm.llm_engine.vllm_config
    requests = case.requests(given["num_requests"], given.get("num_trajectories", 1))
    params = sampling(given["max_new_tokens"], **given.get("sampling", {}))
    ours, reference = (
        engine.generate(requests, params),
        case.hf_engine(treatment).generate(requests, params),
    )
    result = vars(compare(ours, reference)) | {
        "is_v2": config.use_v2_model_runner,
        "is_async": config.scheduler_config.async_scheduling,
        "stats": engine.stats,
    }
    print(json.dumps(result, default=sorted))
    engine.close()


if __name__ == "__main__":
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    sys.path.insert(0, str(Path(__file__).parents[2]))
    pretend_triton_runs_here()
    main(*sys.argv[1:])
