"""Published layouts as tiny folders: fields of config.json, names of tokens, class names."""

import json

from latent_cases import WORDS

from grpo_latent.latent.mechanisms import LATENT_CONFIG_FILE
from grpo_latent.models import tiny

LVR_TOKENS = ("<|lvr_start|>", "<|lvr|>", "<|lvr_latent_end|>", "<|lvr_end|>")
ILVR_TOKENS = ("<|latent_pad|>", "<|latent_start|>", "<|latent_end|>")
LATENT_KEYS = ("latent_token_id", "latent_start_id", "latent_end_id")

# system -> backbone, class name, tokens in the order of their addition, the fields that hold their
# ids in that order, other fields; what the mechanism is then
LAYOUTS = {
    "LVR": (
        "qwen2_5_vl",
        "QwenWithLVR",
        LVR_TOKENS,
        ("lvr_start_id", "lvr_id", "lvr_latent_end_id", "lvr_end_id"),
        {"lvr_head": False, "latent_end_token": False, "loss_lvr_fct": "mse"},
        {"name": "lvr", "steps": 8, "span_end": "sampled", "exit": "steps"},
    ),
    "ILVR": (
        "qwen2_5_vl",
        None,
        ILVR_TOKENS,
        LATENT_KEYS,
        {"latent_size": 3},
        {"name": "ilvr", "steps": 3, "exit": "end_token"},
    ),
    "Mirage": (
        "qwen2_5_vl",
        None,
        ILVR_TOKENS,
        LATENT_KEYS,
        {"latent_size": 4, "stage": "stage2", "compress_strategy": "average"},
        {"name": "ilvr", "steps": 4, "exit": "end_token"},
    ),
    "Monet": (
        "qwen2_5_vl",
        None,
        ("<abs_vis_token_pad>", "<abs_vis_token>", "</abs_vis_token>"),
        LATENT_KEYS,
        {},
        {"name": "ilvr", "steps": 10, "first_latent": "at_start"},
    ),
    "SkiLa": (
        "qwen2_5_vl",
        "SkiLa",
        ("<|skila|>", "<|sketch_start|>", "<|sketch_end|>"),
        ("skila_id", "sketch_start_id", "sketch_end_id"),
        {"sketch_token_num": 3, "compress_strategy": "average", "sketch_loss": "mse"},
        {"name": "ilvr", "steps": 6, "exit": "end_token"},
    ),
    "HyLaR": (
        "qwen2_5_vl",
        None,
        ("<|canvas|>", "<|canvas_start|>", "<|canvas_end|>"),
        ("canvas_id", "canvas_start_id", "canvas_end_id"),
        {"canvas_token_num": 5, "compress_strategy": "compressor"},
        {"name": "ilvr", "steps": 5, "exit": "end_token"},
    ),
    "SwimBird": (
        "qwen3_vl",
        None,
        ("<|latent|>", "<|latent_start|>", "<|latent_end|>"),
        ("latent_id", "latent_start_id", "latent_end_id"),
        {"max_latent_token": 3, "latent_loss": "mse", "latent_lambda": 0.2},
        {"name": "ilvr", "steps": 6, "exit": "end_token"},
    ),
    "SwimBird, Qwen2.5": (
        "qwen2_5_vl",
        None,
        ("<|latent|>", "<|latent_start|>", "<|latent_end|>"),
        ("latent_id", "latent_start_id", "latent_end_id"),
        {"max_latent_token": 2},
        {"name": "ilvr", "steps": 4, "exit": "end_token"},
    ),
    "Laser": (
        "qwen2_5_vl",
        "QwenWithLaser",
        ("<|laser_start|>", "<|laser|>", "<|laser_end|>"),
        ("laser_start_id", "laser_id", "laser_end_id"),
        {"loss_laser_fct": "dwal", "dwal_window": 4},
        {"name": "ilvr", "steps": 16, "start": "forced", "start_is_action": False},
    ),
}


def write(folder, system, tokens=None, keys=None, fields=None, change=None, **tiny_arguments):
    """The folder of a system.

    Args:
        change: called with the model and its vocabulary before they are saved.
    """
    backbone, class_name, own_tokens, own_keys, own_fields, _ = LAYOUTS[system]
    tokens = own_tokens if tokens is None else tokens
    keys = own_keys if keys is None else keys
    build = getattr(tiny, f"tiny_{backbone}")
    model, tokenizer, processor = build(WORDS, latent_tokens=tokens, **tiny_arguments)
    if change is not None:
        change(model, tokenizer.get_vocab())
    model.save_pretrained(folder)
    (processor or tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    vocab = tokenizer.get_vocab()
    values |= {key: vocab[token] for key, token in zip(keys, tokens, strict=False)}
    values |= own_fields if fields is None else fields
    if class_name:
        values["architectures"] = [class_name]
    path.write_text(json.dumps(values))
    assert not (folder / LATENT_CONFIG_FILE).exists()
    return folder
