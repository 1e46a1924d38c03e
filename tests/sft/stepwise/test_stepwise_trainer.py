"""The curriculum in the Hugging Face Trainer: stages fire at their steps and are saved.

A resume changes no bit.
"""

import pytest
import torch
from latent_cases import build_case
from sft_cases import cpu_arguments, latent_model, png
from transformers import TrainingArguments

from grpo_latent.data.formats.stepwise import StepwiseExample
from grpo_latent.data.image_refs import ImageRef
from grpo_latent.errors import ConfigError
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import load_latent_model
from grpo_latent.sft.common.dataset import SFTDataset
from grpo_latent.sft.common.parameters import freeze_vision
from grpo_latent.sft.stepwise.curriculum import CurriculumConfig
from grpo_latent.sft.stepwise.forward import loss_sums
from grpo_latent.sft.stepwise.rows import StepwiseEncoder, collate_rows
from grpo_latent.sft.stepwise.trainer import StepwiseTrainer

SLOTS = dict(steps=2)
WORDS = ("red", "blue", "green")


def examples(num, has_image):
    rows = []
    for seed in range(num):
        content = [{"type": "text", "text": f"read {WORDS[seed % 3]} ?"}] + [
            {"type": "image"}
        ] * has_image
        images = (ImageRef(f"row {seed}: image", data=png(seed)),) * has_image
        steps = (f"{WORDS[seed % 3]} {seed % 5}", f"red {seed % 7}")[: 1 + seed % 2]
        messages = ({"role": "user", "content": content},)
        rows.append(
            StepwiseExample(
                messages,
                images,
                steps,
                "3",
                f"<answer> {seed % 5} </answer>",
                "test",
                f"row {seed}",
            )
        )
    return rows


def trainer(folder, steps, mechanism="ivt_lr", loss=None, lora=False, **arguments):
    is_text = mechanism == "coconut"
    changes = dict(mechanism=mechanism) if is_text else dict(mechanism=mechanism, top_k_image=2)
    name = "qwen3" if is_text else "qwen2_vl"
    latent = latent_model(case=build_case(name), savable=True, **SLOTS, **changes)
    freeze_vision(latent.model)
    adapter = ModelAdapter(latent.model, latent.mechanism)
    encoder = StepwiseEncoder.of_model(
        latent, image_token_id=adapter.image_token_id, curriculum=loss or CurriculumConfig()
    )
    values = dict(max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    args = cpu_arguments(folder, **values | arguments)
    return StepwiseTrainer(latent, args, SFTDataset(examples(8, not is_text), encoder), loss)


def train(*args, resume=None, **kwargs):
    run = trainer(*args, **kwargs)
    run.train(resume_from_checkpoint=resume)
    run.release()
    return run


def weights(run):
    return {
        name: parameter.detach().clone() for name, parameter in run.latent.model.named_parameters()
    }


LOSS = dict(steps_per_stage=(2, 1), save_stages=True)


@pytest.mark.parametrize(
    "mechanism, gradient, resumed", [("ivt_lr", "cut", (2, 4)), ("coconut", "bptt", (2,))]
)
def test_stages_begin_at_their_steps_and_a_resume_changes_no_bit(
    tmp_path, mechanism, gradient, resumed
):
    loss = CurriculumConfig(gradient, **LOSS)
    run = train(tmp_path, 5, mechanism, loss)
    logs = [entry for entry in run.state.log_history if "ce" in entry]
    assert [entry["stage"] for entry in logs] == [0, 0, 1, 2, 2] and run.curriculum.num_resets == 2
    own = weights(run)
    # from inside a stage and, at step 2, from where a new one begins; saves lie at steps 2 and 4
    for step in resumed:
        again = train(tmp_path, 5, mechanism, loss, resume=str(tmp_path / f"checkpoint-{step}"))
        assert all(torch.equal(own[name], value) for name, value in weights(again).items()), step
    for stage in (0, 1):
        assert load_latent_model(
            tmp_path / f"stage_{stage}"
        ).mechanism == run.latent.mechanism.replace(steps=stage)
    at_end, checkpoint = (
        load_latent_model(tmp_path / name).model for name in ("stage_0", "checkpoint-2")
    )
    assert all(
        torch.equal(value, checkpoint.state_dict()[name])
        for name, value in at_end.state_dict().items()
    )


def test_a_fresh_optimizer_is_not_the_old_one(tmp_path):
    runs = []
    for reset in (True, False):
        loss = CurriculumConfig("bptt", reset_optimizer=reset, steps_per_stage=(1, 1))
        runs.append(train(tmp_path / str(reset), 3, "coconut", loss, save_strategy="no"))
    assert [run.curriculum.num_resets for run in runs] == [2, 0]
    own, kept = map(weights, runs)
    assert any(
        "up_proj" in name and not torch.equal(own[name], value) for name, value in kept.items()
    )


def test_the_loss_is_that_of_the_stage(tmp_path):
    """At learning rate 0 the logged losses are those of the rows at stages 0, 1 and 2.

    All rows are in each step.
    """
    sizes = dict(learning_rate=0.0, save_strategy="no", per_device_train_batch_size=4)
    run = trainer(tmp_path, 3, loss=CurriculumConfig(steps_per_stage=(1, 1)), **sizes)
    expected = []
    with torch.no_grad():
        for stage in range(3):
            batch = collate_rows([run.train_dataset[i] for i in range(8)], stage)
            sums = loss_sums(run.adapter, batch, stage, True)
            expected.append(float(sums["ce"]) / int(batch["response_valid"].sum()))
    check_logged(run, expected)


def check_logged(run, expected):
    """Each stage logs its own cross-entropy, and they differ."""
    run.train()
    run.release()
    logged = [entry["ce"] for entry in run.state.log_history if "ce" in entry]
    assert logged == pytest.approx(expected, rel=1e-5)
    assert len({round(value, 3) for value in expected}) == 3


def test_several_slots_a_step_and_a_last_stage_of_answers_alone(tmp_path):
    """Coconut's c = 2: stages of 0, 2 and 2 slots.

    They write out all steps, all but the first, and none.
    """
    sizes = dict(learning_rate=0.0, save_strategy="no", per_device_train_batch_size=4)
    loss = CurriculumConfig(
        "bptt", slots_per_step=2, answers_only=True, steps_per_stage=(1, 1), save_stages=True
    )
    run = trainer(tmp_path, 3, "coconut", loss, **sizes)
    expected = []
    example, written = (
        run.train_dataset.examples[1],
        [(0, "blue 1 red 1 "), (2, "red 1 "), (2, "")],
    )
    for stage, (num_slots, steps) in enumerate(written):
        row = run.train_dataset[1].response_ids[stage]
        assert run.latent.tokenizer.decode(row[:-1]) == f"{steps}{example.closing}"
        batch = collate_rows([run.train_dataset[i] for i in range(8)], stage)
        with torch.no_grad():
            sums = loss_sums(run.adapter, batch, num_slots, False)
        expected.append(float(sums["ce"]) / int(batch["response_valid"].sum()))
    check_logged(run, expected)
    assert [
        load_latent_model(tmp_path / f"stage_{stage}").mechanism.steps for stage in (0, 1)
    ] == [0, 2]


def test_stages_by_epochs():
    """An epoch has 2 steps (8 rows, 4 an optimizer step), and a stage 4 epochs.

    The published schedule has 16 epochs.
    """
    assert CurriculumConfig().boundaries(3, 2) == (8, 16, 24)
    assert CurriculumConfig(steps_per_stage=(5, 1)).boundaries(2, 99) == (5, 6)


def test_what_does_not_fit_is_an_error(tmp_path):
    with pytest.raises(
        ConfigError, match="stages and slots differ; got \\[3\\]; expected 2 numbers"
    ):
        train(tmp_path, 5, loss=CurriculumConfig(steps_per_stage=(3,)))
    with pytest.raises(
        ConfigError, match="ends before its last stage; got 3 steps; expected more than 3"
    ):
        train(tmp_path, 3, loss=CurriculumConfig(steps_per_stage=(2, 1)))
    with pytest.raises(
        ConfigError, match="loss.slots_per_step: slots for a part of a step; got 2 slots, 3 a step"
    ):
        trainer(tmp_path, 5, loss=CurriculumConfig(slots_per_step=3))
    with pytest.raises(ConfigError, match="the stages of another curriculum"):
        run = trainer(tmp_path, 5)
        StepwiseTrainer(
            run.latent, run.args, run.train_dataset, CurriculumConfig(answers_only=True)
        )
    with pytest.raises(ConfigError, match="loss.gradient"):
        CurriculumConfig(gradient="one_hop")
    for values in (
        {"slots_per_step": 2.0},
        {"slots_per_step": 0},
        {"slots_per_step": True},
        {"answers_only": "no"},
    ):
        with pytest.raises(
            ConfigError, match=f"loss.{next(iter(values))}: not a value of this option"
        ):
            CurriculumConfig(**values)
    with pytest.raises(ConfigError, match="stages without a length"):
        CurriculumConfig(steps_per_stage=(0, 1))
    with pytest.raises(ConfigError, match="the curriculum fills slots"):
        StepwiseTrainer(latent_model(), TrainingArguments(str(tmp_path), use_cpu=True), None)
