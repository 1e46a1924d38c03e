"""Tiny models: prompt layout, tokenizer fidelity, save and load, images-only processors."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.utils import is_torchvision_available

from grpo_latent.errors import DataError
from grpo_latent.models import tiny

WORDS = ("read", "red", "blue", "?")
VL_BUILDERS = {
    "qwen2_5_vl": tiny.tiny_qwen2_5_vl,
    "qwen2_vl": tiny.tiny_qwen2_vl,
    "qwen3_vl": tiny.tiny_qwen3_vl,
}
# the stock classes' names, which saved folders and verl know
PROCESSOR_NAMES = {
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
}
TEXT_BUILDERS = {"qwen2": tiny.tiny_qwen2, "qwen3": tiny.tiny_qwen3}


@pytest.fixture(scope="module", params=VL_BUILDERS)
def vl(request):
    return request.param, VL_BUILDERS[request.param](WORDS, seed=3)


def random_image(height=56, width=56, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def messages(*parts):
    return [{"role": "user", "content": list(parts)}]


TEXT = {"type": "text", "text": "read red ?"}
IMAGE = {"type": "image"}


def test_decode_of_encode_is_the_text():
    tokenizer = tiny.word_tokenizer(WORDS)
    text = (
        "<|im_start|> read red ? <|lvr_start|> <|lvr|> <|lvr_end|> "
        "<answer> 18 </answer> <|im_end|>"
    )
    ids = tokenizer(text).input_ids
    assert len(ids) == 11
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "read red ? <answer> 18 </answer>"
    assert tokenizer("<answer>7</answer>").input_ids == tokenizer("<answer> 7 </answer>").input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer("unheard").input_ids == [tokenizer.unk_token_id]


def test_tokenizer_ids_are_dense_and_named():
    tokenizer = tiny.word_tokenizer(("read", "7", "read"))
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert set(tiny.LVR_TOKENS) <= set(tokenizer.all_special_tokens)
    assert not set(tiny.ANSWER_TOKENS) & set(tokenizer.all_special_tokens)
    assert set(tiny.LVR_TOKENS).isdisjoint(tiny.word_tokenizer(latent_tokens=()).get_vocab())


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((TEXT, IMAGE), "<|im_start|> read red ? {image} <|im_end|>"),
        ((IMAGE, TEXT), "<|im_start|> {image} read red ? <|im_end|>"),
        ((IMAGE, TEXT, IMAGE), "<|im_start|> {image} read red ? {image} <|im_end|>"),
    ],
)
def test_prompt_layout_follows_the_content(parts, expected):
    _, tokenizer, processor = tiny.tiny_qwen2_5_vl(WORDS)
    num_images = sum(part["type"] == "image" for part in parts)
    text = processor.apply_chat_template(
        messages(*parts), add_generation_prompt=True, tokenize=False
    )
    batch = processor(text=[text], images=[random_image()] * num_images, return_tensors="pt")
    image = " ".join(["<|vision_start|>", *["<|image_pad|>"] * 16, "<|vision_end|>"])
    assert tokenizer.decode(batch["input_ids"][0]) == expected.format(image=image)


def test_response_follows_the_prompt_and_ends_with_eos():
    tokenizer = tiny.word_tokenizer(WORDS)
    prompt = [{"role": "user", "content": "read red ?"}]
    response = {
        "role": "assistant",
        "content": "<|lvr_start|> <|lvr|> <|lvr_end|> <answer> 7 </answer>",
    }
    prompt_text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    whole_text = tokenizer.apply_chat_template([*prompt, response], tokenize=False)
    assert whole_text == prompt_text + response["content"] + tokenizer.eos_token


def test_unknown_content_type_is_refused():
    with pytest.raises(Exception, match="content type audio"):
        tiny.word_tokenizer().apply_chat_template(messages({"type": "audio"}), tokenize=False)


def test_vl_model_round_trip(vl, tmp_path):
    model_type, (model, tokenizer, processor) = vl
    image = random_image()
    text = processor.apply_chat_template(messages(TEXT, IMAGE), tokenize=False)
    batch = processor(text=[text], images=[image], return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
        other = model(
            **processor(text=[text], images=[random_image(seed=1)], return_tensors="pt")
        ).logits
    assert logits.shape == (1, 23, len(tokenizer)) and logits.dtype == torch.float32
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    tied = VL_BUILDERS[model_type](WORDS, tiny.TinySizes(tied=True)).model
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert not torch.allclose(logits[:, -1], other[:, -1]), "the last position must see the image"

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded).__name__ == type(processor).__name__ == PROCESSOR_NAMES[model_type]
    reloaded = loaded(text=[text], images=[image], return_tensors="pt")
    assert set(reloaded) == set(batch)
    for name in (
        batch
    ):  # where torchvision is installed, the loaded image processor is another implementation
        torch.testing.assert_close(reloaded[name], batch[name], rtol=0, atol=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == processor.chat_template
    with torch.no_grad():
        assert torch.equal(
            AutoModelForImageTextToText.from_pretrained(tmp_path)(**batch).logits, logits
        )


@pytest.mark.parametrize("name", TEXT_BUILDERS)
def test_text_models_are_causal(name):
    model, tokenizer, processor = TEXT_BUILDERS[name](WORDS)
    assert processor is None
    ids = tokenizer("read red ? 7", return_tensors="pt").input_ids
    with torch.no_grad():
        whole, part = model(ids).logits, model(ids[:, :2]).logits
    torch.testing.assert_close(whole[:, :2], part)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    tied = TEXT_BUILDERS[name](WORDS, tiny.TinySizes(tied=True)).model
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert not torch.allclose(whole[:, 0], whole[:, 1])


def test_seed_fixes_weights_and_leaves_the_global_generator():
    torch.manual_seed(5)
    expected_draw = torch.rand(3)
    torch.manual_seed(5)
    first, second, third = (tiny.tiny_qwen2_5_vl(WORDS, seed=seed).model for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected_draw)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, third.lm_head.weight)
    assert first.generation_config.eos_token_id == 2


def test_experiment_sizes_give_the_notes_model():
    model, _, processor = tiny.tiny_qwen2_5_vl(WORDS, tiny.EXPERIMENT_SIZES)
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_key_value_heads) == (128, 4, 2)
    assert text.rope_parameters["mrope_section"] == [4, 6, 6]
    assert (vision.hidden_size, vision.depth, vision.num_heads, vision.patch_size) == (96, 2, 4, 7)
    assert 1.1e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.3e6
    assert processor.image_processor.patch_size == 7


def test_pixel_values_are_the_normalised_patches():
    """Against a loop over merged tokens; no resizing happens at 56 x 28."""
    processor = tiny.tiny_qwen2_5_vl(WORDS).processor
    image = random_image(height=56, width=28)
    batch = processor(text=["<|image_pad|>"], images=[image], return_tensors="pt")
    assert batch["image_grid_thw"].tolist() == [[1, 8, 4]] and batch["input_ids"].shape == (1, 8)
    image_processor = processor.image_processor
    pixels = (np.asarray(image) / 255 - image_processor.image_mean) / image_processor.image_std
    expected = []
    for token_row, token_column in np.ndindex(4, 2):
        for patch_row, patch_column in np.ndindex(2, 2):
            top, left = token_row * 14 + patch_row * 7, token_column * 14 + patch_column * 7
            patch = pixels[top : top + 7, left : left + 7].transpose(2, 0, 1)
            expected.append(np.stack([patch, patch], axis=1).ravel())
    np.testing.assert_allclose(batch["pixel_values"].numpy(), np.stack(expected), atol=1e-5)


@pytest.mark.skipif(
    is_torchvision_available(), reason="torchvision is installed: stock processors in use"
)
class TestImagesOnly:
    def test_a_video_is_an_error(self, vl):
        processor = vl[1].processor
        with pytest.raises(DataError, match="1 video.*Install torchvision"):
            processor(text=["read"], videos=[np.zeros((4, 56, 56, 3), dtype=np.uint8)])
        assert (
            processor(text=["read"], videos=None)["input_ids"]
            == processor(text=["read"])["input_ids"]
        )

    def test_saved_folder_is_complete_for_the_stock_processor(self, vl, tmp_path):
        model_type, (_, _, processor) = vl
        processor.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "processor_config.json").read_text())
        assert saved["processor_class"] == PROCESSOR_NAMES[model_type]
        assert saved["image_processor"]["image_processor_type"] == "Qwen2VLImageProcessor"
        video_type = (
            "Qwen3VLVideoProcessor" if model_type == "qwen3_vl" else "Qwen2VLVideoProcessor"
        )
        assert saved["video_processor"]["video_processor_type"] == video_type
        assert saved["video_processor"]["patch_size"] == 7

    def test_a_loaded_video_config_is_kept(self, tmp_path):
        tiny.tiny_qwen2_5_vl(WORDS).processor.save_pretrained(tmp_path)
        path = tmp_path / "processor_config.json"
        saved = json.loads(path.read_text())
        saved["video_processor"]["max_frames"] = 99
        path.write_text(json.dumps(saved))
        AutoProcessor.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
        again = json.loads((tmp_path / "again" / "processor_config.json").read_text())
        assert again["video_processor"] == saved["video_processor"]
        assert again == saved
