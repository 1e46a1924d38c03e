"""Bounds of an image's tokens."""

import pytest
from sft_cases import example, latent_model

from grpo_latent.errors import ConfigError
from grpo_latent.sft.common.images import set_image_tokens


def test_image_token_bounds_reach_the_processor():
    processor = latent_model("qwen2_vl").processor
    set_image_tokens(processor, None, 4)
    grid = processor.image_processor(images=[example().images[0].open()], return_tensors="pt")[
        "image_grid_thw"
    ][0]
    assert int(grid.prod()) // 4 <= 4
    with pytest.raises(ConfigError, match="no image size fits"):
        set_image_tokens(processor, 9, 4)
