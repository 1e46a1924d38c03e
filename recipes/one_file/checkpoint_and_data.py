"""What latent_grpo.py starts from: an SFT checkpoint and questions, as recipes/quickstart makes them.

Legend: B questions, P positions of each (words are tokens, so all have one length), T with the room
for a completion, H hidden size.
"""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from pathlib import Path

import pyarrow.parquet as pq
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import pad
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

PAD, PROMPT, IMAGE, EDGE = range(4)  # what a prompt's position is; EDGE: delimiters of the image


def load_checkpoint(folder: Path, dtype: torch.dtype = torch.float32):
    """Model, LVR's head, tokenizer and latent_config.json of a folder of `grpo_latent.sft`.

    latent_config.json has the ids of the span's tokens, steps a span, spans a completion.
    """
    transformers.logging.set_verbosity_error()  # the stock class does not know the head's weights
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    model.model.visual.requires_grad_(False)  # so that an image is encoded once in all
    size = model.config.get_text_config().hidden_size
    mlp = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, size))
    head = nn.Sequential(OrderedDict(ln_q=nn.LayerNorm(size, eps=1e-6), mlp=mlp))
    weights = load_file(folder / "model.safetensors")
    own = {name: weight for name, weight in weights.items() if name.startswith("lvr_head.")}
    head.load_state_dict({name.removeprefix("lvr_head."): own[name] for name in own})
    spans = json.loads((folder / "latent_config.json").read_text())
    expected = {"head": "mlp", "exit": "steps", "visibility": "latents_only"}
    got = {name: spans[name] for name in expected}
    if got != expected:
        raise ValueError(f"{folder}/latent_config.json: got {got}; expected {expected}")
    return model, head.to(dtype), transformers.AutoTokenizer.from_pretrained(folder), spans


@torch.no_grad()
def read_questions(policy, folder: Path, file: Path, num_new: int):
    """Ids and kinds [B, T], positions [3, B, T], what is fed at image tokens [B, T, H], answers.

    Args:
        policy: its model makes positions and image embeddings.
        folder: the checkpoint, for its image processor.
        file: parquet of verl's schema, one `<image>` at the end of each question.
        num_new: T - P; these positions count on as text.
    """
    config, base, tokenizer = policy.model.config, policy.model.model, policy.tokenizer
    rows = pq.read_table(file).to_pylist()
    images = [Image.open(io.BytesIO(row["images"][0]["bytes"])).convert("RGB") for row in rows]
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)  # needs no torchvision
    pixels = image_processor(images=images, return_tensors="pt")
    grid_B3 = pixels["image_grid_thw"]
    features = base.get_image_features(pixels["pixel_values"], grid_B3).pooler_output
    texts = []
    for row, feature_IH in zip(rows, features, strict=True):
        question = row["prompt"][0]["content"].removesuffix("<image>")
        content = [{"type": "text", "text": question}, {"type": "image"}]
        chat = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        texts.append(text.replace("<|image_pad|>", "<|image_pad|>" * len(feature_IH)))
    ids_BP = tokenizer(texts, add_special_tokens=False, return_tensors="pt").input_ids
    kinds_BP = torch.full_like(ids_BP, PROMPT)
    kinds_BP[ids_BP == config.image_token_id] = IMAGE
    kinds_BP[ids_BP == config.vision_start_token_id] = EDGE
    kinds_BP[ids_BP == config.vision_end_token_id] = EDGE
    is_image_BP = kinds_BP == IMAGE
    positions_3BP, _ = base.get_rope_index(ids_BP, is_image_BP.int(), grid_B3)
    new_C = torch.arange(1, num_new + 1)
    new_3BC = (positions_3BP.amax((0, 2))[:, None] + new_C).expand(3, -1, -1)
    vectors_BPH = torch.zeros(*ids_BP.shape, features[0].shape[1], dtype=policy.model.dtype)
    vectors_BPH[is_image_BP] = torch.cat(features)
    return (
        pad(ids_BP, (0, num_new)),
        pad(kinds_BP, (0, num_new), value=PAD),
        torch.cat([positions_3BP, new_3BC], 2),
        pad(vectors_BPH, (0, 0, 0, num_new)),
        [row["reward_model"]["ground_truth"] for row in rows],
    )
