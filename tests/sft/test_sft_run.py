"""Whole runs: `run_sft` and the config of `python -m grpo_latent.sft`.

Resume to the bit, inputs only read.

Not covered: resuming on another number of processes.
"""

import json
import multiprocessing
import shutil
import tempfile

import pytest
import torch
from folder_cases import digests, same_nested
from latent_cases import build_case, sampling
from lvr_run_cases import config_of, run
from run_cases import settings_from
from safetensors.torch import load_file, save_file

from grpo_latent.data.rows import read_verl_parquet
from grpo_latent.errors import CheckpointError, ConfigError, DataError
from grpo_latent.latent.mechanisms import LATENT_CONFIG_FILE
from grpo_latent.models.loading import load_latent_model
from grpo_latent.models.prompts import encode_prompt
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.rollout.protocol import RolloutRequest
from grpo_latent.sft.run import check_sft

LORA = {"model.lora.enabled": True, "model.lora.r": 2, "model.lora.dropout": 0.3}


@pytest.mark.parametrize(
    "options",
    [
        {"data.labelled_per_batch": 1, "trainer.gradient_accumulation_steps": 2},
        pytest.param({}, marks=pytest.mark.long),
        pytest.param(LORA, marks=pytest.mark.long),
    ],
    ids=["labelled-accumulated", "full", "lora-dropout"],
)
def test_three_steps_and_three_more_are_six(inputs, tmp_path, options):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run(inputs, whole, **options)
    run(inputs, halves, **options, **{"trainer.max_steps": 3})
    # a save that was killed: it has weights, but the Trainer's state was not written yet
    shutil.copytree(halves / "checkpoint-3", halves / "checkpoint-5")
    (halves / "checkpoint-5" / "trainer_state.json").unlink()
    with (halves / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 9.0}\n{"step": 5, "lo')
    result = run(inputs, halves, **options)
    assert result.steps == 6
    assert same_nested(
        load_file(whole / "model/model.safetensors"), load_file(halves / "model/model.safetensors")
    )
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        ours, theirs = (
            torch.load(folder / "checkpoint-6" / name, weights_only=False)
            for folder in (whole, halves)
        )
        if name == "rng_state.pth":
            ours, theirs = ([str(value) for value in item.values()] for item in (ours, theirs))
        assert same_nested(ours, theirs), name
    logs = [
        [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        for folder in (whole, halves)
    ]
    assert [line["step"] for line in logs[1]] == [1, 2, 3, 4, 5, 6]
    for ours, theirs in zip(*logs, strict=True):
        ours.pop("seconds"), theirs.pop("seconds")
        assert ours == theirs


def test_a_check_reads_every_row_and_writes_nothing(inputs, tmp_path):
    lines = check_sft(settings_from(config_of(inputs, tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    said = "\n".join(lines)
    assert "method   lvr, batches of 4, 6 steps" in said and "run      anew" in said
    result = run(inputs, tmp_path / "out", **{"trainer.max_steps": 3})
    num_rows = len(list(read_verl_parquet(inputs / "rows.parquet")))
    assert f"rows     {num_rows};" in said
    lines = check_sft(settings_from(config_of(inputs, tmp_path / "out")))
    assert any(line.startswith("run      resumes") and "checkpoint-3" in line for line in lines)
    assert result.steps == 3
    part = tmp_path / "out" / "checkpoint-3" / "model.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="model.safetensors"):
        check_sft(settings_from(config_of(inputs, tmp_path / "out")))


@pytest.fixture
def long_temporary_folder(tmp_path, monkeypatch):
    """TMPDIR whose name is too long for a socket, in a process that has not used it yet."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    config = multiprocessing.process.current_process()._config
    monkeypatch.setitem(config, "tempdir", None)
    return folder


def test_workers_of_the_loader_under_a_long_temporary_folder(
    inputs, tmp_path, long_temporary_folder
):
    """Batches that came through a socket there never came, or as an OSError."""
    alone = run(inputs, tmp_path / "alone", **{"trainer.max_steps": 2})
    options = {"trainer.max_steps": 2, "trainer.dataloader_num_workers": 1}
    result = run(inputs, tmp_path / "workers", **options)
    assert tempfile.gettempdir() == str(long_temporary_folder)
    ours, theirs = (load_file(path.model_path / "model.safetensors") for path in (alone, result))
    assert same_nested(ours, theirs)


def test_a_seed_decides_everything(inputs, tmp_path):
    first, second, other = (
        load_file(
            run(
                inputs, tmp_path / name, **{"trainer.seed": seed, "trainer.max_steps": 2}
            ).model_path
            / "model.safetensors"
        )
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert same_nested(first, second)
    assert not torch.equal(first["lvr_head.mlp.0.weight"], other["lvr_head.mlp.0.weight"])


def test_the_model_rolls_out_and_the_formats_agree(inputs, tmp_path):
    parquet = run(inputs, tmp_path / "parquet", **{"trainer.max_steps": 2})
    published = run(
        inputs,
        tmp_path / "json",
        **{
            "trainer.max_steps": 2,
            "data.format": "lvr_json",
            "data.train_files": [str(inputs / "rows.json")],
        },
    )
    weights = [
        load_file(result.model_path / "model.safetensors") for result in (parquet, published)
    ]
    assert same_nested(*weights)
    loaded = load_latent_model(parquet.model_path)
    assert (
        loaded.mechanism.steps == 2
        and loaded.mechanism.head == "mlp"
        and loaded.mechanism.latent_end_id is None
    )
    item = next(read_verl_parquet(inputs / "rows.parquet"))
    prompt = encode_prompt(
        loaded.tokenizer,
        loaded.processor,
        item.messages,
        [image.open() for image in item.images],
        "here",
    )
    engine = HFRolloutEngine(loaded.model, loaded.mechanism, loaded.eos_ids)
    ((trajectory,),) = engine.generate(
        [RolloutRequest(prompt.ids, [1], prompt.images)], sampling(8)
    )
    assert torch.isfinite(trajectory.rollout_log_probs).all()
    summary = json.loads((tmp_path / "parquet/summary.json").read_text())
    assert (
        summary["steps"] == 2
        and {"ce", "latent_loss", "latent_hit", "seconds", "model"} <= summary.keys()
    )
    assert summary["provenance"]["processor"]


def test_sft_goes_on_from_its_own_output(inputs, tmp_path):
    first = run(inputs, tmp_path / "first", **{"trainer.max_steps": 1})
    before = digests(first.model_path)
    second = run(
        inputs,
        tmp_path / "second",
        **{
            "model.path": str(first.model_path),
            "loss.end": "latent_end",
            "latent.exit": "latent_end",
            "trainer.max_steps": 1,
        },
    )
    assert digests(first.model_path) == before
    loaded = load_latent_model(second.model_path)
    assert loaded.mechanism.exit == "latent_end" and loaded.mechanism.latent_end_id is not None
    with pytest.raises(ConfigError, match="another head"):
        run(
            inputs,
            tmp_path / "third",
            **{"model.path": str(first.model_path), "latent.head": "glu"},
        )


def official_checkpoint(folder):
    """Writes the published layout by hand, without a latent_config.json.

    It has lvr_* fields in config.json and lvr_head.* weights.
    """
    case = build_case("qwen2_5_vl")
    case.model.lm_head.bias = None
    case.model.save_pretrained(folder)
    case.processor.save_pretrained(folder)
    path = folder / "model.safetensors"
    torch.manual_seed(0)
    head = {
        "lvr_head.ln_q.weight": torch.ones(32),
        "lvr_head.ln_q.bias": torch.zeros(32),
        "lvr_head.mlp.0.weight": torch.randn(32, 32) / 6,
        "lvr_head.mlp.0.bias": torch.zeros(32),
        "lvr_head.mlp.2.weight": torch.randn(32, 32) / 6,
        "lvr_head.mlp.2.bias": torch.zeros(32),
    }
    save_file(load_file(path) | head, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    names = {
        "lvr_start_id": "<|lvr_start|>",
        "lvr_id": "<|lvr|>",
        "lvr_latent_end_id": "<|lvr_latent_end|>",
    }
    names["lvr_end_id"] = "<|lvr_end|>"
    config |= {name: case.token_id(token) for name, token in names.items()}
    config |= {
        "lvr_head": True,
        "lvr_head_type": "simple",
        "latent_end_token": False,
        "loss_lvr_fct": "mse",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return head


def test_sft_starts_from_the_official_layout_and_never_writes_to_it(inputs, tmp_path):
    head = official_checkpoint(tmp_path / "official")
    before = digests(tmp_path / "official")
    result = run(
        inputs,
        tmp_path / "run",
        **{
            "model.path": str(tmp_path / "official"),
            "trainer.learning_rate": 0.0,
            "trainer.max_steps": 1,
        },
    )
    assert digests(tmp_path / "official") == before
    weights = load_file(result.model_path / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in head.items())
    assert (result.model_path / LATENT_CONFIG_FILE).is_file()
    assert load_latent_model(result.model_path).mechanism.head == "mlp"


# of recipes/lvr at paper scale
HALF = {
    "model.dtype": "bfloat16",
    "trainer.bf16": True,
    "trainer.gradient_checkpointing": True,
    "latent.head": "none",
}


@pytest.mark.parametrize(
    ("options", "dtype"),
    [({}, torch.float32), (HALF, torch.bfloat16)],
    ids=["float32", "bfloat16"],
)
def test_lora_writes_a_plain_folder(inputs, tmp_path, options, dtype):
    result = run(inputs, tmp_path / "run", **LORA | {"trainer.max_steps": 2} | options)
    weights = load_file(result.model_path / "model.safetensors")
    assert not [name for name in weights if "lora" in name or "base_layer" in name]
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    load_latent_model(result.model_path)


def test_bad_boxes_are_counted_and_reported(inputs, tmp_path):
    rows = json.loads((inputs / "rows.json").read_text())
    rows[3]["bboxes"][0][2] = 1.001
    for record in rows:
        record["image"] = [str(inputs / name) for name in record["image"]]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    overrides = {
        "data.format": "lvr_json",
        "data.train_files": str(tmp_path / "rows.json"),
        "trainer.max_steps": 1,
    }
    with pytest.raises(DataError, match="on_bad_box=clamp"):
        run(inputs, tmp_path / "refused", **overrides)
    for rule, found in (("clamp", (1, 0)), ("drop", (0, 1))):
        result = run(inputs, tmp_path / rule, **overrides, **{"data.on_bad_box": rule})
        assert (result.bad_boxes.num_clamped, result.bad_boxes.num_dropped) == found
        summary = json.loads((tmp_path / rule / "summary.json").read_text())
        assert summary["bad_boxes"]["first"].endswith("row 3: bboxes[0]")
