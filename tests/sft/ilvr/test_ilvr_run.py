"""ILVR's stages as whole runs of `python -m grpo_latent.sft`.

The teacher resumes to the bit, stage 2 goes on from stage 1.

Not covered: several processes.
"""

import json
from pathlib import Path

import pytest
import torch
from folder_cases import same_nested
from ilvr_cases import PLANS, record, write_images
from latent_cases import sampling
from run_cases import CONFIG_DIR, compose_sft, settings_from
from safetensors.torch import load_file

from grpo_latent.data.formats.ilvr_jsonl import read_ilvr_jsonl
from grpo_latent.errors import ConfigError, DataError
from grpo_latent.latent.mechanisms import ILVR
from grpo_latent.models import tiny
from grpo_latent.models.loading import load_latent_model
from grpo_latent.models.prompts import encode_prompt
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.rollout.protocol import RolloutRequest
from grpo_latent.sft.common.parameters import merge_lora
from grpo_latent.sft.methods import METHODS
from grpo_latent.sft.run import run_sft

SMALL = {
    "data.min_image_tokens": None,
    "data.max_image_tokens": None,
    "model.vision_cache_bytes": 1 << 20,
    "latent.steps": 2,
    "trainer.max_steps": 4,
    "trainer.per_device_train_batch_size": 3,
    "trainer.gradient_accumulation_steps": 1,
    "trainer.learning_rate": 1e-2,
    "trainer.warmup_steps": 1,
    "trainer.save_steps": 2,
    "trainer.save_total_limit": None,
    "schedule.horizon_steps": 10,
}
STAGE1 = {"loss.decay": 0.5}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A base model without latent tokens, and published records with their images."""
    folder = tmp_path_factory.mktemp("inputs")
    model, _, processor = tiny.tiny_qwen2_5_vl(
        ("read", "red", "blue", "look", "?"), latent_tokens=()
    )
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    write_images(folder)
    lines = [json.dumps(record(*plan)) for plan in PLANS * 3]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run(inputs, output_dir, method, /, **overrides):
    values = {
        "model.path": str(inputs / "base"),
        "data.train_files": str(inputs / "rows.jsonl"),
        "trainer.output_dir": str(output_dir),
    }
    config = compose_sft(values | SMALL | overrides, overrides=[f"method={method}"])
    return run_sft(settings_from(config))


def test_stage_1_resumes_student_and_teacher_and_stage_2_goes_on_from_it(inputs, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    result = run(inputs, whole, "ilvr_stage1", **STAGE1)
    run(inputs, halves, "ilvr_stage1", **STAGE1, **{"trainer.max_steps": 2})
    run(inputs, halves, "ilvr_stage1", **STAGE1)
    for name in ("model/model.safetensors", "checkpoint-4/teacher/ema.safetensors"):
        assert same_nested(load_file(whole / name), load_file(halves / name)), name
    teacher, student = (
        load_file(whole / "checkpoint-4" / name)
        for name in ("teacher/ema.safetensors", "model.safetensors")
    )
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(teacher[name], student[name])
    logs = [
        [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        for folder in (whole, halves)
    ]
    for ours, theirs in zip(*logs, strict=True):
        ours.pop("seconds"), theirs.pop("seconds")
        assert ours == theirs
    assert logs[0][-1]["step"] == 4 and logs[0][-1]["latent_loss"] > 0

    second = run(
        inputs, tmp_path / "stage2", "ilvr_stage2", **{"model.path": str(result.model_path)}
    )
    loaded = load_latent_model(second.model_path)
    assert (loaded.mechanism.key(), loaded.mechanism.exit, loaded.mechanism.steps) == (
        "ilvr",
        "end_token",
        2,
    )
    assert [
        loaded.mechanism.start_token,
        loaded.mechanism.latent_token,
        loaded.mechanism.end_token,
    ] == list(ILVR.published_tokens.values())
    first, after = (load_file(r.model_path / "model.safetensors") for r in (result, second))
    assert first.keys() == after.keys() and not torch.equal(
        first["lm_head.weight"], after["lm_head.weight"]
    )
    example = next(read_ilvr_jsonl(inputs / "rows.jsonl"))
    images = [image.open() for image in example.images]
    prompt = encode_prompt(loaded.tokenizer, loaded.processor, example.messages, images, "here")
    engine = HFRolloutEngine(loaded.model, loaded.mechanism, loaded.eos_ids)
    ((trajectory,),) = engine.generate(
        [RolloutRequest(prompt.ids, [1], prompt.images)], sampling(8)
    )
    assert torch.isfinite(trajectory.rollout_log_probs).all()
    with pytest.raises(ConfigError, match="latents of another mechanism; got ilvr; expected lvr"):
        run(inputs, tmp_path / "lvr", "lvr", **{"model.path": str(second.model_path)})


def test_both_stages_train_float32_adapters_over_a_bfloat16_base(inputs, tmp_path, monkeypatch):
    """As at paper scale, teacher included; the folder is all bfloat16 again."""
    merged = []
    monkeypatch.setattr(
        "grpo_latent.sft.run.merge_lora",
        lambda model: merged.append(adapters(model)) or merge_lora(model),
    )
    paper = {
        "model.dtype": "bfloat16",
        "model.lora.enabled": True,
        "model.lora.r": 2,
        "trainer.bf16": True,
    }
    steps = {"trainer.max_steps": 3, "trainer.learning_rate": 1e-5, "trainer.save_strategy": "no"}
    path = inputs / "base"
    for method in ("ilvr_stage1", "ilvr_stage2"):
        path = run(
            inputs, tmp_path / method, method, **paper, **steps, **{"model.path": str(path)}
        ).model_path
        assert {tensor.dtype for tensor in load_file(path / "model.safetensors").values()} == {
            torch.bfloat16
        }
    for name, weight in merged[0].items():
        assert weight.dtype == torch.float32, name
        assert "lora_A" in name or not torch.equal(weight, weight.bfloat16().float()), (
            f"{name} moves in finer steps"
        )
    with pytest.raises(
        ConfigError, match="trainer.bf16: adapters train in float32 over a bfloat16 base"
    ):
        run(inputs, tmp_path / "no", "ilvr_stage1", **paper | {"trainer.bf16": False})


def adapters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize(
    ("method", "overrides", "error", "message"),
    [
        (
            "ilvr_stage1",
            {"latent.latent_end_threshold": 0.1},
            ConfigError,
            "latent: unknown key.*of method ilvr_stage1",
        ),
        (
            "ilvr_stage1",
            {"loss.end": "mode_switch"},
            ConfigError,
            "loss: unknown key.*of method ilvr_stage1",
        ),
        (
            "ilvr_stage2",
            {"loss.decay": 0.9},
            ConfigError,
            "loss: unknown key.*of method ilvr_stage2",
        ),
        ("lvr", {"loss.gradient": "cut"}, ConfigError, "loss: unknown key.*of method lvr"),
        ("lvr", {"data.format": "ilvr_jsonl"}, ConfigError, "data.format.*for method lvr"),
        ("ilvr_stage2", {"method": "ilvr"}, ConfigError, "method: unknown value; got ilvr"),
        ("ilvr_stage2", {"latent.exit": "latent_end"}, ConfigError, "latent.exit"),
        (
            "ilvr_stage1",
            {"latent.visibility": "latents_only"},
            ConfigError,
            "latent.exit: visibility latents_only",
        ),
        ("ilvr_stage1", {"data.max_length": 5}, DataError, "row too long"),
    ],
)
def test_what_does_not_belong_to_the_method_is_an_error(
    inputs, tmp_path, method, overrides, error, message
):
    with pytest.raises(error, match=message):
        run(inputs, tmp_path, method, **overrides)


def test_each_method_has_a_config_and_its_defaults_are_those_of_the_code():
    files = {path.stem for path in Path(CONFIG_DIR, "method").glob("[!_]*.yaml")}
    assert files == METHODS.keys()
    required = ["model.path=a", "data.train_files=b", "trainer.output_dir=c"]
    for name, method in METHODS.items():
        settings = settings_from(compose_sft({}, overrides=[f"method={name}", *required]))
        assert settings.method == name
        assert settings.latent == method.latent() and settings.loss == method.loss()
