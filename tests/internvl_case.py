"""A tiny InternVL built from config, with its tokenizer, template and image processor.

A tile has 4 x 4 tokens.
"""

from __future__ import annotations

import torch
import transformers
from transformers import PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from grpo_latent.models import tiny
from grpo_latent.models.tiny import LVR_TOKENS

TILE, PATCH, TOKENS_OF_TILE = 56, 7, 16
IMAGE_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def tiny_internvl(
    words=(), sizes: tiny.TinySizes = tiny.UNIT_SIZES, seed: int = 0, latent_tokens=LVR_TOKENS
) -> tiny.TinyModel:
    """InternVL3 over Qwen3, random weights; arguments as those of `models.tiny`."""
    tokenizer = tokenizer_of(words, latent_tokens)
    config = transformers.InternVLConfig(
        text_config={"model_type": "qwen3", **tiny._text_config(tokenizer, sizes)},
        vision_config=dict(
            hidden_size=sizes.vision_hidden,
            intermediate_size=sizes.vision_intermediate,
            num_hidden_layers=sizes.vision_depth,
            num_attention_heads=sizes.vision_heads,
            image_size=TILE,
            patch_size=PATCH,
        ),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=TOKENS_OF_TILE,
        tie_word_embeddings=sizes.tied,
    )
    model = tiny._build(transformers.InternVLForConditionalGeneration, config, seed)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        for parameter in model.model.vision_tower.embeddings.parameters():
            parameter.normal_(std=0.02)  # a fresh model's position embeddings are 0
    image_processor = GotOcr2ImageProcessorPil(size={"height": TILE, "width": TILE}, max_patches=4)
    processor_class = transformers.models.internvl.InternVLProcessor
    video = {}
    if transformers.utils.is_torchvision_available():
        video = {"video_processor": transformers.InternVLVideoProcessor()}
    processor = processor_class(
        image_processor,
        tokenizer,
        image_seq_length=TOKENS_OF_TILE,
        chat_template=tokenizer.chat_template,
        **video,
    )
    return tiny.TinyModel(model, tokenizer, processor)


def tokenizer_of(words, latent_tokens) -> PreTrainedTokenizerFast:
    plain = tiny.word_tokenizer(words, (*latent_tokens, *IMAGE_TOKENS.values()))
    return PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        pad_token=plain.pad_token,
        eos_token=plain.eos_token,
        unk_token=plain.unk_token,
        extra_special_tokens=IMAGE_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=tiny.CHAT_TEMPLATE.replace(
            "<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>"
        ),
        model_max_length=plain.model_max_length,
    )
