"""Prompts: their length without pixels equals the processor's own, and what no prompt may hold."""

import numpy as np
import pytest
import torch
from internvl_case import tiny_internvl
from PIL import Image

from grpo_latent.errors import CheckpointError, DataError
from grpo_latent.models import tiny
from grpo_latent.models.prompts import PromptLength, encode_prompt

WORDS = ("read", "red", "?")
BUILDERS = {
    "qwen2_vl": tiny.tiny_qwen2_vl,
    "qwen2_5_vl": tiny.tiny_qwen2_5_vl,
    "qwen3_vl": tiny.tiny_qwen3_vl,
    "chameleon": tiny.tiny_chameleon,
    "internvl": tiny_internvl,
}
SIZES = [(), ((56, 56),), ((70, 28), (100, 30)), ((28, 196), (33, 47), (112, 168))]


def messages_of(num_images, text="read red ?"):
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module", params=BUILDERS)
def model(request):
    return BUILDERS[request.param](WORDS)


def test_length_without_pixels_is_the_processors(model):
    _, tokenizer, processor = model
    length = PromptLength(tokenizer, processor)
    for sizes in SIZES:
        images = [Image.new("RGB", size[::-1]) for size in sizes]
        prompt = encode_prompt(tokenizer, processor, messages_of(len(sizes)), images, "row 0")
        assert length(messages_of(len(sizes)), sizes, "row 0") == len(prompt.ids), sizes


def test_length_of_a_text_models_prompt():
    _, tokenizer, _ = tiny.tiny_qwen3(WORDS)
    prompt = encode_prompt(tokenizer, None, messages_of(0), [], "row 0")
    assert PromptLength(tokenizer, None)(messages_of(0), (), "row 0") == len(prompt.ids)


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>"])
def test_a_text_that_spells_an_images_token_is_refused(token):
    """transformers ends in an empty StopIteration."""
    _, tokenizer, processor = tiny.tiny_qwen2_5_vl(WORDS)
    messages = messages_of(1, f"what is {token} ?")
    with pytest.raises(DataError, match="rows.parquet row 3: a text spells a token") as caught:
        encode_prompt(
            tokenizer, processor, messages, [Image.new("RGB", (28, 28))], "rows.parquet row 3"
        )
    assert token in caught.value.got
    with pytest.raises(DataError, match="a text spells a token"):
        PromptLength(tokenizer, processor)(messages, [(28, 28)], "rows.parquet row 3")


def test_extreme_proportions_are_refused():
    """transformers raises a bare ValueError above 200 : 1."""
    _, tokenizer, processor = tiny.tiny_qwen2_5_vl(WORDS)
    with pytest.raises(DataError, match="row 3: .*refuses the prompt.*aspect ratio.*1, 300"):
        encode_prompt(tokenizer, processor, messages_of(1), [Image.new("RGB", (300, 1))], "row 3")
    with pytest.raises(DataError, match="row 3: .*refuses the prompt.*aspect ratio.*1, 300"):
        PromptLength(tokenizer, processor)(messages_of(1), [(1, 300)], "row 3")


def test_no_chat_template_is_said():
    _, tokenizer, processor = tiny.tiny_qwen2_5_vl(WORDS)
    tokenizer.chat_template = processor.chat_template = None
    with pytest.raises(CheckpointError, match="no chat template"):
        encode_prompt(tokenizer, processor, messages_of(0), [], "row 3")


def test_pictures_are_made_rgb_whoever_asks():
    """A transparent picture is over white for callers that pass pictures of their own, too."""
    _, tokenizer, processor = tiny.tiny_qwen2_5_vl(WORDS)
    clear = Image.new("RGBA", (28, 28), (0, 0, 0, 0))
    deep = Image.fromarray(np.full((28, 28), 65535, np.uint16))
    white = Image.new("RGB", (28, 28), (255, 255, 255))
    pixels = [
        encode_prompt(tokenizer, processor, messages_of(1), [image], "row 0").images.pixel_values
        for image in (clear, deep, white)
    ]
    assert torch.equal(pixels[0], pixels[2]) and torch.equal(pixels[1], pixels[2])
