"""Checks the paper-scale configs of recipes/ivt_lr without weights or GPU: they compose, options agree, shapes hold.

python recipes/ivt_lr/validate.py [hydra overrides of GRPO]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # recipes are scripts, not a package
import paper_scale  # noqa: E402

from grpo_latent.latent.mechanisms import SLOT_TOKENS  # noqa: E402

HERE = Path(__file__).parent
MODEL_JSON = HERE / "models" / "qwen2_vl_7b.json"
FIRST_FREE_ID = 151657  # after the tokens of Qwen2-VL's tokenizer; its embedding table has rows to spare


def main(overrides: list[str]) -> None:
    sft = paper_scale.check_sft(HERE, "ivt_lr_sft")
    grpo = paper_scale.check_grpo(HERE, "ivt_lr_grpo", overrides)
    paper_scale.check_slots(sft, grpo)
    print(f"ivt_lr_sft and ivt_lr_grpo: valid ({grpo.trainer.n_gpus_per_node} GPUs a node)")
    paper_scale.show_memory(f"ivt_lr_sft of {MODEL_JSON.stem}", paper_scale.check_memory(MODEL_JSON, sft))
    length = grpo.data.max_response_length
    shapes = paper_scale.check_shapes(MODEL_JSON, FIRST_FREE_ID, SLOT_TOKENS, sft.latent.make_config, length)
    paper_scale.show_shapes(MODEL_JSON.stem, shapes)


if __name__ == "__main__":
    main(sys.argv[1:])
