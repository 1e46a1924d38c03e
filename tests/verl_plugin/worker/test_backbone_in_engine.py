"""What the engine asks of a backbone: arguments of images, rows of text on several ranks."""

from types import SimpleNamespace

import pytest
import torch

from grpo_latent.backbones.protocol import Backbone
from grpo_latent.errors import ConfigError
from grpo_latent.verl_plugin.worker.engine import LatentFSDPEngine


class Tiles(Backbone):
    image_arguments = ("pixel_values",)

    def __init__(self):
        pass


def keep(monkeypatch, inputs, world_size):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world_size)
    LatentFSDPEngine._keep_image_arguments(SimpleNamespace(backbone=Tiles()), inputs)
    return inputs


def test_only_the_familys_arguments_reach_its_forward(monkeypatch):
    inputs = {"input_ids": 1, "pixel_values": 2, "image_grid_thw": 3}
    assert keep(monkeypatch, inputs, 2) == {"input_ids": 1, "pixel_values": 2}


def test_rows_of_text_on_several_ranks_are_refused(monkeypatch):
    """Rows of text on several ranks are refused: they would wait for ever.

    Some ranks would call the collectives of the tower's shards, the others not.
    """
    with pytest.raises(ConfigError, match="Tiles on several ranks: a micro-batch without images"):
        keep(monkeypatch, {"input_ids": 1}, 2)
    assert keep(monkeypatch, {"input_ids": 1}, 1) == {"input_ids": 1}
