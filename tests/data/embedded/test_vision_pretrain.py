"""Stage 0: the vision tower learns to read digits, nothing else moves, and the folder loads."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from grpo_latent.common.manifest import read_manifest
from grpo_latent.data.embedded import digits
from grpo_latent.data.embedded.vision_pretrain import (
    CellProbes,
    encode,
    evaluate_probes,
    learning_rate_factor,
    main,
    pretrain_vision,
    probe_loss,
)
from grpo_latent.models.tiny import EXPERIMENT_SIZES, UNIT_SIZES, tiny_qwen2_5_vl


def model(seed=0, sizes=UNIT_SIZES):
    return tiny_qwen2_5_vl(digits.WORDS, sizes, seed=seed)


def weights(tiny):
    return {name: value.clone() for name, value in tiny.model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.long
def test_the_tower_learns_to_read_digits():
    """60 of the recipe's 400 steps; untrained probes are at chance."""
    tiny = model(sizes=EXPERIMENT_SIZES)
    untrained = evaluate_probes(tiny, CellProbes(128))
    assert untrained["digit_accuracy"] < 0.2
    losses = []
    report = pretrain_vision(
        tiny, steps=60, on_step=lambda step, loss: losses.append((step, loss))
    )
    assert report.digit_accuracy > 0.65 and report.color_accuracy > 0.99
    assert report.rms > 2 * untrained["rms"], "the tokens are on their way to unit scale"
    assert [step for step, _ in losses] == list(range(1, 61)) and losses[-1][1] < 0.25 * losses[0][
        1
    ]


def test_loss_by_hand():
    """Uniform logits cost ln 11 + ln 9.

    The scale term is the only one that sees the tokens' scale.
    """
    probes = CellProbes(4).requires_grad_(False)
    labels = torch.zeros(1, 2, dtype=torch.long)
    tokens = torch.tensor([[1.0, -1, 1, 1], [1, 1, 1, -1]])
    unscaled = probe_loss(probes, tokens, labels, labels)
    torch.testing.assert_close(
        probe_loss(probes, 2 * tokens, labels, labels) - unscaled, torch.tensor(0.01 * 9)
    )
    for parameter in probes.parameters():
        parameter.zero_()
    torch.testing.assert_close(
        probe_loss(probes, tokens, labels, labels), torch.tensor(math.log(11) + math.log(9))
    )


def test_only_the_tower_moves_and_runs_repeat():
    def train(seed):
        tiny = model()
        before = weights(tiny)
        report = pretrain_vision(tiny, steps=3, batch_size=8, seed=seed)
        assert report.seed == seed and all(
            parameter.grad is None for parameter in tiny.model.parameters()
        )
        return before, weights(tiny)

    torch.manual_seed(11)
    expected_draw = torch.rand(1)
    torch.manual_seed(11)
    before, first = train(seed=0)
    assert torch.equal(torch.rand(1), expected_draw), "the global generator is left as it was"
    moved = {name for name in first if not torch.equal(first[name], before[name])}
    assert moved == {name for name in first if name.startswith("model.visual.")}
    second, other = train(seed=0)[1], train(seed=1)[1]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in moved)


def test_visual_tokens_are_the_models_and_row_major():
    """Without attention, changing one cell's pixels changes that cell's token only.

    With it, other tokens change by what attention mixes in.
    """
    tiny = model()
    images = digits.generate_dense(2, digits.stream_rng("pretrain", 0), "pretrain")[0]
    inputs = tiny.processor(
        text=["<|image_pad|>"] * 2,
        images=[Image.fromarray(image) for image in images],
        return_tensors="pt",
    )
    with torch.no_grad():
        features = tiny.model.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"]
        ).pooler_output
        tokens = encode(tiny, tiny.processor.image_processor(list(images), return_tensors="pt"))
        torch.testing.assert_close(tokens, torch.cat(list(features)), rtol=0, atol=0)
        for block in tiny.model.model.visual.blocks:
            block.attn.proj.weight.zero_()
        plain = encode(tiny, tiny.processor.image_processor(list(images), return_tensors="pt"))
        changed = images.copy()
        changed[1, 14:28, 42:56] = 0
        differs = (
            encode(tiny, tiny.processor.image_processor(list(changed), return_tensors="pt"))
            != plain
        ).any(-1)
    assert differs.nonzero().flatten().tolist() == [16 + 1 * 4 + 3]


def test_learning_rate_warms_up_and_decays():
    factors = [learning_rate_factor(step, 400) for step in (0, 29, 200, 400)]
    assert factors == pytest.approx([1 / 30, 0.9875, 0.515, 0.03], abs=1e-3)


def test_the_written_folder_loads(tmp_path, capsys):
    main(
        [
            "--out",
            str(tmp_path),
            "--steps",
            "2",
            "--batch-size",
            "4",
            "--seed",
            "5",
            "--log-every",
            "1",
        ]
    )
    assert "step 2/2 loss" in capsys.readouterr().out
    report = json.loads((tmp_path / "vision_pretrain.json").read_text())
    assert report["provenance"]["seed"] == 5
    assert report["seed"] == 5 and set(report) >= {
        "digit_accuracy",
        "color_accuracy",
        "rms",
        "seconds",
        "steps",
    }
    loaded, processor = (
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    )
    expected = model(seed=5, sizes=EXPERIMENT_SIZES)
    pretrain_vision(expected, steps=2, batch_size=4, seed=5)
    for name, value in expected.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert processor.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    assert processor.image_processor.patch_size == 7
    assert "model.safetensors" in read_manifest(tmp_path), "SFT can tell whether it is whole"


@pytest.mark.long
def test_a_temporary_folder_with_a_long_name(tmp_path):
    """A socket's path has 107 bytes at most: images that came by one never came."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    code = (
        "from grpo_latent.data.embedded import digits\n"
        "from grpo_latent.data.embedded.vision_pretrain import pretrain_vision\n"
        "from grpo_latent.models.tiny import tiny_qwen2_5_vl\n"
        "pretrain_vision(tiny_qwen2_5_vl(digits.WORDS), steps=2, batch_size=4)\n"
    )
    env = os.environ | {"TMPDIR": str(folder)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=600)
