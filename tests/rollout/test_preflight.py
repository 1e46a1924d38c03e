"""Preflight: what a good checkpoint reports, and malformed ones, each refused by name.

Folders are only read.
"""

import json
import shutil

import pytest
import torch
from folder_cases import digests, without_manifest
from latent_cases import build_case
from PIL import Image
from safetensors.torch import load_file, save_file

from grpo_latent.errors import CheckpointError, ConfigError, PreflightError
from grpo_latent.latent.mechanisms import LATENT_CONFIG_FILE
from grpo_latent.models.loading import save_latent_model
from grpo_latent.models.prompts import encode_prompt
from grpo_latent.rollout.preflight import PreflightPrompt, preflight
from grpo_latent.rollout.protocol import SamplingParams

MESSAGE = {"role": "user", "content": [{"type": "text", "text": "read red ?"}, {"type": "image"}]}
PROMPTS = [
    PreflightPrompt([MESSAGE], [Image.new("RGB", (28, 28), color)], color)
    for color in ("red", "blue")
]
SAMPLING = SamplingParams(max_new_tokens=8)


def write_checkpoint(folder, start_logit):
    """A checkpoint that opens a span after `PROMPTS` with a logit of about `start_logit`."""
    case = build_case("qwen2_5_vl")
    case.model.lm_head.bias = None
    config = case.mechanism(head="mlp")
    config.attach(case.model)
    with torch.no_grad():
        hidden = []
        for item in PROMPTS:
            prompt = encode_prompt(
                case.tokenizer, case.processor, item.messages, item.images, item.where
            )
            valid = torch.ones(1, len(prompt.ids), dtype=torch.bool)
            positions = case.adapter.position_ids(prompt.ids[None], valid, prompt.images)
            hidden.append(
                case.adapter.forward_hidden(
                    prompt.ids[None], valid.long(), positions, prompt.images
                )[0, -1]
            )
        mean = torch.stack(hidden).mean(0)
        case.model.lm_head.weight[config.start_id] = start_logit * mean / mean.square().sum()
    save_latent_model(folder, case.model, case.tokenizer, case.processor, config)
    without_manifest(folder)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "model"
    write_checkpoint(folder, start_logit=20.0)
    before = digests(folder)
    yield folder
    assert digests(folder) == before, "preflight wrote to the folder"


def test_a_good_checkpoint(good):
    report = preflight(good, PROMPTS, min_emission_rate=0.9, sampling=SAMPLING)
    assert (
        report.layout == "grpo_latent"
        and report.head == "mlp"
        and report.model_type == "qwen2_5_vl"
    )
    assert (
        report.emission_rate == 1.0
        and report.num_trajectories == 8
        and report.num_latent_steps >= 3
    )
    assert set(report.tokens) == {"<|lvr_start|>", "<|lvr|>", "<|lvr_end|>"}
    assert "100% of 8 trajectories" in report.summary()
    assert preflight(good, PROMPTS, sampling=SAMPLING) == report, "the same each time"


def test_without_prompts_nothing_is_rolled_out(good):
    report = preflight(good, min_emission_rate=1.0)
    assert report.emission_rate is None and report.num_trajectories == 0


def test_latents_that_are_never_emitted(tmp_path):
    write_checkpoint(tmp_path, start_logit=-200.0)
    one_token = SamplingParams(max_new_tokens=1)
    assert preflight(tmp_path, PROMPTS, sampling=one_token).emission_rate == 0.0
    with pytest.raises(PreflightError, match="too few latent spans.*0% of 8.*at least 50%"):
        preflight(tmp_path, PROMPTS, min_emission_rate=0.5, sampling=one_token)


def test_official_layout(good, tmp_path):
    shutil.copytree(good, tmp_path / "official")
    latent = json.loads((tmp_path / "official" / LATENT_CONFIG_FILE).read_text())
    remove(LATENT_CONFIG_FILE)(tmp_path / "official")
    ids = {"lvr_start_id": "start_id", "lvr_id": "latent_id", "lvr_end_id": "end_id"}
    edit("config.json", lvr_head=True, **{name: latent[key] for name, key in ids.items()})(
        tmp_path / "official"
    )
    before = digests(tmp_path / "official")
    report = preflight(tmp_path / "official", PROMPTS, min_emission_rate=0.9, sampling=SAMPLING)
    assert report.layout == "official_lvr" and report.head == "mlp"
    assert digests(tmp_path / "official") == before


def test_rates_lie_between_0_and_1(good):
    with pytest.raises(ConfigError, match="min_emission_rate"):
        preflight(good, min_emission_rate=50)


def remove(name):
    return lambda folder: (folder / name).unlink()


def edit(name, **values):
    def change(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return change


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def drop_weight(prefix):
    def change(folder):
        path = folder / "model.safetensors"
        tensors = {
            name: tensor for name, tensor in load_file(path).items() if not name.startswith(prefix)
        }
        save_file(tensors, path, metadata={"format": "pt"})

    return change


def nan_weight(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][:] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def drop_token(folder):
    """The start token leaves the tokenizer: no more in the vocabulary or among added tokens."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = [
        item for item in content["added_tokens"] if item["content"] != "<|lvr_start|>"
    ]
    content["model"]["vocab"]["<|gone|>"] = content["model"]["vocab"].pop("<|lvr_start|>")
    path.write_text(json.dumps(content))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    text = json.dumps(settings).replace("<|lvr_start|>", "<|gone|>")
    (folder / "tokenizer_config.json").write_text(text)


def plain_token(folder):
    """The start token stays in the vocabulary, but text is no longer split at it."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = [
        item for item in content["added_tokens"] if item["content"] != "<|lvr_start|>"
    ]
    content["model"]["type"], content["pre_tokenizer"] = (
        "WordLevel",
        {"type": "CharDelimiterSplit", "delimiter": "|"},
    )
    path.write_text(json.dumps(content))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    text = json.dumps(settings).replace('"<|lvr_start|>", ', "").replace(', "<|lvr_start|>"', "")
    (folder / "tokenizer_config.json").write_text(text)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (drop_token, CheckpointError, "disagrees with latent_config.json on the start token"),
        (plain_token, CheckpointError, "text is not split at it"),
        (edit(LATENT_CONFIG_FILE, start_id=3), CheckpointError, "on the start token"),
        (edit(LATENT_CONFIG_FILE, end_token="<|end|>"), CheckpointError, "on the end token"),
        (edit(LATENT_CONFIG_FILE, version=99), CheckpointError, "unknown version"),
        (edit(LATENT_CONFIG_FILE, head="glu"), CheckpointError, "latent head are missing"),
        (write(LATENT_CONFIG_FILE, "{"), CheckpointError, "not valid JSON"),
        (remove(LATENT_CONFIG_FILE), CheckpointError, "no latent_config.json"),
        (remove("chat_template.jinja"), CheckpointError, "no chat template"),
        (remove("config.json"), CheckpointError, "config.json"),
        (drop_weight("lvr_head."), CheckpointError, "latent head are missing"),
        (drop_weight("model.layers.0."), CheckpointError, "do not match the architecture"),
        (
            edit("generation_config.json", eos_token_id=[2, 8]),
            CheckpointError,
            "ends the sequence",
        ),
        (nan_weight, PreflightError, "not finite"),
    ],
    ids=lambda value: value.__name__ if callable(value) and not isinstance(value, type) else None,
)
def test_malformed_checkpoints(good, tmp_path, change, error, message):
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    change(folder)
    with pytest.raises(error, match=message) as caught:
        preflight(folder, PROMPTS, sampling=SAMPLING)
    assert str(folder) in str(caught.value)


def test_no_such_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        preflight(tmp_path / "nowhere")
