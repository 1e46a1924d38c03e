"""`LatentLLM` and `python -m grpo_latent.generate` on both engines."""

import json

import numpy as np
import pytest
from PIL import Image
from vllm_cases import build_vllm_case, compare

from grpo_latent import generate
from grpo_latent.errors import ConfigError, DataError
from grpo_latent.rollout.llm import LatentLLM
from grpo_latent.rollout.protocol import SamplingParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vl")
    build_vllm_case("qwen2_5_vl", folder)
    pixels = np.random.default_rng(0).integers(0, 256, (28, 42, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    return folder


PROMPTS = ["read <image> red ?", "blue 3 7 ?"]


def ask(llm, folder):
    images = [[Image.open(folder / "picture.png")], []]
    return llm.generate(
        PROMPTS,
        images,
        SamplingParams(max_new_tokens=24, temperature=0.7),
        num_trajectories=3,
        seed=5,
    )


def test_groups_texts_and_seeds(folder):
    llm = LatentLLM(folder)
    groups = ask(llm, folder)
    assert [len(group) for group in groups] == [3, 3] and len(
        {t.seed for group in groups for t in group}
    ) == 6
    assert "<|lvr" not in "".join(llm.text(t) for group in groups for t in group)
    assert compare(ask(llm, folder), groups).different == []


@pytest.mark.vllm
def test_both_engines_answer_alike(folder):
    llm = LatentLLM(folder, engine="vllm", max_model_len=128, enforce_eager=True)
    try:
        result = compare(ask(llm, folder), ask(LatentLLM(folder), folder))
        assert (
            len(result.different) <= 1 and result.log_prob_gap < 1e-4
        )  # a draw may fall on a boundary
    finally:
        llm.engine.close()


def test_what_does_not_fit_is_refused(folder):
    with pytest.raises(ConfigError, match="engine: .*got sglang"):
        LatentLLM(folder, engine="sglang")
    llm = LatentLLM(folder)
    with pytest.raises(DataError, match="one <image> per image"):
        llm.generate(["no picture"], [[Image.new("RGB", (28, 28))]])
    with pytest.raises(DataError, match="differ in number"):
        llm.generate(["a", "b"], [[]])


def test_a_transparent_image_is_read_as_training_reads_it(tmp_path):
    """Over white; Pillow's own conversion shows what is below the transparency."""
    path = tmp_path / "transparent.png"
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(path)
    pixels = np.asarray(generate.read_image(str(path)))
    assert pixels.shape == (4, 4, 3) and (pixels == 255).all()


def test_command_line(folder, capsys):
    argv = [str(folder), "--prompt", "<image> read ?", "--image", str(folder / "picture.png")]
    assert (
        generate.main([*argv, "--max-new-tokens", "12", "--num", "2", "--temperature", "1"]) == 0
    )
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(records) == 2 and all(0 < record["num_tokens"] <= 12 for record in records)
    assert records[0].keys() == {"text", "latent_steps", "stop_reason", "num_tokens"}
    assert generate.main([str(folder), "--prompt", "?", "--image", "nowhere.png"]) == 2
    assert "DataError: --image: no such image file; got nowhere.png" in capsys.readouterr().err
