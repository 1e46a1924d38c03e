"""Runs of SFT in shards: what is trained, how processes are started, what equality means."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ilvr_cases import PLANS, record, write_images
from run_cases import write_boxed_rows
from safetensors.torch import load_file
from sft_cases import png

from grpo_latent.data.rows import verl_row, write_verl_parquet
from grpo_latent.models import tiny

WORDS = ("read", "red", "blue", "green", "look", "?")
STEPS = 3
BATCHES_OF_STEP = 4
ROWS = 8  # an epoch of two steps
COMMON = {
    "data.min_image_tokens": None,
    "data.max_image_tokens": None,
    "latent.steps": 2,
    "trainer.max_steps": STEPS,
    "trainer.per_device_train_batch_size": 1,
    "trainer.learning_rate": 1e-2,
    "trainer.warmup_steps": 0,
    "trainer.save_strategy": "no",
    # Adam divides gradients that are 0 but for rounding by their own size
    "trainer.adam_epsilon": 1e-3,
    "trainer.use_cpu": True,
}
ILVR = {"model.path": "@vl", "data.train_files": "@ilvr.jsonl"}
CASES = {
    "lvr": {
        "method": "lvr",
        "model.path": "@vl",
        "data.format": "parquet",
        "data.train_files": "@boxes.parquet",
        "latent.head": "mlp",
        "trainer.gradient_checkpointing": True,
    },
    # ranks whose rows have 0, 1 and 2 spans
    "ilvr_stage1": {"method": "ilvr_stage1", "loss.decay": 0.5, "loss.noise_std": 0.0, **ILVR},
    "ilvr_stage2": {"method": "ilvr_stage2", **ILVR},
    # a tower that trains, rows without images, two slots, a stage that is saved
    "ivt_lr": {
        "method": "ivt_lr",
        "model.path": "@vl2",
        "model.freeze_vision": False,
        "model.freeze_merger": False,
        "data.format": "parquet",
        "data.train_files": "@steps.parquet",
        "latent.top_k_image": 2,
        "loss.steps_per_stage": [1, 1],
        "loss.save_stages": True,
        "trainer.gradient_checkpointing": True,
    },
    # tied embeddings
    "coconut": {
        "method": "coconut",
        "model.path": "@text",
        "data.format": "parquet",
        "data.train_files": "@texts.parquet",
        "loss.steps_per_stage": [1, 1],
    },
}
# the teacher, Adam's moments, a schedule that falls, a step that begins another epoch
RESUMED = {
    "trainer.max_steps": 3,
    "trainer.save_strategy": "steps",
    "trainer.save_steps": 1,
    "schedule.horizon_steps": 6,
}
UNTIL_STOPPED = RESUMED | {"trainer.max_steps": 1}
TIMEOUT_S = 1800  # against a deadlock only


def write_inputs(folder):
    tied = replace(tiny.UNIT_SIZES, tied=True)
    for name, built in (
        ("vl", tiny.tiny_qwen2_5_vl(WORDS, latent_tokens=())),
        ("vl2", tiny.tiny_qwen2_vl(WORDS, latent_tokens=())),
        ("text", tiny.tiny_qwen3(WORDS, tied, latent_tokens=())),
    ):
        write_model(folder / name, built)
    write_boxed_rows(folder / "boxes.parquet", ROWS)
    for name, has_images in (("steps", True), ("texts", False)):
        rows = [
            verl_row(
                data_source="test",
                prompt="<image>read red ?" if has_images and i % 3 else "read red ?",
                images=[png(i)] if has_images and i % 3 else (),
                answer="3",
                index=i,
                split="train",
                steps=["red 1", "blue 7"],
            )
            for i in range(ROWS)
        ]
        write_verl_parquet(folder / f"{name}.parquet", rows)
    write_images(folder)
    write_plans(folder / "ilvr.jsonl", (PLANS * ROWS)[:ROWS])


def write_model(folder, built):
    model, tokenizer, processor = built
    model.save_pretrained(folder)
    (processor or tokenizer).save_pretrained(folder)


def write_plans(path, plans):
    path.write_text("\n".join(json.dumps(record(*plan)) for plan in plans) + "\n")


def run_of(case, name, num_processes, **overrides):
    """The values of a run; of one process it has no shards unless it is asked for."""
    return (
        CASES[case]
        | COMMON
        | {
            "trainer.fsdp": num_processes > 1,
            "trainer.output_dir": f"@{name}",
            "model.save_path": f"@{name}/model",
            "trainer.gradient_accumulation_steps": BATCHES_OF_STEP // num_processes,
        }
        | overrides
    )


def equal_runs(num_processes):
    return [run_of(case, f"{case}-{num_processes}", num_processes) for case in CASES]


def launch(folder, num_processes, runs):
    """Makes runs in processes that are started once; returns what they said."""
    path = folder / f"runs-{num_processes}.json"
    path.write_text(json.dumps(runs))
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={num_processes}"]
    launcher += ["--standalone", "--local-addr=127.0.0.1"]
    if num_processes == 1:
        launcher = []  # under it, one process would be one of data parallelism
    script = str(Path(__file__).with_name("sharded_runs.py"))
    done = subprocess.run(
        [sys.executable, *launcher, script, str(folder), str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stderr


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def assert_equal_training(one, many):
    """Losses, each step's gradients and the weights of two runs' folders."""
    log_one, log_many = log_of(one), log_of(many)
    assert len(log_one) == len(log_many) == STEPS
    for ours, theirs in zip(log_many, log_one, strict=True):
        for name in ("loss", "ce", "latent_loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    files = [f"gradients-{step + 1}.safetensors" for step in range(STEPS)]
    for file in [*files, "model/model.safetensors"]:
        assert_equal_tensors(load_file(many / file), load_file(one / file))
    gradients = load_file(one / files[0]).values()
    assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-2


def assert_equal_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5, msg=name)


def assert_goes_on(whole, moved):
    """Losses, weights, teacher and place in the data are those of a run that was not stopped."""
    log_whole, log_moved = log_of(whole), log_of(moved)
    assert [line["step"] for line in log_moved] == [1, 2, 3]
    for ours, theirs in zip(log_moved, log_whole, strict=True):
        for metric in ("loss", "ce", "latent_loss", "learning_rate"):
            assert ours[metric] == pytest.approx(theirs[metric], rel=1e-5, abs=1e-7), metric
    assert_equal_tensors(weights_of(moved / "model"), weights_of(whole / "model"))


def assert_a_tensor_at_a_time(folder, ranks):
    """Ranks that write nothing had no more than one whole tensor while the model was exported."""
    for rank in ranks:
        most, num_gathered = json.loads((folder / f"whole-{rank}.json").read_text())
        assert (most, num_gathered > 20) == (1, True)
