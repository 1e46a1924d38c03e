"""Checks recipes/lvr without weights or GPU: configs compose, options agree, and every shape holds on the meta device.

python recipes/lvr/validate.py [hydra overrides of GRPO]
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForImageTextToText

import grpo_latent.train  # noqa: F401  (puts verl's configs on hydra's search path)
from grpo_latent.errors import ConfigError
from grpo_latent.latent.config import LatentConfig
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.head import attach_latent_modules, feedback
from grpo_latent.models.tokens import LVR_END, LVR_LATENT, LVR_LATENT_END, LVR_START, LVR_TOKENS
from grpo_latent.models.visibility import attention_bias
from grpo_latent.sft.settings import SFTSettings
from grpo_latent.verl_plugin.config_check import check_config

HERE = Path(__file__).parent
PLACEHOLDERS = ["data.train_files=train.parquet", "data.val_files=val.parquet", "actor_rollout_ref.model.path=model"]
FIRST_FREE_ID = 151665  # after the tokens of Qwen2.5-VL's tokenizer; its embedding table has rows to spare


def compose_config(name: str, overrides: list[str]):
    with initialize_config_dir(str(HERE.absolute()), version_base=None):
        return compose(name, overrides=["hydra.searchpath=[pkg://grpo_latent.config]", *overrides])


def check_shapes(model_name: str, response_length: int) -> dict[str, tuple[int, ...]]:
    """Builds the model on the meta device and runs one latent forward: hidden states, logits, feedback."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(HERE / "models" / f"{model_name}.json", Path(folder) / "config.json")
        hf_config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(hf_config, attn_implementation="sdpa", dtype=torch.bfloat16)
        vocab_size = model.get_output_embeddings().weight.shape[0]
        ids = dict(zip(LVR_TOKENS, range(FIRST_FREE_ID, FIRST_FREE_ID + len(LVR_TOKENS)), strict=True))
        if max(ids.values()) >= vocab_size:
            raise ConfigError(
                "no room for the latent tokens", where=model_name, got=vocab_size, expected=f"> {max(ids.values())}"
            )
        config = LatentConfig(
            LVR_START, LVR_LATENT, LVR_END, ids[LVR_START], ids[LVR_LATENT], ids[LVR_END],
            latent_end_token=LVR_LATENT_END, latent_end_id=ids[LVR_LATENT_END], head="glu",
        )  # fmt: skip
        attach_latent_modules(model, config)
        adapter = ModelAdapter(model)
        length = 64 + response_length
        input_ids = torch.zeros(1, length, dtype=torch.long)
        bias = attention_bias(input_ids, torch.ones_like(input_ids, dtype=torch.bool), "full", adapter.dtype)
        hidden = adapter.forward_hidden(input_ids, bias, torch.zeros(3, 1, length, dtype=torch.long))
        latent = feedback(model, hidden[:, -1])
        logits = adapter.logits(hidden[:, -1])
        vision = hf_config.vision_config
        patch_size = vision.in_chans * vision.temporal_patch_size * vision.patch_size**2
        merged = model.model.visual.merger(
            torch.empty(32 * vision.spatial_merge_size**2, vision.hidden_size, dtype=torch.bfloat16)
        )
    shapes = {
        "patch": (patch_size,), "visual token": tuple(merged.shape), "hidden": tuple(hidden.shape),
        "latent": tuple(latent.shape), "logits": tuple(logits.shape), "vocabulary": (vocab_size,),
    }  # fmt: skip
    expected = (32, adapter.hidden_size)
    if shapes["visual token"] != expected or shapes["latent"] != (1, adapter.hidden_size):
        raise ConfigError(
            "visual tokens and latents differ in size", where=model_name, got=shapes, expected=str(expected)
        )
    return shapes


def main(overrides: list[str]) -> None:
    grpo = compose_config("lvr_grpo", PLACEHOLDERS + overrides)
    check_config(grpo)
    sft = compose_config("lvr_sft", ["model.path=model", "data.train_files=train.json"])
    SFTSettings.from_dict({key: value for key, value in OmegaConf.to_container(sft, resolve=True).items()})
    print(f"lvr_grpo and lvr_sft: valid ({grpo.trainer.n_gpus_per_node} GPUs a node)")
    for model_name in ("qwen2_5_vl_3b", "qwen2_5_vl_7b"):
        shapes = check_shapes(model_name, grpo.data.max_response_length)
        print(f"{model_name}: " + ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
