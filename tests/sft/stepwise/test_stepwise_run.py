"""IVT-LR and Coconut as whole runs of `python -m grpo_latent.sft`.

From published records and from verl rows.
"""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_cases import compose_sft, settings_from
from sft_cases import png
from text_file_cases import write_base
from transformers import AutoTokenizer

from grpo_latent.data.formats.stepwise import main, read_stepwise_rows
from grpo_latent.data.rows import read_verl_parquet, verl_row, write_verl_parquet
from grpo_latent.errors import CheckpointError, ConfigError, DataError
from grpo_latent.models import tiny
from grpo_latent.models.loading import load_latent_model
from grpo_latent.sft.run import run_sft

WORDS = (
    "read",
    "red",
    "blue",
    "?",
    "Options:",
    "(A)",
    "(B)",
    "Therefore,",
    "the",
    "answer",
    "is",
    "A",
    "B",
)
SMALL = {
    "data.min_image_tokens": None,
    "data.max_image_tokens": None,
    "latent.steps": 2,
    "loss.steps_per_stage": [1, 1],
    "loss.save_stages": True,
    "trainer.max_steps": 3,
    "trainer.per_device_train_batch_size": 2,
    "trainer.gradient_accumulation_steps": 1,
    "trainer.warmup_steps": 1,
    "trainer.save_strategy": "no",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Base models without latent tokens, M3CoT records and verl rows of a text task."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, build in (("vision", tiny.tiny_qwen2_vl), ("text", tiny.tiny_qwen3)):
        model, tokenizer, processor = build(WORDS, latent_tokens=())
        model.save_pretrained(folder / name)
        (processor or tokenizer).save_pretrained(folder / name)
    records = [
        {
            "id": f"row-{i}",
            "question": "read red ?",
            "choices": ["red", "blue"],
            "context": "",
            "answer": "AB"[i % 2],
            "rationale": "red is 1. blue is 2. red ?",
            "image": {"bytes": png(i), "path": None},
        }
        for i in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(records), folder / "m3cot.parquet")
    rows = [
        verl_row(
            data_source="t",
            prompt="read red ?",
            images=(),
            answer="3",
            index=i,
            split="train",
            steps=["red 1"],
        )
        for i in range(4)
    ]
    write_verl_parquet(folder / "rows.parquet", rows)
    return folder


def run(output_dir, method, model, file, **overrides):
    paths = {
        "model.path": str(model),
        "data.train_files": str(file),
        "trainer.output_dir": str(output_dir),
    }
    config = compose_sft(paths | SMALL | overrides, overrides=[f"method={method}"])
    return run_sft(settings_from(config))


def test_published_records_through_the_curriculum_with_lora(inputs, tmp_path):
    changes = {
        "latent.top_k_image": 2,
        "model.lora.enabled": True,
        "model.lora.r": 2,
        "loss.save_stages": False,
    }
    result = run(
        tmp_path / "out", "ivt_lr", inputs / "vision", inputs / "m3cot.parquet", **changes
    )
    mechanism = load_latent_model(result.model_path).mechanism
    assert (mechanism.key(), mechanism.has_slots, mechanism.positions) == ("ivt_lr", True, "1d")
    assert (mechanism.steps, mechanism.top_k_image, mechanism.latent_token) == (2, 2, "<|latent|>")
    with pytest.raises(ConfigError, match="stages are saved of whole models"):
        run(
            tmp_path / "no",
            "ivt_lr",
            inputs / "vision",
            inputs / "m3cot.parquet",
            **changes | {"loss.save_stages": True},
        )


def test_coconut_on_a_text_model(inputs, tmp_path):
    result = run(tmp_path / "out", "coconut", inputs / "text", inputs / "rows.parquet")
    assert result.steps == 3 and load_latent_model(result.model_path).mechanism.key() == "coconut"
    assert [
        load_latent_model(tmp_path / "out" / f"stage_{stage}").mechanism.steps for stage in (0, 1)
    ] == [0, 1]
    with pytest.raises(CheckpointError, match="needs a vision tower"):
        run(tmp_path / "other", "ivt_lr", inputs / "text", inputs / "rows.parquet")


def test_coconut_on_gpt2(inputs, tmp_path):
    """As its authors train it; a base model's folder has no template for chats, so one is given."""
    write_base(tmp_path / "gpt2", "gpt2")
    with pytest.raises(CheckpointError, match="no chat template"):
        run(tmp_path / "no", "coconut", tmp_path / "gpt2", inputs / "rows.parquet")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "gpt2")
    result = run(tmp_path / "out", "coconut", tmp_path / "gpt2", inputs / "rows.parquet")
    loaded = load_latent_model(result.model_path)
    assert result.steps == 3 and loaded.model.config.model_type == "gpt2"
    assert loaded.mechanism.key() == "coconut"


def test_rows_for_rl_keep_prompt_answer_and_steps(inputs, tmp_path):
    path = tmp_path / "rl.parquet"
    main(["--format", "m3cot", "--in", str(inputs / "m3cot.parquet"), "--out", str(path)])
    first, second, *_ = read_stepwise_rows(path)
    assert first.steps == ("red is 1.", "blue is 2.", "red ?") and [
        first.answer,
        second.answer,
    ] == ["A", "B"]
    assert first.closing == "<answer> A </answer>" and first.images[0].data == png(0)
    assert [part.get("text") for part in first.messages[0]["content"]] == [
        None,
        "read red ?\nOptions:\n(A) red\n(B) blue",
    ]
    assert next(iter(read_verl_parquet(path))).answer == "A"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(answer=None), "reward_model.ground_truth: no answer"),
        (dict(steps=None), "extra_info.steps: no rationale in steps"),
        (dict(steps=["red", " "]), "extra_info.steps: no rationale in steps"),
    ],
)
def test_verl_rows_that_cannot_be_used_are_errors(tmp_path, changes, message):
    values = (
        dict(
            data_source="t",
            prompt="read",
            images=(),
            answer="3",
            index=0,
            split="train",
            steps=["red"],
        )
        | changes
    )
    write_verl_parquet(tmp_path / "rows.parquet", [verl_row(**values)])
    with pytest.raises(DataError, match=f"rows.parquet row 0: {message}"):
        list(read_stepwise_rows(tmp_path / "rows.parquet"))
