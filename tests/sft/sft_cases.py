"""Small SFT problems: random images with boxes, a tiny latent model, rows and batches of them."""

from __future__ import annotations

import io

import numpy as np
import torch
from latent_cases import Case, build_case
from PIL import Image
from transformers import TrainingArguments

from grpo_latent.data.examples import LvrExample, response_template
from grpo_latent.data.image_refs import ImageRef
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import LatentModel
from grpo_latent.sft.common.dataset import SFTDataset
from grpo_latent.sft.common.parameters import freeze_vision
from grpo_latent.sft.lvr.losses import LVRLossConfig
from grpo_latent.sft.lvr.rows import LVREncoder, collate_rows
from grpo_latent.sft.lvr.trainer import LVRTrainer

NAME = "qwen2_5_vl"
COLORS = ("red", "blue", "green")
ANSWERS = ("3", "7", "11")


def png(seed: int, size: tuple[int, int] = (28, 42)) -> bytes:
    """A random image of `size` (height, width): 2 x 3 merged visual tokens."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def example(
    seed: int = 0,
    boxes=((0.0, 0.0, 0.3, 0.4),),
    box_images=None,
    num_images: int = 1,
    answer: str | None = "7",
    response: str | None = None,
    question: str = "read red ?",
) -> LvrExample:
    where = f"row {seed}"
    content = [{"type": "text", "text": question}, *[{"type": "image"}] * num_images]
    return LvrExample(
        messages=({"role": "user", "content": content},),
        images=tuple(
            ImageRef(f"{where}: images[{i}]", data=png(10 * seed + i)) for i in range(num_images)
        ),
        boxes=tuple(boxes),
        box_images=(0,) * len(boxes) if box_images is None else box_images,
        response=response_template(len(boxes), answer) if response is None else response,
        has_answer=answer is not None,
        answer=answer or "",
        data_source="test",
        where=where,
    )


def examples(num: int, unlabelled_every: int | None = 3) -> list[LvrExample]:
    """Rows of different lengths: one or two tokens a span, every third without an answer."""
    rows = []
    for seed in range(num):
        no_answer = (
            unlabelled_every is not None and seed % unlabelled_every == unlabelled_every - 1
        )
        right = 0.3 if seed % 2 else 0.6  # one token, or two
        rows.append(
            example(
                seed,
                boxes=((0.0, 0.0, right, 0.4),),
                answer=None if no_answer else ANSWERS[seed % 3],
                question=f"read {COLORS[seed % 3]} ?",
            )
        )
    return rows


def latent_model(name: str = "qwen2_5_vl", case: Case | None = None, **config) -> LatentModel:
    """A case of its own as SFT loads it; `end=True` gives it the end vector."""
    case = case or build_case(name)
    if config.pop("end", False):
        config |= dict(
            latent_end_token="<|lvr_latent_end|>",
            latent_end_id=case.token_id("<|lvr_latent_end|>"),
        )
    savable = config.pop("savable", False)
    config = case.mechanism(**config)
    if savable:
        case.model.lm_head.bias = None  # a test's own, which no architecture has
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config.attach(case.model)
    return LatentModel(case.model, case.tokenizer, case.processor, config, (case.eos_id,))


def encoder(
    latent: LatentModel, has_end_vector: bool = False, max_length: int | None = None
) -> LVREncoder:
    vision = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    return LVREncoder(
        tokenizer=latent.tokenizer,
        processor=latent.processor,
        mechanism=latent.mechanism,
        eos_id=latent.tokenizer.eos_token_id,
        vision_ids=frozenset(latent.tokenizer.convert_tokens_to_ids(list(vision))),
        backbone=ModelAdapter(latent.model).backbone,
        has_end_vector=has_end_vector,
        max_length=max_length,
    )


def batch_of(
    latent: LatentModel, rows: list[LvrExample], has_end_vector: bool = False
) -> dict[str, torch.Tensor]:
    encode = encoder(latent, has_end_vector)
    return collate_rows([encode(row) for row in rows])


def cpu_arguments(folder, **values) -> TrainingArguments:
    """Arguments of a short run on the CPU that logs each step and saves every second."""
    common = dict(
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
    )
    return TrainingArguments(str(folder), **common | values)


def trainer(
    latent: LatentModel,
    rows: list[LvrExample],
    output_dir,
    loss: LVRLossConfig | None = None,
    frozen: bool = True,
    **options,
) -> LVRTrainer:
    """A trainer with SGD by default, so that parameters show gradients."""
    own = ("labelled_per_batch", "horizon_steps", "vision_cache_bytes", "callbacks")
    kwargs = {name: options.pop(name) for name in own if name in options}
    values = dict(
        output_dir=str(output_dir),
        per_device_train_batch_size=4,
        max_steps=2,
        learning_rate=1e-2,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    if frozen:
        freeze_vision(latent.model)
    loss = loss or LVRLossConfig()
    dataset = SFTDataset(rows, encoder(latent, loss.end == "latent_end"))
    return LVRTrainer(latent, TrainingArguments(**values | options), dataset, loss, **kwargs)


def train(tmp_path, rows=None, latent: LatentModel | None = None, **options) -> LVRTrainer:
    """`trainer`, run to its end."""
    run = trainer(
        latent or latent_model(NAME, head="mlp"), rows or examples(8), tmp_path, **options
    )
    run.train()
    run.release()
    return run


def state(model) -> dict[str, torch.Tensor]:
    """A copy of the model's tensors."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
