"""What `python -m grpo_latent.sft` refuses: resumes, outputs, base models and configs; exit codes."""

import json
import shutil

import pytest
import torch
from folder_cases import WritesMarker, without_manifest
from lvr_run_cases import config_of, run
from run_cases import WORDS
from safetensors.torch import load_file, save_file

from grpo_latent.errors import CheckpointError, ConfigError, DataError
from grpo_latent.models import tiny
from grpo_latent.sft.__main__ import main as run_config


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
    with pytest.raises(CheckpointError, match="model.safetensors: a part of the checkpoint has"):
        run(inputs, tmp_path)
    folder = without_manifest(tmp_path / "checkpoint-3")
    with pytest.raises(CheckpointError, match="weights are missing.*lvr_head.mlp.0.weight"):
        run(inputs, tmp_path)
    marker = tmp_path / "marker"
    torch.save({"state": WritesMarker(marker)}, folder / "optimizer.pt")
    with pytest.raises(CheckpointError, match="optimizer.pt: .*would run code"):
        run(inputs, tmp_path)
    assert not marker.exists()


def test_output_over_the_input_is_refused(inputs, tmp_path):
    for key in ("trainer.output_dir", "model.save_path"):
        with pytest.raises(ConfigError, match="would be overwritten"):
            run(inputs, tmp_path, **{key: str(inputs / "base")})


def test_a_file_in_the_place_of_a_folder_is_refused(inputs, tmp_path):
    (tmp_path / "file").touch()
    for key in ("trainer.output_dir", "model.save_path"):
        with pytest.raises(ConfigError, match=f"{key}: a file is where a folder should be"):
            run(inputs, tmp_path / "run", **{key: str(tmp_path / "file" / "below")})


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
        ({"trainer.use_cpu": True, "trainer.fsdp": True}, ConfigError, "shards need a launcher"),
        ({"trainer.fsdp": "full_shard"}, ConfigError, "trainer.fsdp: wrong type"),
        ({"trainer.fsdp": True, "model.lora.enabled": True}, ConfigError, "FSDP with LoRA"),
        ({"trainer.fsdp": True, "model.dtype": "bfloat16"}, ConfigError, "FSDP with model.dtype"),
        (
            {"trainer.fsdp": True, "trainer.fsdp_config": {"version": 1}},
            ConfigError,
            r"fsdp_config \['version'\]",
        ),
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
