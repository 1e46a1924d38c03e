"""What only looks like a published layout, or is a damaged one, is refused by name."""

import importlib

import pytest
import torch
from published_cases import LAYOUTS, write

from grpo_latent.common.command import DONE, REFUSED
from grpo_latent.errors import CheckpointError, ConfigError
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import load_latent_model
from grpo_latent.models.prompts import encode_prompt
from grpo_latent.models.replay import replay
from grpo_latent.models.sequences import collate
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams
from grpo_latent.rollout.vllm.skeleton import read_skeleton
from grpo_latent.testing.cases import sharpen

main = importlib.import_module("grpo_latent.import").main


@pytest.mark.parametrize(
    ("system", "fields", "match"),
    [
        ("SkiLa", {"sketch_token_num": "many"}, "sketch_token_num"),
        ("SkiLa", {"sketch_token_num": True}, "sketch_token_num"),
        ("SkiLa", {}, "sketch_token_num"),
        ("SkiLa", {"sketch_token_num": 3, "skila_id": 0}, "skila_id"),
        ("SwimBird", {"max_latent_token": 0}, "max_latent_token"),
        ("HyLaR", {"canvas_token_num": 5, "canvas_end_id": 0}, "canvas_end_id"),
    ],
)
def test_damaged_layouts_are_typed_errors(system, fields, match, tmp_path):
    folder = write(tmp_path, system, fields=fields)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_latent_model(folder)
    assert caught.value.what.startswith(f"not a {system} checkpoint")


def test_a_folder_of_two_systems_is_refused(tmp_path):
    tokens = LAYOUTS["SkiLa"][2] + LAYOUTS["HyLaR"][2]
    keys = LAYOUTS["SkiLa"][3] + LAYOUTS["HyLaR"][3]
    fields = LAYOUTS["SkiLa"][4] | LAYOUTS["HyLaR"][4]
    folder = write(tmp_path, "SkiLa", tokens, keys, fields)
    with pytest.raises(CheckpointError, match="a checkpoint of two systems.*SkiLa.*HyLaR"):
        load_latent_model(folder)


LOOK_ALIKES = {
    "the LVR pipeline": {"file": "lvr_config.json"},
    "S-LVR": {"fields": {"slvr_id": 1, "slvr_start_id": 2}},
    "Mull-Tokens": {"fields": {"latent_size": 4, "imagelatent_token_id": 9, "latent_token_id": 7}},
    "CoVT": {"tokens": ("<|anchor_start|>", "<|anchor_end|>", "<|sam_pad|>")},
    "LaViT": {"fields": {"v_top_dim": 8, "training_stage": 2}},
    "VisMem": {"tokens": ("<ms_I>", "<ms_E>", "<ml_I>", "<ml_E>")},
    "a SwimBird with a projection head": {
        "system": "SwimBird",
        "fields": {"max_latent_token": 3, "use_projection_head": True},
    },
}


@pytest.mark.parametrize("name", list(LOOK_ALIKES))
def test_look_alikes_are_refused_by_name(name, tmp_path):
    case = LOOK_ALIKES[name]
    system = case.get("system", "ILVR")
    tokens = case.get("tokens")
    keys = None if tokens is None else ()
    folder = write(tmp_path, system, tokens, keys, case.get("fields", {}))
    if "file" in case:
        (folder / case["file"]).write_text("{}")
    for read in (load_latent_model, read_skeleton):
        with pytest.raises(CheckpointError, match=f"a checkpoint of {name}"):
            read(folder)


@pytest.mark.parametrize(
    ("files", "name"),
    [
        (("adapter_config.json",), "an adapter alone"),
        (("lvr_config.json", "qwen"), "LVR pipeline"),
    ],
)
def test_folders_without_a_model_are_refused_by_name(files, name, tmp_path):
    for file in files:
        (tmp_path / file).write_text("{}")
    with pytest.raises(CheckpointError, match=name):
        load_latent_model(tmp_path)


PREFILL = "<|latent_start|> <|latent_pad|> <|latent_pad|> <|latent_end|>"


@pytest.mark.parametrize("prefill", [PREFILL, ""])
def test_latents_that_are_tokens_become_a_policy_of_text(prefill, tmp_path, capsys):
    """Mull-Tokens' slots in a prefill: the folder says what Hugging Face says of the same tokens."""
    fields = LOOK_ALIKES["Mull-Tokens"]["fields"]
    folder, out = write(tmp_path / "mull", "ILVR", keys=(), fields=fields), tmp_path / "out"
    arguments = [str(folder), "--as-text", "--prefill", prefill, "--dtype", "float32"]
    assert main([*arguments, "--out", str(out)]) == DONE
    assert "max_spans" in capsys.readouterr().out
    loaded = load_latent_model(out)
    sharpen(loaded.model, frozenset(), loaded.tokenizer.eos_token_id, eos_bias=-1)
    content = [{"type": "text", "text": "read red ?"}]
    chat = [{"role": "user", "content": content}]
    prompt = encode_prompt(loaded.tokenizer, loaded.processor, chat, [], "here")
    slots = loaded.tokenizer(prefill).input_ids
    asked = loaded.tokenizer("<|im_start|> read red ? <|im_end|>").input_ids
    assert prompt.ids.tolist() == asked + slots
    assert len(set(slots)) == (3 if prefill else 0), "the tokens are known"
    engine = HFRolloutEngine(loaded.model, loaded.mechanism, loaded.eos_ids)
    request = RolloutRequest(prompt.ids, [0])
    ((greedy,),) = engine.generate([request], SamplingParams(12, temperature=0.0))
    banned = [[token_id] for token_id in (*loaded.mechanism.token_ids.values(), *range(3, 7))]
    said = loaded.model.generate(
        prompt.ids[None], max_new_tokens=12, do_sample=False, bad_words_ids=banned
    )
    assert greedy.token_ids.tolist() == said[0, len(prompt.ids) :].tolist()
    assert greedy.latents.shape[0] == 0 and bool(greedy.response_mask().all())
    groups = engine.generate([RolloutRequest(prompt.ids, list(range(6)))], SamplingParams(12))
    adapter = ModelAdapter(loaded.model, loaded.mechanism)
    sequences = collate(groups[0], [None] * 6, adapter, "full", "left")
    with torch.no_grad():
        log_probs_BT, _ = replay(adapter, sequences)
    for row, trajectory in enumerate(groups[0]):
        gap_T = log_probs_BT[row, -len(trajectory.token_ids) :] - trajectory.rollout_log_probs
        assert not trajectory.recorded_mask.any() and float(gap_T.abs().max()) <= 1e-4
    assert not log_probs_BT[:, : len(prompt.ids)].any(), "slots are no actions"
    assert read_skeleton(out).mechanism == loaded.mechanism


def test_what_is_no_text_is_not_written_as_text(tmp_path, capsys):
    for system, match in (("ILVR", "latents that are fed back"), ("SwimBird", "projection head")):
        case = LOOK_ALIKES["a SwimBird with a projection head"] if system == "SwimBird" else {}
        folder = write(tmp_path / system, system, fields=case.get("fields"))
        assert main([str(folder), "--as-text", "--out", str(tmp_path / "out")]) == REFUSED
        assert match in " ".join(capsys.readouterr().err.split())
    for wrong in (["--prefill", "x", "--out", str(tmp_path / "out")], ["--as-text"]):
        assert main([str(folder), *wrong]) == REFUSED
        assert "gets a prefill" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_settings_that_do_not_go_together(tmp_path):
    mechanism = load_latent_model(write(tmp_path, "ILVR")).mechanism
    for changes, where in (
        ({"start": "forced"}, "latent.start_is_action"),
        ({"first_latent": "at_start", "head": "mlp"}, "latent.head"),
        (
            {"first_latent": "at_start", "start": "forced", "start_is_action": False},
            "latent.start",
        ),
        ({"first_latent": "there"}, "latent.first_latent"),
    ):
        with pytest.raises(ConfigError, match=where):
            mechanism.replace(**changes)
