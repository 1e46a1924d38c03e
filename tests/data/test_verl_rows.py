"""The embedded task's files and the tiny model's processor in verl's own data path."""

import asyncio
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("verl")

from omegaconf import OmegaConf  # noqa: E402
from verl.experimental.agent_loop.agent_loop import AgentLoopWorker  # noqa: E402
from verl.utils.dataset.rl_dataset import get_dataset_class  # noqa: E402
from verl.utils.tokenizer import (  # noqa: E402
    build_multimodal_processor_inputs,
    get_processor_token_id,
    hf_processor,
    hf_tokenizer,
)

from grpo_latent.data.embedded import digits  # noqa: E402
from grpo_latent.data.rows import verl_row, write_verl_parquet  # noqa: E402
from grpo_latent.errors import DataError  # noqa: E402
from grpo_latent.models import tiny  # noqa: E402

BUILDERS = {
    "qwen2_5_vl": tiny.tiny_qwen2_5_vl,
    "qwen2_vl": tiny.tiny_qwen2_vl,
    "qwen3_vl": tiny.tiny_qwen3_vl,
}


@pytest.fixture(scope="module", params=BUILDERS)
def loaded(request, tmp_path_factory):
    """(model, tokenizer, processor), the last two as verl loads them from a saved folder."""
    folder = str(tmp_path_factory.mktemp(request.param))
    model, _, processor = BUILDERS[request.param](digits.WORDS)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # verl turns a failure into a warning and None
        return model, hf_tokenizer(folder), hf_processor(folder)


@pytest.fixture(scope="module")
def dataset_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    digits.main(["--out", str(folder), "--sft", "1", "--rl", "6", "--dev", "1", "--heldout", "1"])
    return str(folder / "train_rl.parquet")


def dataset_class():
    name = {"path": "pkg://grpo_latent.verl_plugin.trainer.dataset", "name": "LatentDataset"}
    return get_dataset_class(OmegaConf.create({"custom_cls": name}))


def prompt_batch(processor, row):
    """What verl's single-turn agent loop makes of a dataset row."""
    messages = row["raw_prompt"]
    patch_size = processor.image_processor.patch_size
    images, videos, _ = asyncio.run(
        dataset_class().process_multi_modal_info(
            messages, image_patch_size=patch_size, config=OmegaConf.create({})
        )
    )
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return images, build_multimodal_processor_inputs(
        processor, text=[text], images=images, videos=videos
    )


def test_dataset_rows_become_prompts(loaded, dataset_file):
    _, tokenizer, processor = loaded
    config = OmegaConf.create({"max_prompt_length": 23, "filter_overlong_prompts": True})
    dataset = dataset_class()(dataset_file, tokenizer, config, processor)
    assert len(dataset) == 6, "prompts have exactly 23 tokens, so none is filtered at 23"
    expected = digits.generate(6, stream="rl", seed=0)
    for index in range(6):
        row = dataset[index]
        images, batch = prompt_batch(processor, row)
        assert np.array_equal(np.asarray(images[0]), expected[index].image), (
            "no resizing on the way"
        )
        words = tokenizer.decode(batch["input_ids"][0]).split()
        assert len(words) == 23 and " ".join(words[1:4]) == expected[index].question
        assert (
            row["reward_model"]["ground_truth"] == expected[index].answer and row["index"] == index
        )
        assert batch["image_grid_thw"].tolist() == [[1, 8, 8]]


def test_token_ids_and_positions(loaded, dataset_file):
    """verl's position ids of the agent loop equal the model's own, completion included."""
    model, tokenizer, processor = loaded
    assert get_processor_token_id(processor, "image") == model.config.image_token_id
    assert get_processor_token_id(processor, "video") == model.config.video_token_id

    row = dataset_class()(dataset_file, tokenizer, OmegaConf.create({}), processor)[0]
    images, batch = prompt_batch(processor, row)
    completion = tokenizer(
        "<|lvr_start|> <|lvr|> <|lvr_end|> <answer> 7 </answer> <|im_end|>"
    ).input_ids
    input_ids = torch.cat([batch["input_ids"], torch.tensor([completion])], dim=1)
    worker = SimpleNamespace(
        processor=processor, tokenizer=tokenizer, _get_mm_processor_kwargs=lambda audios: {}
    )
    output = SimpleNamespace(multi_modal_data={"images": images}, mm_processor_kwargs=None)
    inputs = AgentLoopWorker._compute_multi_modal_inputs(worker, output, input_ids)
    assert torch.equal(inputs["pixel_values"], batch["pixel_values"])
    position_ids = AgentLoopWorker._compute_position_ids(
        worker, input_ids, torch.ones_like(input_ids), inputs
    )

    vision, _ = model.model.get_rope_index(
        input_ids,
        mm_token_type_ids=(input_ids == model.config.image_token_id).int(),
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=torch.ones_like(input_ids),
    )
    assert position_ids.shape == (1, 4, 30)
    assert torch.equal(position_ids[:, 1:], vision.transpose(0, 1))
    by_hand = torch.arange(4)
    assert torch.equal(position_ids[0, 2, 5:21], (5 + by_hand).repeat_interleave(4)), (
        "rows of the image"
    )
    assert torch.equal(position_ids[0, 3, 5:21], (5 + by_hand).repeat(4)), "columns of the image"
    assert position_ids[0, 1:, 21:].tolist() == [list(range(9, 18))] * 3, (
        "text goes on after the larger side"
    )


def test_text_models_load_without_a_processor(tmp_path):
    model, tokenizer, _ = tiny.tiny_qwen3(digits.WORDS)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert hf_processor(str(tmp_path)) is None
    loaded = hf_tokenizer(str(tmp_path))
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.decode(loaded("read red ?<|im_end|>").input_ids) == "read red ? <|im_end|>"


def test_an_image_with_other_proportions_counts_its_own_tokens(loaded):
    _, _, processor = loaded
    image = digits.generate(1, stream="rl", seed=0)[0].image[:28]
    content = [{"type": "image", "image": Image.fromarray(image)}]
    _, batch = prompt_batch(processor, {"raw_prompt": [{"role": "user", "content": content}]})
    assert batch["image_grid_thw"].tolist() == [[1, 4, 8]]
    assert int((batch["input_ids"] == get_processor_token_id(processor, "image")).sum()) == 8


def test_malformed_and_overlong_rows_stop_the_run(loaded, dataset_file, tmp_path):
    """verl's own filter prints the error of a row and drops it."""
    _, tokenizer, processor = loaded
    row = {"data_source": "digits", "answer": "7", "split": "rl", "images": [b"no image"]}
    path = str(tmp_path / "bad.parquet")
    good = digits.to_rows(digits.generate(2, stream="rl", seed=0), "rl")
    write_verl_parquet(path, [*good, verl_row(prompt="read red ?<image>", index=2, **row)])
    with pytest.raises(DataError, match="bad.parquet row 2: images.0.: not a readable image"):
        dataset_class()(path, tokenizer, OmegaConf.create({}), processor)
    with pytest.raises(DataError, match="max_prompt_length=22"):
        dataset_class()(
            dataset_file, tokenizer, OmegaConf.create({"max_prompt_length": 22}), processor
        )


def test_images_reach_the_processor_as_they_are(tmp_path):
    process = dataset_class().process_multi_modal_info
    image = Image.new("RGBA", (20, 30), (0, 0, 0, 0))
    image.save(tmp_path / "a.png")
    for source in (image, str(tmp_path / "a.png"), f"file://{tmp_path}/a.png"):
        messages = [
            {
                "role": "user",
                "content": [{"type": "image", "image": source}, {"type": "text", "text": "read"}],
            }
        ]
        images, videos, audios = asyncio.run(process(messages, 7, OmegaConf.create({})))
        assert (videos, audios) == (None, None) and images[0].size == (20, 30)
        assert images[0].mode == "RGB" and images[0].getpixel((0, 0)) == (255, 255, 255)
    assert asyncio.run(
        process([{"role": "user", "content": "read"}], 7, OmegaConf.create({}))
    ) == (None, None, None)
