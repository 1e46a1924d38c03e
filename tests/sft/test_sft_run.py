"""Whole runs: `run_sft` and the config of `python -m grpo_latent.sft`.

Resume to the bit, inputs only read, exit codes.

Not covered: resuming on another number of processes.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from latent_cases import build_case, sampling
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from sft_cases import examples

import grpo_latent.config
from grpo_latent.data.formats.lvr_json import write_lvr_json
from grpo_latent.data.rows import read_verl_parquet, verl_row, write_verl_parquet
from grpo_latent.errors import CheckpointError, ConfigError, DataError
from grpo_latent.latent.mechanisms import LATENT_CONFIG_FILE
from grpo_latent.models import tiny
from grpo_latent.models.loading import load_latent_model
from grpo_latent.models.prompts import encode_prompt
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.rollout.protocol import RolloutRequest
from grpo_latent.sft.__main__ import main as run_config
from grpo_latent.sft.run import run_sft
from grpo_latent.sft.settings import SFTSettings

CONFIG_DIR = str(Path(grpo_latent.config.__file__).parent)
WORDS = ("read", "red", "blue", "green", "?")
SMALL = {
    "data.format": "parquet",
    "data.min_image_tokens": None,
    "data.max_image_tokens": None,
    "model.vision_cache_bytes": 1 << 20,
    "latent.head": "mlp",
    "latent.steps": 2,
    "trainer.max_steps": 6,
    "trainer.per_device_train_batch_size": 4,
    "trainer.gradient_accumulation_steps": 1,
    "trainer.learning_rate": 1e-2,
    "trainer.warmup_steps": 2,
    "trainer.save_steps": 3,
    "trainer.save_total_limit": None,
    "schedule.horizon_steps": 10,
}


def digests(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A base model without latent tokens, and rows in both formats. Unchanged at the end."""
    folder = tmp_path_factory.mktemp("inputs")
    model, tokenizer, processor = tiny.tiny_qwen2_5_vl(WORDS, latent_tokens=())
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    rows = [
        verl_row(
            data_source="test",
            prompt="".join(part.get("text", "<image>") for part in item.messages[0]["content"]),
            images=[image.data for image in item.images],
            answer=item.answer or None,
            index=index,
            split="train",
            bboxes=item.boxes,
        )
        for index, item in enumerate(examples(10))
    ]
    write_verl_parquet(folder / "rows.parquet", rows)
    write_lvr_json(folder / "rows.json", read_verl_parquet(folder / "rows.parquet"))
    before = digests(folder)
    yield folder
    assert digests(folder) == before, "a run wrote to its inputs"


def config_of(inputs, output_dir, name="sft", **overrides):
    values = {
        "model.path": str(inputs / "base"),
        "data.train_files": str(inputs / "rows.parquet"),
        "trainer.output_dir": str(output_dir),
    }
    with initialize_config_dir(CONFIG_DIR, version_base=None):
        config = compose(name)
    OmegaConf.set_struct(config, False)
    for key, value in (values | SMALL | overrides).items():
        OmegaConf.update(config, key, value)
    return config


def settings_of(inputs, output_dir, **overrides):
    return SFTSettings.from_dict(
        OmegaConf.to_container(config_of(inputs, output_dir, **overrides), resolve=True)
    )


def run(inputs, output_dir, **overrides):
    return run_sft(settings_of(inputs, output_dir, **overrides))


def same_tensors(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def same_nested(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_nested(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same_nested(x, y) for x, y in zip(a, b, strict=True))
    return a == b


LORA = {"model.lora.enabled": True, "model.lora.r": 2, "model.lora.dropout": 0.3}


@pytest.mark.parametrize(
    "options",
    [{}, LORA, {"data.labelled_per_batch": 1, "trainer.gradient_accumulation_steps": 2}],
    ids=["full", "lora-dropout", "labelled-accumulated"],
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
    assert same_tensors(
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
    assert same_tensors(first, second)
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
    assert same_tensors(*weights)
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


def test_a_run_with_other_settings_is_not_resumed(inputs, tmp_path):
    run(inputs, tmp_path, **{"trainer.max_steps": 3})
    with pytest.raises(ConfigError, match="other settings.*loss.latent_weight"):
        run(inputs, tmp_path, **{"loss.latent_weight": 0.7})
    assert (
        run(
            inputs, tmp_path, **{"loss.latent_weight": 0.7, "trainer.resume_from_checkpoint": None}
        ).steps
        == 6
    )
    with pytest.raises(ConfigError, match="not a complete checkpoint"):
        run(inputs, tmp_path, **{"trainer.resume_from_checkpoint": str(tmp_path / "checkpoint-9")})


def test_resuming_from_a_damaged_checkpoint_is_refused(inputs, tmp_path):
    run(inputs, tmp_path, **{"trainer.max_steps": 3})
    path = tmp_path / "checkpoint-3" / "model.safetensors"
    tensors = load_file(path)
    del tensors["lvr_head.mlp.0.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="weights are missing.*lvr_head.mlp.0.weight"):
        run(inputs, tmp_path)


def test_output_over_the_input_is_refused(inputs, tmp_path):
    for key in ("trainer.output_dir", "model.save_path"):
        with pytest.raises(ConfigError, match="would be overwritten"):
            run(inputs, tmp_path, **{key: str(inputs / "base")})


def remove(name):
    def change(folder):
        (folder / name).unlink()

    return change


def edit(name, **values):
    def change(folder):
        path = folder / name
        content = json.loads(path.read_text()) | values
        path.write_text(json.dumps(content))

    return change


def write(name, text):
    def change(folder):
        (folder / name).write_text(text)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("config.json"), "config.json"),
        (remove("model.safetensors"), "weights"),
        (remove("tokenizer.json"), "tokenizer"),
        (remove("chat_template.jinja"), "chat template"),
        (write("config.json", "{"), "JSON|config.json"),
        (write("model.safetensors", "no weights"), "weights"),
    ],
    ids=["config", "weights", "tokenizer", "template", "json", "damaged"],
)
def test_malformed_base_models(inputs, tmp_path, change, message):
    shutil.copytree(inputs / "base", tmp_path / "base")
    change(tmp_path / "base")
    with pytest.raises(CheckpointError, match=message):
        run(inputs, tmp_path / "run", **{"model.path": str(tmp_path / "base")})


def test_a_text_model_has_no_visual_targets(inputs, tmp_path):
    model, tokenizer, _ = tiny.tiny_qwen2(WORDS)
    model.save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    with pytest.raises(CheckpointError, match="vision tower"):
        run(inputs, tmp_path / "run", **{"model.path": str(tmp_path / "text")})


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"data.train_files": "nowhere.parquet"}, DataError, "nowhere.parquet"),
        ({"data.format": "csv"}, ConfigError, "data.format"),
        ({"data.rows": 3}, ConfigError, r"data: unknown key.*max_rows"),
        ({"trainer.max_step": 3}, ConfigError, r"trainer: unknown key.*max_steps"),
        ({"trainer.optim": "adamv"}, ConfigError, "adamv"),
        ({"model.path": None}, ConfigError, "model.path: wrong type"),
        ({"model.path": "a/b/c"}, CheckpointError, "no such folder"),
        ({"model.dtype": "float8"}, ConfigError, "model.dtype"),
        ({"model.lora.rank": 3}, ConfigError, "model.lora: unknown key"),
        ({"latent.steps": "many"}, ConfigError, "latent.steps: wrong type"),
        ({"latent.steps": 0}, ConfigError, "latent.steps"),
        ({"latent.head": "conv"}, ConfigError, "latent.head"),
        ({"latent.exit": "latent_end"}, ConfigError, "loss.end"),
        ({"latent.exit": "end_token"}, ConfigError, "loss.end"),
        ({"loss.latent_loss": "l2"}, ConfigError, "loss.latent_loss"),
        ({"loss.latent_weight": "0.1"}, ConfigError, "loss.latent_weight: wrong type"),
        ({"schedule.steps": 3}, ConfigError, "schedule: unknown key"),
        ({"data.labelled_per_batch": 4}, ConfigError, "labelled_per_batch"),
        ({"data.max_length": 5}, DataError, "row too long"),
        ({"model.freeze_merger": False}, ConfigError, "frozen"),
        ({"trainer.use_cpu": True, "trainer.fsdp": "full_shard"}, ConfigError, "FSDP on the CPU"),
    ],
)
def test_malformed_configs(inputs, tmp_path, overrides, error, message):
    with pytest.raises(error, match=message):
        run(inputs, tmp_path / "run", **overrides)


def test_exit_codes(inputs, tmp_path, capsys):
    assert run_config(config_of(inputs, tmp_path / "a", **{"trainer.max_steps": 1})) == 0
    assert "sft: 1 steps" in capsys.readouterr().out
    assert run_config(config_of(inputs, tmp_path / "b", **{"data.format": "csv"})) == 2
    assert capsys.readouterr().err.startswith("ConfigError: data.format")
    unset = config_of(inputs, tmp_path / "c")
    unset.trainer.output_dir = "???"
    assert run_config(unset) == 2
    assert "trainer.output_dir" in capsys.readouterr().err
