"""Checks recipes/ilvr at paper scale without weights or GPU.

The three configs compose and agree, and shapes hold on the meta device.

python recipes/ilvr/validate.py [hydra overrides of GRPO]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # recipes are scripts, not a package
import paper_scale  # noqa: E402

from grpo_latent.errors import ConfigError  # noqa: E402
from grpo_latent.latent.mechanisms import ILVR  # noqa: E402

HERE = Path(__file__).parent
MODEL_JSON = HERE.parent / "lvr" / "models" / "qwen2_5_vl_7b.json"
FIRST_FREE_ID = 151665  # after the tokens of Qwen2.5-VL's tokenizer


def main(overrides: list[str]) -> None:
    grpo = paper_scale.check_grpo(HERE, "ilvr_grpo", overrides)
    stages = [paper_scale.check_sft(HERE, f"ilvr_{stage}") for stage in ("stage1", "stage2")]
    if stages[0].latent != stages[1].latent:
        raise ConfigError(
            "the stages differ in their latents",
            where="latent",
            got=stages[1].latent,
            expected=str(stages[0].latent),
        )
    print(
        "ilvr_stage1, ilvr_stage2 and ilvr_grpo: valid "
        f"({grpo.trainer.n_gpus_per_node} GPUs a node)"
    )
    for stage in stages:
        paper_scale.show_sft_memory(HERE, stage.method, MODEL_JSON, paper_scale.num_gpus_of(grpo))
    paper_scale.show_grpo_memory("ilvr_grpo", MODEL_JSON, grpo)
    length = grpo.data.max_response_length
    latents = stages[0].latent
    shapes = paper_scale.check_shapes(
        MODEL_JSON, FIRST_FREE_ID, tuple(ILVR.published_tokens.values()), latents.make, length
    )
    paper_scale.show_shapes(MODEL_JSON.stem, shapes)


if __name__ == "__main__":
    main(sys.argv[1:])
