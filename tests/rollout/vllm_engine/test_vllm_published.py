"""Published layouts in vLLM: the folder as it is, class name of the authors' own included."""

import json

import pytest
import torch
from latent_cases import Case
from vllm_cases import MAX_MODEL_LEN, WORDS, VllmCase, compare, sampling

from grpo_latent.models import tiny
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import load_latent_model
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.rollout.vllm.engine import VllmRolloutEngine
from grpo_latent.trajectory import PositionKind

pytestmark = pytest.mark.vllm
# tokens start, latent, end, then others; fields of config.json with their ids; others; class name
LAYOUTS = {
    "LVR": (
        ("<|lvr_start|>", "<|lvr|>", "<|lvr_end|>", "<|lvr_latent_end|>"),
        ("lvr_start_id", "lvr_id", "lvr_end_id", "lvr_latent_end_id"),
        {"lvr_head": False, "latent_end_token": False},
        "QwenWithLVR",
        PositionKind.END,
    ),
    "SkiLa": (
        ("<|sketch_start|>", "<|skila|>", "<|sketch_end|>"),
        ("sketch_start_id", "skila_id", "sketch_end_id"),
        {"sketch_token_num": 3},
        "SkiLa",
        PositionKind.FORCED,
    ),
    "Monet": (
        ("<abs_vis_token>", "<abs_vis_token_pad>", "</abs_vis_token>"),
        ("latent_start_id", "latent_token_id", "latent_end_id"),
        {},
        None,
        PositionKind.FED_START,
    ),
    "Laser": (
        ("<|laser_start|>", "<|laser|>", "<|laser_end|>"),
        ("laser_start_id", "laser_id", "laser_end_id"),
        {},
        "QwenWithLaser",
        PositionKind.START,
    ),
}


def write(folder, system):
    """A tiny Qwen2.5-VL with its logits tied to the embeddings, as transformers 4.5x saves it."""
    tokens, keys, fields, class_name, _ = LAYOUTS[system]
    model, tokenizer, processor = tiny.tiny_qwen2_5_vl(
        WORDS, tiny.TinySizes(hidden=64), 1, latent_tokens=tokens
    )
    scales = {"embed_tokens": 40.0, "lm_head": 8.0}
    vocab = tokenizer.get_vocab()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(next((s for part, s in scales.items() if part in name), 6.0))
        model.lm_head.weight[vocab[tokens[0]]] *= 1.6
        model.lm_head.weight[vocab[tokens[2]]] *= 1.3
    if system == "LVR":
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.lm_head.weight.data.div_(5.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    values = json.loads(path.read_text()) | fields
    values |= {key: vocab[token] for key, token in zip(keys, tokens, strict=True)}
    if class_name is not None:
        values["architectures"] = [class_name]
    if values.pop("tie_word_embeddings", False):
        values["text_config"]["tie_word_embeddings"] = True
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("system", list(LAYOUTS))
def test_both_engines_decode_a_published_folder_alike(system, tmp_path):
    write(tmp_path, system)
    loaded = load_latent_model(tmp_path)
    adapter = ModelAdapter(loaded.model, loaded.mechanism)
    case = Case(system, loaded.model, loaded.tokenizer, loaded.processor, adapter)
    requests = VllmCase(case, loaded.mechanism, tmp_path).requests(16)
    own = VllmRolloutEngine(
        tmp_path, max_model_len=MAX_MODEL_LEN, max_num_seqs=16, enforce_eager=True, max_latents=128
    )
    try:
        ours = own.generate(requests, sampling())
        reference = HFRolloutEngine(loaded.model, loaded.mechanism, loaded.eos_ids)
        result = compare(ours, reference.generate(requests, sampling()))
        assert result.different == []
        assert result.latent_gap <= 1e-4 and result.log_prob_gap <= 1e-4, result
        kinds = torch.cat([t.kinds for group in ours for t in group])
        assert bool((kinds == LAYOUTS[system][-1]).any()) and result.num_latents > 8
    finally:
        own.close()
