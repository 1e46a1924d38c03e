"""InternVL as a backbone: images in tiles, SFT on boxes, engine hf.

A plain forward of Hugging Face's is the reference for what stands at image positions. RL through
verl: tests/verl_plugin/test_internvl_run.py. Not covered: published weights.
"""

import functools
import json

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from internvl_case import TILE, TOKENS_OF_TILE, tiny_internvl
from latent_cases import WORDS, Case, sampling, sharpened
from omegaconf import OmegaConf
from PIL import Image

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.backbones.internvl import InternVL
from grpo_latent.data.rows import encode_png, parse_verl_row, verl_row, write_verl_parquet
from grpo_latent.errors import ConfigError, DataError, RolloutError
from grpo_latent.models.loading import load_latent_model, save_latent_model
from grpo_latent.models.prompts import encode_prompt
from grpo_latent.models.recompute import recompute_latents
from grpo_latent.models.replay import replay
from grpo_latent.models.sequences import collate
from grpo_latent.rollout.protocol import RolloutRequest
from grpo_latent.rollout.vllm.skeleton import read_skeleton
from grpo_latent.sft.lvr.rows import LVREncoder
from grpo_latent.sft.run import run_sft
from grpo_latent.sft.settings import SFTSettings
from grpo_latent.trajectory import PositionKind as K

WIDE = (TILE, 2 * TILE)  # two tiles and the thumbnail
SMALL = (28, 42)


@functools.cache
def internvl() -> Case:
    return sharpened("internvl", tiny_internvl(WORDS))


def prompt(c, text="read red ?", sizes=(SMALL,), seed=0):
    rng = np.random.default_rng(seed)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes
    ]
    content = [{"type": "text", "text": text}, *[{"type": "image"}] * len(pictures)]
    return encode_prompt(
        c.tokenizer, c.processor, [{"role": "user", "content": content}], pictures, "test"
    )


def data_row(index, boxes, num_images=1):
    """A row with random images whose box and answer follow from the index."""
    rng = np.random.default_rng(index)
    return verl_row(
        data_source="test",
        prompt="read ?" + "<image>" * num_images,
        images=[
            encode_png(rng.integers(0, 256, (*SMALL, 3), dtype=np.uint8))
            for _ in range(num_images)
        ],
        answer=("3", "7")[index % 2],
        index=index,
        split="train",
        bboxes=boxes,
        bbox_images=list(range(len(boxes))),
    )


@torch.no_grad()
def test_the_adapters_forward_is_hugging_faces():
    c = internvl()
    p = prompt(c, sizes=(SMALL, WIDE))
    assert (
        p.images.image_grid_thw.tolist() == [[1, 4, 4], [3, 4, 4]]
        and p.images.pixel_values.shape[0] == 4
    )
    c.adapter.check_prompt(p.ids, p.images, "here")
    ids_1T, mask_1T = p.ids[None], torch.ones_like(p.ids)[None]
    positions = c.adapter.position_ids(ids_1T, mask_1T.bool(), p.images)
    assert torch.equal(positions, torch.arange(len(p.ids))[None])
    hidden = c.adapter.forward_hidden(ids_1T, mask_1T, positions, p.images)
    assert torch.equal(
        c.adapter.logits(hidden),
        c.model(input_ids=ids_1T, pixel_values=p.images.pixel_values).logits,
    )
    visual_MH = c.adapter.encode_images(p.images)
    assert (
        visual_MH.shape == (4 * TOKENS_OF_TILE, c.adapter.hidden_size)
        and len(visual_MH.unique(dim=0)) == 64
    )
    kinds = c.adapter.prompt_kinds(p.ids)
    assert int((kinds == K.VISION).sum()) == 4 * TOKENS_OF_TILE


def test_a_token_sees_its_own_cell_most():
    """A tile's tokens are in row-major order, as box_view and box_to_visual_tokens assume."""
    model, tokenizer, processor = tiny_internvl(WORDS)
    c = Case("fresh", model, tokenizer, processor, internvl().adapter)
    pixels = prompt(c).images.pixel_values.clone().requires_grad_()
    tokens_MH = InternVL(model).encode_images(ImageInputs(pixels, torch.tensor([[1, 4, 4]])))
    cell = TILE // 4
    for index in (0, 1, 6, 12, 15):
        (gradient,) = torch.autograd.grad(
            tokens_MH[index].square().sum(), pixels, retain_graph=True
        )
        strength = gradient[0].square().sum(0).view(4, cell, 4, cell).sum((1, 3)).flatten()
        assert int(strength.argmax()) == index


def test_boxes_lie_in_the_view_of_the_whole_image():
    c = internvl()
    encode = LVREncoder(
        tokenizer=c.tokenizer,
        processor=c.processor,
        mechanism=c.mechanism(),
        eos_id=c.eos_id,
        vision_ids=c.adapter.vision_ids,
        backbone=c.adapter.backbone,
    )
    row = encode(
        parse_verl_row(data_row(0, ((0.0, 0.0, 0.3, 0.2), (0.5, 0.75, 0.75, 1.0)), 2), "row 0")
    )
    # a box of two tokens of the first image's only tile, then one of the second's
    assert (
        row.roi_N.tolist() == [0, 1, TOKENS_OF_TILE + 14]
        and row.num_visual_tokens == 2 * TOKENS_OF_TILE
    )
    tiled = c.adapter.backbone.box_view([3, 4, 4])
    assert tiled == (2 * TOKENS_OF_TILE, [1, 4, 4]), "the thumbnail, behind both tiles"


@torch.no_grad()
@pytest.mark.parametrize("visibility", ["full", "latents_only"])
def test_rollout_equals_replay_and_recompute(visibility):
    c = internvl()
    prompts = [
        prompt(c, "read ?", (WIDE,), 1),
        prompt(c, "read red ?", (SMALL, SMALL), 2),
        prompt(c, "blue", (), 3),
    ]
    requests = [
        RolloutRequest(p.ids, list(range(4 * i, 4 * i + 4)), p.images, group_id=str(i))
        for i, p in enumerate(prompts)
    ]
    engine = c.engine(c.mechanism(visibility=visibility, max_spans=2))
    groups = engine.generate(requests, sampling(16, temperature=1.5))
    trajectories = [t for group in groups for t in group]
    assert (
        sum(len(t.latents) for t in trajectories) > 20
        and len({len(t.token_ids) for t in trajectories}) > 1
    )
    images = [
        request.images for request, group in zip(requests, groups, strict=True) for _ in group
    ]
    for padding_side, shares in (("both", False), ("right", False), ("right", True)):
        batch = collate(trajectories, images, engine.adapter, visibility, padding_side, shares)
        log_probs_BT, _ = replay(engine.adapter, batch, temperature=1.5)
        for row, t in enumerate(trajectories):
            values = log_probs_BT[row][batch.valid_BT[row]][len(t.prompt_ids) :]
            torch.testing.assert_close(values, t.rollout_log_probs, rtol=0, atol=1e-4)
    batch = collate(trajectories, images, engine.adapter, visibility, "both")
    again_NH = recompute_latents(engine.adapter, batch)
    torch.testing.assert_close(again_NH, batch.latents_NH, rtol=1e-4, atol=1e-4)


def test_sft_on_boxes_learns_and_its_folder_rolls_out(tmp_path):
    """`python -m grpo_latent.sft` from a model that has no latent tokens.

    Tower and merger frozen, as published.
    """
    model, tokenizer, processor = tiny_internvl(WORDS, latent_tokens=())
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    boxes = ((0.0, 0.0, 0.6, 0.2), (0.5, 0.5, 0.75, 1.0))
    write_verl_parquet(tmp_path / "rows.parquet", [data_row(i, (boxes[i % 2],)) for i in range(8)])
    settings = {
        "model.path": tmp_path / "base",
        "data.train_files": tmp_path / "rows.parquet",
        "data.format": "parquet",
        "data.min_image_tokens": "null",
        "data.max_image_tokens": "null",
        "model.vision_cache_bytes": 0,
        "latent.steps": 2,
        "trainer.output_dir": tmp_path / "out",
        "trainer.max_steps": 20,
        "trainer.learning_rate": 1e-2,
        "trainer.warmup_steps": 0,
        "trainer.per_device_train_batch_size": 4,
        "trainer.gradient_accumulation_steps": 1,
    }
    with initialize_config_module("grpo_latent.config", version_base=None):
        config = compose("sft", overrides=[f"{key}={value}" for key, value in settings.items()])
    result = run_sft(SFTSettings.from_dict(OmegaConf.to_container(config, resolve=True)))
    loaded = load_latent_model(result.model_path)
    before, after = model.state_dict(), loaded.model.state_dict()
    frozen = [name for name in before if "vision_tower" in name or "multi_modal_projector" in name]
    assert len(frozen) > 10 and all(torch.equal(before[name], after[name]) for name in frozen)
    entropies = [json.loads(line)["ce"] for line in (tmp_path / "out/metrics.jsonl").open()]
    assert entropies[-1] < 0.6 * entropies[0]
    learned = Case("", loaded.model, loaded.tokenizer, loaded.processor, None)
    p = prompt(learned, "read ?")
    (group,) = learned.engine(loaded.mechanism).generate(
        [RolloutRequest(p.ids, [1, 2, 3, 4], p.images)], sampling(12)
    )
    assert any(len(t.latents) >= 2 for t in group), "it opens spans"


def test_a_folder_loads_with_its_processor(tmp_path):
    model, tokenizer, processor = tiny_internvl(WORDS)
    c = Case("", model, tokenizer, processor, internvl().adapter)
    save_latent_model(tmp_path, model, tokenizer, processor, c.mechanism())
    loaded = load_latent_model(tmp_path)
    again = prompt(
        Case("", loaded.model, loaded.tokenizer, loaded.processor, None), sizes=(SMALL, WIDE)
    )
    own = prompt(c, sizes=(SMALL, WIDE))
    assert torch.equal(own.ids, again.ids) and torch.equal(
        own.images.pixel_values, again.images.pixel_values
    )
    with pytest.raises(ConfigError, match="internvl.*Use engine hf"):
        read_skeleton(tmp_path)


def test_what_does_not_fit_is_refused():
    c = internvl()
    p = prompt(c, sizes=(SMALL, WIDE))
    with pytest.raises(RolloutError, match="pixels do not fit the image grid"):
        c.adapter.check_prompt(
            p.ids, ImageInputs(p.images.pixel_values[:3], p.images.image_grid_thw), "row 1"
        )
    with pytest.raises(RolloutError, match="64 placeholders; expected 16"):
        c.adapter.check_prompt(
            p.ids, ImageInputs(p.images.pixel_values[:1], p.images.image_grid_thw[:1]), "row 1"
        )
    with pytest.raises(ConfigError, match="no adjustable number of tokens.*InternVL"):
        InternVL.bound_image_tokens(c.processor, None, 16)
    if type(c.processor).__module__.startswith("grpo_latent"):
        with pytest.raises(DataError, match="1 video.*Install torchvision"):
            c.processor(text=["read"], videos=[np.zeros((4, 56, 56, 3), dtype=np.uint8)])
