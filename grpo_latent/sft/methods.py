"""The table of SFT methods: the keys that each has in the config, and the classes that run it.

    method        reads                         trains
    lvr           LVR JSON, verl parquet      boxes' visual tokens as latents (2509.24251)
    ilvr_stage1   ILVR JSONL                  the momentum teacher's choice as latents (2512.05665)
    ilvr_stage2   ILVR JSONL                  answers over the model's own latents
    ivt_lr        M3CoT, ScienceQA, parquet   rationales whose steps become slots (2510.12603)
    coconut       Coconut JSON, parquet       the same without image embeddings, gradient through
                                              the slots (2412.06769)

A new method is a row here and a file `config/method/<name>.yaml` with its defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from grpo_latent.backbones.registry import backbone_of
from grpo_latent.data.boxes import BadBoxes
from grpo_latent.data.formats.ilvr_jsonl import read_ilvr_jsonl
from grpo_latent.data.formats.lvr_json import read_lvr_json
from grpo_latent.data.formats.stepwise import READERS as STEPWISE_READERS
from grpo_latent.data.rows import read_verl_parquet
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import LatentModel
from grpo_latent.sft.common.latents import (
    CoconutLatents,
    ILVRLatents,
    IVTLRLatents,
    LatentSettings,
    LVRLatents,
)
from grpo_latent.sft.common.rows import RowEncoder
from grpo_latent.sft.common.trainer import LatentSFTTrainer
from grpo_latent.sft.ilvr.rows import ILVREncoder
from grpo_latent.sft.ilvr.trainer import (
    ILVRStage1Trainer,
    ILVRStage2Trainer,
    SelfFedConfig,
    TeacherConfig,
)
from grpo_latent.sft.lvr.losses import LVRLossConfig
from grpo_latent.sft.lvr.rows import LVREncoder
from grpo_latent.sft.lvr.trainer import LVRTrainer
from grpo_latent.sft.stepwise.curriculum import CoconutConfig, CurriculumConfig
from grpo_latent.sft.stepwise.rows import StepwiseEncoder
from grpo_latent.sft.stepwise.trainer import StepwiseTrainer

Reader: TypeAlias = Callable[[str, str | None, BadBoxes], Iterator]


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        latent, loss: types of the config's sections; a key that the type lacks is refused.
        readers: `data.format` -> checked examples of a file, given the folder that image paths are
            relative to, and what becomes of bad boxes.
        make_encoder: (model, `loss`, longest row) -> from an example to what the trainer's
            `collate_rows` takes.
        trainer: its arguments are those of `LatentSFTTrainer`, with a `loss` of the type above.
        needs_vision: whether a text-only model is refused.
    """

    latent: type[LatentSettings]
    loss: type
    readers: dict[str, Reader]
    make_encoder: Callable[[LatentModel, Any, int | None], RowEncoder]
    trainer: type[LatentSFTTrainer]
    needs_vision: bool = True


def _lvr_encoder(latent: LatentModel, loss: LVRLossConfig, max_length: int | None) -> LVREncoder:
    return LVREncoder.of_model(
        latent,
        max_length=max_length,
        backbone=backbone_of(latent.model),
        has_end_vector=loss.trains_end_vector,
    )


def _stage1_encoder(
    latent: LatentModel, loss: TeacherConfig, max_length: int | None
) -> ILVREncoder:
    return ILVREncoder.of_model(latent, max_length=max_length, reads_helpers=True)


def _stage2_encoder(
    latent: LatentModel, loss: SelfFedConfig, max_length: int | None
) -> ILVREncoder:
    return ILVREncoder.of_model(latent, max_length=max_length, reads_helpers=False)


def _stepwise_encoder(
    latent: LatentModel, loss: CurriculumConfig, max_length: int | None
) -> StepwiseEncoder:
    image_token_id = ModelAdapter(latent.model).image_token_id
    return StepwiseEncoder.of_model(
        latent, max_length=max_length, image_token_id=image_token_id, curriculum=loss
    )


def _lvr_json(path: str, image_folder: str | None, bad_boxes: BadBoxes) -> Iterator:
    return read_lvr_json(path, image_folder, bad_boxes=bad_boxes)


def _boxed_parquet(path: str, image_folder: str | None, bad_boxes: BadBoxes) -> Iterator:
    return read_verl_parquet(path, bad_boxes)


def _ilvr_jsonl(path: str, image_folder: str | None, bad_boxes: BadBoxes) -> Iterator:
    return read_ilvr_jsonl(path, image_folder)


def _stored(read: Callable[[str], Iterator]) -> Reader:
    """A reader of files that hold their images, and no boxes."""
    return lambda path, image_folder, bad_boxes: read(path)


_STEPWISE_READERS = {name: _stored(read) for name, read in STEPWISE_READERS.items()}

METHODS: dict[str, Method] = {
    "lvr": Method(
        latent=LVRLatents,
        loss=LVRLossConfig,
        readers={"lvr_json": _lvr_json, "parquet": _boxed_parquet},
        make_encoder=_lvr_encoder,
        trainer=LVRTrainer,
    ),
    "ilvr_stage1": Method(
        latent=ILVRLatents,
        loss=TeacherConfig,
        readers={"ilvr_jsonl": _ilvr_jsonl},
        make_encoder=_stage1_encoder,
        trainer=ILVRStage1Trainer,
    ),
    "ilvr_stage2": Method(
        latent=ILVRLatents,
        loss=SelfFedConfig,
        readers={"ilvr_jsonl": _ilvr_jsonl},
        make_encoder=_stage2_encoder,
        trainer=ILVRStage2Trainer,
    ),
    "ivt_lr": Method(
        latent=IVTLRLatents,
        loss=CurriculumConfig,
        readers=_STEPWISE_READERS,
        make_encoder=_stepwise_encoder,
        trainer=StepwiseTrainer,
    ),
    "coconut": Method(
        latent=CoconutLatents,
        loss=CoconutConfig,
        readers=_STEPWISE_READERS,
        make_encoder=_stepwise_encoder,
        trainer=StepwiseTrainer,
        needs_vision=False,
    ),
}
