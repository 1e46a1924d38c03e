"""Tiny Qwen and Chameleon models built from config, with tokenizer and real image processor.

For tests and for the embedded experiment. Nothing is downloaded. One user message becomes

    <|im_start|> read red ? <|vision_start|> <|image_pad|> x n <|vision_end|> <|im_end|>

in the order of its content; the assistant has no header (a generation prompt adds nothing, each
token costs time), and its message is its content followed by `<|im_end|>`, the EOS token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

from grpo_latent.backbones.chameleon import DELIMITERS
from grpo_latent.backbones.qwen2_5_vl import Qwen2_5_VLProcessor
from grpo_latent.backbones.qwen2_vl import Qwen2VLProcessor
from grpo_latent.backbones.qwen3_vl import Qwen3VLProcessor
from grpo_latent.backbones.qwen_vl import QwenImagesOnly, build_qwen_processor
from grpo_latent.latent.mechanisms import LVR

QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
ANSWER_TOKENS = ("<answer>", "</answer>")
LVR_TOKENS = tuple(LVR.published_tokens.values())
UNKNOWN_TOKEN = "<unk>"
NUMBERS = tuple(str(number) for number in range(19))

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role != 'assistant' -%}{{- '<|im_start|>' -}}{%- endif -%}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part.type == 'text' -%}{{- part.text -}}
{%- else -%}\
{{- raise_exception('content type ' ~ part.type ~ ': expected image, video or text') -}}\
{%- endif -%}
{%- endfor -%}{%- endif -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
"""


@dataclass(frozen=True)
class TinySizes:
    """Sizes of a tiny model. An image of `vision_window` pixels a side is one attention window.

    `mrope_section` follows from the head size; see `mrope_section`.
    """

    hidden: int = 32
    layers: int = 2
    heads: int = 2
    kv_heads: int = 1
    intermediate: int = 64
    tied: bool = False
    vision_hidden: int = 32
    vision_depth: int = 2
    vision_heads: int = 2
    vision_intermediate: int = 64
    patch: int = 7
    merge: int = 2
    temporal: int = 2
    vision_window: int = 112
    max_positions: int = 512


UNIT_SIZES = TinySizes()
EXPERIMENT_SIZES = TinySizes(
    hidden=128,
    layers=4,
    heads=4,
    kv_heads=2,
    intermediate=384,
    vision_hidden=96,
    vision_heads=4,
    vision_intermediate=192,
)


class TinyModel(NamedTuple):
    """`processor` is None for text-only models."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    processor: ProcessorMixin | None


def word_tokenizer(
    words: Sequence[str] = (), latent_tokens: Sequence[str] = LVR_TOKENS
) -> PreTrainedTokenizerFast:
    """A tokenizer with one id a word.

    Special tokens come first, then `<answer>`, `</answer>`, 0..18 and `words`. Text splits at
    whitespace and at special and answer tokens; decoding joins with one space, so that
    `decode(encode(text)) == text` for space-separated known words. Other words become `<unk>`.

    Args:
        latent_tokens: special tokens of the latent mechanism; `()` gives the tokenizer of a model
            before SFT.

    >>> tokenizer = word_tokenizer(["read", "?"])
    >>> tokenizer.decode(tokenizer("read ?<answer>7</answer><|im_end|>").input_ids)
    'read ? <answer> 7 </answer> <|im_end|>'
    """
    special = (*QWEN_TOKENS, *latent_tokens, UNKNOWN_TOKEN)
    vocab = {
        token: idx
        for idx, token in enumerate(dict.fromkeys((*special, *ANSWER_TOKENS, *NUMBERS, *words)))
    }
    backend = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN_TOKEN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    # not special: a reward must see them whatever skip_special_tokens says
    backend.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in ANSWER_TOKENS]
    )
    named = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "unk_token": UNKNOWN_TOKEN}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **named,
        extra_special_tokens=[token for token in special if token not in named.values()],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        model_max_length=TinySizes.max_positions,
    )


def mrope_section(head_dim: int) -> list[int]:
    """Rotary frequencies of (time, height, width): half the head, as [4, 6, 6] at head size 32.

    >>> mrope_section(32), mrope_section(16)
    ([4, 6, 6], [2, 3, 3])
    """
    half = head_dim // 2
    side = (half - half // 4) // 2
    return [half - 2 * side, side, side]


def tiny_qwen2_5_vl(
    words: Sequence[str] = (),
    sizes: TinySizes = UNIT_SIZES,
    seed: int = 0,
    latent_tokens: Sequence[str] = LVR_TOKENS,
) -> TinyModel:
    """Qwen2.5-VL with random weights; float32, on the CPU, in eval mode.

    Args:
        words: added to the vocabulary.
        sizes: `EXPERIMENT_SIZES` is the embedded experiment's model.
        seed: of the weights; the global generator is left as it was.
    """
    vision = dict(
        depth=sizes.vision_depth,
        hidden_size=sizes.vision_hidden,
        intermediate_size=sizes.vision_intermediate,
        num_heads=sizes.vision_heads,
        window_size=sizes.vision_window,
        out_hidden_size=sizes.hidden,
        fullatt_block_indexes=list(range(sizes.vision_depth)),
    )
    return _tiny_vl(Qwen2_5_VLProcessor, "Qwen2_5_VL", vision, words, sizes, seed, latent_tokens)


def tiny_qwen2_vl(
    words: Sequence[str] = (),
    sizes: TinySizes = UNIT_SIZES,
    seed: int = 0,
    latent_tokens: Sequence[str] = LVR_TOKENS,
) -> TinyModel:
    """Qwen2-VL; arguments as `tiny_qwen2_5_vl`."""
    vision = dict(
        depth=sizes.vision_depth,
        embed_dim=sizes.vision_hidden,
        hidden_size=sizes.hidden,
        mlp_ratio=sizes.vision_intermediate // sizes.vision_hidden,
        num_heads=sizes.vision_heads,
    )
    return _tiny_vl(Qwen2VLProcessor, "Qwen2VL", vision, words, sizes, seed, latent_tokens)


def tiny_qwen3_vl(
    words: Sequence[str] = (),
    sizes: TinySizes = UNIT_SIZES,
    seed: int = 0,
    latent_tokens: Sequence[str] = LVR_TOKENS,
) -> TinyModel:
    """Qwen3-VL, deepstack from its first vision block; arguments as `tiny_qwen2_5_vl`."""
    vision = dict(
        depth=sizes.vision_depth,
        hidden_size=sizes.vision_hidden,
        intermediate_size=sizes.vision_intermediate,
        num_heads=sizes.vision_heads,
        out_hidden_size=sizes.hidden,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0],
    )
    return _tiny_vl(Qwen3VLProcessor, "Qwen3VL", vision, words, sizes, seed, latent_tokens)


def tiny_qwen2(
    words: Sequence[str] = (),
    sizes: TinySizes = UNIT_SIZES,
    seed: int = 0,
    latent_tokens: Sequence[str] = LVR_TOKENS,
) -> TinyModel:
    """Qwen2, text only; arguments as `tiny_qwen2_5_vl`.

    `AutoTokenizer` forces its byte-level tokenizer on folders of this model type, whatever they
    say; where a saved folder must load, use `tiny_qwen3`.
    """
    return _tiny_text("Qwen2", words, sizes, seed, latent_tokens)


def tiny_qwen3(
    words: Sequence[str] = (),
    sizes: TinySizes = UNIT_SIZES,
    seed: int = 0,
    latent_tokens: Sequence[str] = LVR_TOKENS,
) -> TinyModel:
    """Qwen3, text only; arguments as `tiny_qwen2_5_vl`."""
    return _tiny_text("Qwen3", words, sizes, seed, latent_tokens)


CHAMELEON_CODES = 16  # entries of the code book
CHAMELEON_SIDE = 16  # pixels of an image, which has 4 x 4 tokens


def tiny_chameleon(
    words: Sequence[str] = (),
    sizes: TinySizes = UNIT_SIZES,
    seed: int = 0,
    latent_tokens: Sequence[str] = LVR_TOKENS,
) -> TinyModel:
    """Chameleon, with a VQ model of random weights; arguments as `tiny_qwen2_5_vl`.

    An image is 16 discrete tokens.
    """
    codes = [
        f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(code))}Z"
        for code in range(CHAMELEON_CODES)
    ]
    image_tokens = ("<image>", *DELIMITERS, *codes)
    tokenizer = word_tokenizer(words, (*latent_tokens, *image_tokens))
    tokenizer.sep_token = "<|im_end|>"  # the processor puts it behind the prompt
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "<|vision_start|><|image_pad|><|vision_end|>", "<image>"
    )
    text = _text_config(tokenizer, sizes)
    del text["head_dim"]
    vq = dict(
        base_channels=32,
        channel_multiplier=[1, 1, 1],
        num_res_blocks=1,
        embed_dim=8,
        latent_channels=8,
    )
    config = transformers.ChameleonConfig(
        **text | dict(num_key_value_heads=sizes.heads),  # its QK norms know no groups
        vq_config=vq | dict(num_embeddings=CHAMELEON_CODES, resolution=CHAMELEON_SIDE),
        vocabulary_map={token: tokenizer.convert_tokens_to_ids(token) for token in image_tokens},
    )
    side = {"height": CHAMELEON_SIDE, "width": CHAMELEON_SIDE}
    image_processor = ChameleonImageProcessorPil(
        size={"shortest_edge": CHAMELEON_SIDE}, crop_size=side
    )
    num_tokens = (CHAMELEON_SIDE // 4) ** 2
    processor = transformers.ChameleonProcessor(
        image_processor, tokenizer, image_seq_length=num_tokens
    )
    return TinyModel(
        _build(transformers.ChameleonForConditionalGeneration, config, seed), tokenizer, processor
    )


def _tiny_text(
    name: str, words: Sequence[str], sizes: TinySizes, seed: int, latent_tokens: Sequence[str]
) -> TinyModel:
    tokenizer = word_tokenizer(words, latent_tokens)
    config = getattr(transformers, f"{name}Config")(**_text_config(tokenizer, sizes))
    return TinyModel(
        _build(getattr(transformers, f"{name}ForCausalLM"), config, seed), tokenizer, None
    )


def _tiny_vl(
    processor_class: type[QwenImagesOnly],
    name: str,
    vision: dict,
    words: Sequence[str],
    sizes: TinySizes,
    seed: int,
    latent_tokens: Sequence[str],
) -> TinyModel:
    tokenizer = word_tokenizer(words, latent_tokens)
    text = _text_config(tokenizer, sizes)
    text["rope_parameters"]["mrope_section"] = mrope_section(text["head_dim"])
    if name == "Qwen3VL":
        # as published; vLLM reads it, Hugging Face assumes it
        text["rope_parameters"]["mrope_interleaved"] = True
    else:
        del text["head_dim"]  # the older text configs derive it
    geometry = dict(
        patch_size=sizes.patch, spatial_merge_size=sizes.merge, temporal_patch_size=sizes.temporal
    )
    vision_tokens = ("image_pad", "video_pad", "vision_start", "vision_end")
    config = getattr(transformers, f"{name}Config")(
        text_config=text,
        vision_config={**vision, **geometry},
        tie_word_embeddings=sizes.tied,
        **{
            f"{token.removesuffix('_pad')}_token_id": tokenizer.convert_tokens_to_ids(
                f"<|{token}|>"
            )
            for token in vision_tokens
        },
    )
    processor = build_qwen_processor(
        processor_class,
        tokenizer,
        patch_size=sizes.patch,
        merge_size=sizes.merge,
        temporal_patch_size=sizes.temporal,
    )
    model = _build(getattr(transformers, f"{name}ForConditionalGeneration"), config, seed)
    return TinyModel(model, tokenizer, processor)


def _text_config(tokenizer: PreTrainedTokenizerFast, sizes: TinySizes) -> dict:
    return dict(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.hidden // sizes.heads,
        max_position_embeddings=sizes.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=sizes.tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _build(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int
) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    model.generation_config.eos_token_id = config.get_text_config().eos_token_id
    model.generation_config.pad_token_id = config.get_text_config().pad_token_id
    return model.eval()
