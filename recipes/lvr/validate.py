"""Checks recipes/lvr at paper scale without weights or GPU.

Its configs compose, options agree, every shape holds and memory suffices.

python recipes/lvr/validate.py [hydra overrides of GRPO]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # recipes are scripts, not a package
import paper_scale  # noqa: E402

from grpo_latent.common.settings import build  # noqa: E402
from grpo_latent.latent.mechanisms import LVR, Mechanism  # noqa: E402
from grpo_latent.sft.common.latents import LVRLatents  # noqa: E402
from grpo_latent.verl_plugin.trainer.config_check import check_latents  # noqa: E402

HERE = Path(__file__).parent
FIRST_FREE_ID = 151665  # after the tokens of Qwen2.5-VL's tokenizer
LVR_TOKENS = tuple(LVR.published_tokens.values())


def make_mechanism(ids: dict[str, int]) -> Mechanism:
    latents = build(LVRLatents, {"head": "glu"}, "latent")
    return latents.make(ids, latent_end_token=latents.token_of("latent_end"))


def model_json(model_name: str) -> Path:
    return HERE / "models" / f"{model_name}.json"


def check_shapes(model_name: str, response_length: int) -> dict[str, tuple[int, ...]]:
    return paper_scale.check_shapes(
        model_json(model_name), FIRST_FREE_ID, LVR_TOKENS, make_mechanism, response_length
    )


def main(overrides: list[str]) -> None:
    mechanism = make_mechanism({token: idx for idx, token in enumerate(LVR_TOKENS)})
    for published in ("", "published_"):
        grpo = paper_scale.check_grpo(HERE, f"lvr_{published}grpo", overrides)
        check_latents(grpo, mechanism)
        paper_scale.check_sft(HERE, f"lvr_{published}sft")
    engine = grpo.actor_rollout_ref.rollout.name
    print(
        f"lvr_grpo and lvr_sft, published or not: valid ({grpo.trainer.n_gpus_per_node} GPUs a node, "
        f"rollouts by {engine})"
    )
    for model_name in ("qwen2_5_vl_3b", "qwen2_5_vl_7b"):
        num_gpus = paper_scale.num_gpus_of(grpo)
        paper_scale.show_sft_memory(HERE, "lvr_sft", model_json(model_name), num_gpus)
        paper_scale.show_grpo_memory("lvr_grpo", model_json(model_name), grpo)
        paper_scale.show_shapes(
            model_name, check_shapes(model_name, grpo.data.max_response_length)
        )


if __name__ == "__main__":
    main(sys.argv[1:])
