"""Full weights in FSDP2 shards of two processes train as one process does, in as many bytes as counted.

Each number of processes is started once and makes all of its runs. The one process of the reference
has no shards. Four processes: tests/cluster/test_sharded_sft.py. Not covered: GPUs, whose kernels,
streams and memory are others.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from folder_cases import without_manifest
from run_cases import write_boxed_rows
from sharded_cases import (
    CASES,
    RESUMED,
    UNTIL_STOPPED,
    assert_a_tensor_at_a_time,
    assert_equal_tensors,
    assert_equal_training,
    assert_goes_on,
    equal_runs,
    launch,
    log_of,
    run_of,
    weights_of,
    write_inputs,
    write_model,
    write_plans,
)

from grpo_latent.errors import CheckpointError
from grpo_latent.models import tiny
from grpo_latent.models.loading import load_latent_model
from grpo_latent.sft.common.parameters import LoraSettings, add_lora, freeze_vision
from grpo_latent.sft.resuming import checked

sys.path.append(str(Path(__file__).parents[2] / "recipes"))  # scripts, not a package
import memory  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.long]

# many words, so that the embeddings, which the root has, count
MANY_WORDS = ("read", "red", "blue", "green", "look", "?", *(f"word{i}" for i in range(1000)))
SIZES = tiny.TinySizes(hidden=192, layers=4, heads=4, kv_heads=2, intermediate=768)
ROWS_OF_BATCH = 6
PLAN = ("read red", "@h1", "3 ?", "@h2", "<answer> 7 </answer>")
ADAPTERS = {"trainer.fsdp": False, "model.dtype": "bfloat16", "model.lora.enabled": True}
MEASURED = {
    "whole-layers": ("lvr", {"trainer.gradient_checkpointing": False}),
    "checkpoints": ("lvr", {"trainer.bf16": True}),
    "teacher": ("ilvr_stage1", {"trainer.bf16": True, "trainer.gradient_checkpointing": True}),
    "latents": ("ilvr_stage2", {"trainer.bf16": True, "trainer.gradient_checkpointing": True}),
    "adapters": ("lvr", {"trainer.bf16": True, **ADAPTERS}),
}


def measured_runs():
    common = {
        "profile": True,
        "model.path": "@large",
        "latent.head": "none",
        "trainer.per_device_train_batch_size": ROWS_OF_BATCH,
        "trainer.gradient_accumulation_steps": 2,  # the second one adds to gradients
        "trainer.max_steps": 2,  # the second one has moments
    }
    files = {"lvr": "@many.parquet", "ilvr_stage1": "@many.jsonl", "ilvr_stage2": "@many.jsonl"}
    return [
        run_of(case, name, 2, **common, **{"data.train_files": files[case]}, **overrides)
        for name, (case, overrides) in MEASURED.items()
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs, and what the one process said."""
    folder = tmp_path_factory.mktemp("sharded")
    write_inputs(folder)
    write_model(folder / "large", tiny.tiny_qwen2_5_vl(MANY_WORDS, SIZES, latent_tokens=()))
    num_rows = 4 * ROWS_OF_BATCH
    write_boxed_rows(folder / "many.parquet", num_rows)
    write_plans(folder / "many.jsonl", [PLAN] * num_rows)
    half = {"trainer.bf16": True, "trainer.max_steps": 1}
    two = [run_of(case, f"{case}-bf16", 2, **half) for case in ("ilvr_stage1", "ilvr_stage2")]
    stopped = run_of("ilvr_stage1", "2to1", 2, **UNTIL_STOPPED)
    launch(folder, 2, [*equal_runs(2), *two, stopped, *measured_runs()])
    whole = run_of("ilvr_stage1", "whole", 1, **RESUMED)
    resumed = run_of("ilvr_stage1", "2to1", 1, **RESUMED, **{"trainer.fsdp": True})
    return folder, launch(folder, 1, [*equal_runs(1), whole, resumed])


@pytest.mark.parametrize("case", CASES)
def test_shards_train_as_one_process_does(runs, case):
    folder, _ = runs
    assert_equal_training(folder / f"{case}-1", folder / f"{case}-2")


def test_one_plain_folder_is_exported_a_tensor_at_a_time(runs):
    folder, _ = runs
    for case in CASES:
        assert load_latent_model(folder / f"{case}-2" / "model").mechanism.token_ids
        assert_a_tensor_at_a_time(folder / f"{case}-2", ranks=[1])
    assert "lm_head.weight" not in weights_of(folder / "coconut-2" / "model"), "tied"
    stage_of = [weights_of(folder / f"ivt_lr-{num}" / "stage_0") for num in (1, 2)]
    assert_equal_tensors(stage_of[1], stage_of[0])


def test_a_run_goes_on_in_one_process(runs):
    folder, said = runs
    assert_goes_on(folder / "whole", folder / "2to1")
    assert "resumed by 1 processes what 2 wrote" in said


def test_bfloat16_computes_and_float32_sums(runs):
    folder, _ = runs
    for case in ("ilvr_stage1", "ilvr_stage2"):
        (half,), (full, *_) = log_of(folder / f"{case}-bf16"), log_of(folder / f"{case}-1")
        assert half["ce"] == pytest.approx(full["ce"], rel=1e-2)
        assert half["ce"] != full["ce"]
        assert float(torch.tensor(half["ce"]).bfloat16()) != half["ce"], "a sum, not rounded"
        weights = weights_of(folder / f"{case}-bf16" / "model").values()
        assert {tensor.dtype for tensor in weights} == {torch.float32}


@pytest.mark.parametrize("name", MEASURED)
def test_bytes_are_as_many_as_counted(runs, name):
    """Against the profiler's sum over the allocator's events, gloo's copies left out.

    Of the process that had less. On a quiet Intel all are within 15 %; on an AMD beside other work
    up to 22 % more than counted were alive at once, other ones each time. Why is not known: gloo's
    threads that let go late are not the cause, nor is what earlier runs of the process left.
    """
    folder, _ = runs
    case, overrides = MEASURED[name]
    ranks = [json.loads(path.read_text()) for path in (folder / name).glob("memory-*.json")]
    measured = min(ranks, key=lambda rank: rank["most"])
    load = memory.Load(
        num_bytes=2 if overrides.get("trainer.bf16") else 4,
        is_checkpointed=overrides.get("trainer.gradient_checkpointing", case == "lvr"),
        # of two steps with two micro-batches each
        **{part: total / 4 for part, total in measured["load"].items()},
    )
    model, _, _ = tiny.tiny_qwen2_5_vl(MANY_WORDS, SIZES, latent_tokens=())
    if name == "adapters":
        model.bfloat16()
        add_lora(model, LoraSettings(enabled=True), new_token_ids=[0])
        freeze_vision(model)
        counted = memory.replicated_bytes(model, load)
    else:
        freeze_vision(model)
        counted = memory.sharded_bytes(
            memory.Shapes.of(model), load, world_size=2, num_teachers=int(name == "teacher")
        )
    ratio = measured["most"] / counted["total"]
    assert 1 / 1.15 < ratio < 1.35, (ratio, ranks, counted)


def test_a_damaged_shard_is_named_before_anything_is_loaded(runs):
    folder, _ = runs
    checkpoint = folder / "2to1" / "checkpoint-3"
    checked(checkpoint, verify_digests=True)
    shard = next((checkpoint / "shards").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"shards/{shard.name}: .*has changed"):
        checked(checkpoint, verify_digests=True)
    without_manifest(checkpoint)
    (checkpoint / "shards" / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointError, match="without running code"):
        checked(checkpoint, verify_digests=True)
