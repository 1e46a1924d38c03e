"""ILVR's stages in the Hugging Face Trainer: the teacher follows, stage 2 learns.

A resume changes no bit.
"""

import pytest
import torch
from ilvr_cases import PLANS, record, write_images
from sft_cases import cpu_arguments, latent_model
from transformers import TrainingArguments

from grpo_latent.data.formats.ilvr_jsonl import parse_ilvr_record
from grpo_latent.errors import ConfigError
from grpo_latent.sft.common.dataset import SFTDataset
from grpo_latent.sft.common.parameters import freeze_vision
from grpo_latent.sft.ilvr.rows import ILVREncoder
from grpo_latent.sft.ilvr.trainer import (
    ILVRStage1Trainer,
    ILVRStage2Trainer,
    SelfFedConfig,
    TeacherConfig,
)


def dataset(latent, folder, plans=PLANS * 2):
    write_images(folder)
    examples = [
        parse_ilvr_record(record(*plan), f"row {i}", folder) for i, plan in enumerate(plans)
    ]
    return SFTDataset(examples, ILVREncoder.of_model(latent))


def train(folder, trainer_class, steps, config, resume=None, **rows):
    latent = latent_model(exit="end_token", steps=3)
    freeze_vision(latent.model)
    arguments = cpu_arguments(folder / "out", max_steps=steps, per_device_train_batch_size=3)
    trainer = trainer_class(latent, arguments, dataset(latent, folder, **rows), config)
    calls = []
    if trainer_class is ILVRStage1Trainer:
        trainer.teacher_adapter.decoder.register_forward_hook(lambda *_: calls.append(1))
    trainer.train(resume_from_checkpoint=resume)
    trainer.release()
    return trainer, calls


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_stage_1_follows_learns_and_resumes_to_the_bit(tmp_path):
    trainer, calls = train(tmp_path, ILVRStage1Trainer, 4, TeacherConfig(decay=0.5))
    assert len(calls) == 4 and trainer.teacher.num_updates == 4
    logs = [entry for entry in trainer.state.log_history if "ce" in entry]
    assert logs[-1]["ce"] < logs[0]["ce"] and 0 < logs[0]["latent_loss"] < 2
    start, student, teacher = (
        weights(m) for m in (latent_model().model, trainer.latent.model, trainer.teacher.model)
    )
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert (
        0
        < float((teacher[name] - start[name]).norm())
        < float((student[name] - start[name]).norm())
    )
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    again, _ = train(tmp_path, ILVRStage1Trainer, 4, TeacherConfig(decay=0.5), resume=checkpoint)
    for first, second in ((student, again.latent.model), (teacher, again.teacher.model)):
        for name, value in weights(second).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("gradient", ["cut", "bptt"])
def test_stage_2_learns(tmp_path, gradient):
    trainer, _ = train(tmp_path, ILVRStage2Trainer, 3, SelfFedConfig(gradient))
    logs = [entry for entry in trainer.state.log_history if "ce" in entry]
    assert logs[-1]["ce"] < logs[0]["ce"] and logs[0]["latent_loss"] == 0


def test_both_stages_take_a_batch_without_spans(tmp_path):
    """Known answer, no helper image: without latents the two stages are one and the same."""
    ce = []
    for trainer_class, config in (
        (ILVRStage1Trainer, TeacherConfig()),
        (ILVRStage2Trainer, SelfFedConfig()),
    ):
        trainer, calls = train(tmp_path, trainer_class, 1, config, plans=PLANS[2:] * 3)
        (entry,) = [entry for entry in trainer.state.log_history if "ce" in entry]
        assert entry["latent_loss"] == 0 and calls == []
        ce.append(entry["ce"])
    assert ce[0] == ce[1] > 0


def test_what_does_not_fit_is_an_error(tmp_path):
    latent = latent_model(exit="latent_end")
    with pytest.raises(ConfigError, match="opened and closed by tokens"):
        ILVRStage2Trainer(
            latent, TrainingArguments(str(tmp_path), use_cpu=True), dataset(latent, tmp_path)
        )
    with pytest.raises(ConfigError, match="loss.gradient"):
        SelfFedConfig(gradient="some")
    with pytest.raises(ConfigError, match="loss.top_k: out of bounds"):
        TeacherConfig(top_k=0)
