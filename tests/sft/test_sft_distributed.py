"""Two processes on the CPU (gloo) make the updates of one process that accumulates their batches.

Shards: test_sft_sharded.py. Not covered: DeepSpeed, which is refused.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from run_cases import WORDS, write_boxed_rows
from safetensors.torch import load_file

from grpo_latent.models import tiny

COMMON = [
    "data.format=parquet",
    "data.min_image_tokens=null",
    "data.max_image_tokens=null",
    "latent.head=mlp",
    "latent.steps=2",
    "trainer.max_steps=3",
    "trainer.per_device_train_batch_size=2",
    "trainer.learning_rate=0.1",
    "trainer.weight_decay=0",
    "trainer.max_grad_norm=1",
    "trainer.warmup_steps=0",
    "trainer.save_strategy=no",
    "+trainer.optim=sgd",
    "+trainer.use_cpu=true",
]
# against a deadlock only: three interpreters that import torch share what cores there are
TIMEOUT_S = 1800


def launch(folder, name, num_processes, *overrides):
    command = [sys.executable, "-m", "grpo_latent.sft"]
    if num_processes > 1:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={num_processes}"]
        # the launcher's own store takes a free port and keeps it; one chosen out here may be
        # another's by the time that the launcher has imported torch
        launcher += ["--standalone", "--local-addr=127.0.0.1", "-m"]
        command = [sys.executable, *launcher, "grpo_latent.sft"]
    paths = [
        f"model.path={folder / 'base'}",
        f"data.train_files={folder / 'rows.parquet'}",
        f"trainer.output_dir={folder / name}",
    ]
    done = subprocess.run(
        [*command, *paths, *COMMON, *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    log = [json.loads(line) for line in (folder / name / "metrics.jsonl").open()]
    return load_file(folder / name / "model" / "model.safetensors"), log


@pytest.mark.slow
def test_two_processes_are_one_that_accumulates(tmp_path):
    model, _, processor = tiny.tiny_qwen2_5_vl(WORDS, latent_tokens=())
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    write_boxed_rows(tmp_path / "rows.parquet", 12)
    one, log_one = launch(tmp_path, "one", 1, "trainer.gradient_accumulation_steps=2")
    two, log_two = launch(
        tmp_path, "two", 2, "trainer.gradient_accumulation_steps=1", "+trainer.ddp_backend=gloo"
    )
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    assert len(log_one) == len(log_two) == 3
    for ours, theirs in zip(log_one, log_two, strict=True):
        for name in ("loss", "ce", "latent_loss", "latent_hit", "grad_norm"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4), name
