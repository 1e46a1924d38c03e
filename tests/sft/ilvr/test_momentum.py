"""The teacher moves as computed by hand, in the Hugging Face Trainer, and over a resume."""

import pytest
import torch
from latent_cases import build_case
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from grpo_latent.errors import CheckpointError, ConfigError
from grpo_latent.sft.ilvr.momentum import (
    TEACHER_FOLDER,
    KeepsTeacher,
    MomentumCallback,
    MomentumTeacher,
)

DECAY = 0.8


class Rows(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = torch.tensor([1, 9 + index, 12, 2])
        return {"input_ids": ids, "labels": ids}


class TeacherTrainer(KeepsTeacher, Trainer):
    """Notes the student after each optimizer step."""

    def __init__(self, teacher, args):
        self.teacher, self.students = teacher, []
        super().__init__(
            teacher.student, args, train_dataset=Rows(), callbacks=[MomentumCallback(teacher)]
        )

    def training_step(self, *args, **kwargs):
        self.students.append(weights(self.teacher.student))
        return super().training_step(*args, **kwargs)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train(folder, max_steps, resume=None):
    student = build_case("qwen2").model
    student.model.embed_tokens.requires_grad_(False)
    arguments = TrainingArguments(
        str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        lr_scheduler_type="constant",
    )
    trainer = TeacherTrainer(MomentumTeacher(student, DECAY), arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_teacher_equals_the_average_by_hand_after_three_steps_and_after_a_resume(tmp_path):
    trainer = train(tmp_path / "a", 3)
    students = [*trainer.students, weights(trainer.teacher.student)]
    assert len(students) == 4 and trainer.teacher.num_updates == 3
    teacher = weights(trainer.teacher.model)
    moved = 0
    for name, start in students[0].items():
        expected = DECAY**3 * start.double()
        for step in (1, 2, 3):
            expected += DECAY ** (3 - step) * (1 - DECAY) * students[step][name].double()
        torch.testing.assert_close(teacher[name].double(), expected, rtol=0, atol=1e-6)
        moved += not torch.equal(teacher[name], start) and not torch.equal(
            teacher[name], students[3][name]
        )
    assert moved > 10
    resumed = train(tmp_path / "b", 3, resume=str(tmp_path / "a" / "checkpoint-2"))
    assert resumed.teacher.num_updates == 3 and len(resumed.students) == 1
    for name, value in weights(resumed.teacher.model).items():
        assert torch.equal(value, teacher[name]), name


def test_frozen_parameters_are_shared_and_others_are_not():
    student = build_case("qwen2").model
    student.model.embed_tokens.requires_grad_(False)
    teacher = MomentumTeacher(student)
    own, theirs = dict(teacher.model.named_parameters()), dict(student.named_parameters())
    shared = {name for name in own if own[name].data_ptr() == theirs[name].data_ptr()}
    assert shared == {"model.embed_tokens.weight"}
    assert not any(parameter.requires_grad for parameter in own.values())
    assert theirs["lm_head.weight"].requires_grad and not teacher.model.training


def test_half_precision_does_not_swallow_the_updates(tmp_path):
    student = torch.nn.Linear(4, 4).to(torch.bfloat16)
    teacher = MomentumTeacher(student, 0.999)
    start = student.weight.detach().float().clone()
    with torch.no_grad():
        student.weight += 1
    for _ in range(200):
        teacher.update()
    expected = start + (1 - 0.999**200) * (student.weight.detach().float() - start)
    torch.testing.assert_close(teacher.model.weight.float(), expected, rtol=0, atol=0.02)
    teacher.save(tmp_path)
    saved = load_file(tmp_path / TEACHER_FOLDER / "ema.safetensors")["weight"]
    torch.testing.assert_close(saved, expected, rtol=0, atol=1e-4)
    again = MomentumTeacher(student, 0.999)
    again.load(tmp_path)
    assert torch.equal(again.model.weight, teacher.model.weight) and again.num_updates == 200


def test_a_checkpoint_without_its_teacher_is_an_error(tmp_path):
    teacher = MomentumTeacher(torch.nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="no momentum teacher"):
        teacher.load(tmp_path)
    MomentumTeacher(torch.nn.Linear(3, 2)).save(tmp_path)
    with pytest.raises(CheckpointError, match="another model"):
        teacher.load(tmp_path)


def test_resuming_without_restoring_the_teacher_is_an_error():
    teacher, state = MomentumTeacher(torch.nn.Linear(2, 2)), type("State", (), {"global_step": 2})
    with pytest.raises(CheckpointError, match="does not belong to this step"):
        MomentumCallback(teacher).on_train_begin(None, state, None)


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_decays_that_never_or_wrongly_move(decay):
    with pytest.raises(ConfigError, match="not a decay"):
        MomentumTeacher(torch.nn.Linear(2, 2), decay)


def test_a_frozen_vision_tower_is_shared_with_the_student_and_one_that_trains_is_not():
    model = build_case("qwen2_5_vl").model
    assert MomentumTeacher(model).model.model.visual is not model.model.visual
    model.model.visual.requires_grad_(False)
    teacher = MomentumTeacher(model).model
    assert teacher.model.visual is model.model.visual
    assert teacher.model.language_model is not model.model.language_model


def test_the_average_follows_a_teacher_that_was_moved():
    """The average follows a moved teacher: moving replaces the tensors of parameters.

    One captured before would be another than the teacher's.
    """
    student = build_case("qwen2").model
    teacher = MomentumTeacher(student, DECAY)
    student.to(torch.float64)
    teacher.model.to(torch.float64)
    before = weights(teacher.model)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    teacher.update()
    name = next(name for name, parameter in student.named_parameters() if parameter.requires_grad)
    torch.testing.assert_close(weights(teacher.model)[name], before[name] + (1 - DECAY))
