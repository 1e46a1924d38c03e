"""Checks recipes/ivt_lr at paper scale without weights or GPU.

Its configs compose, their options agree, and shapes hold on the meta device.

python recipes/ivt_lr/validate.py [hydra overrides of GRPO]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # recipes are scripts, not a package
import paper_scale  # noqa: E402

HERE = Path(__file__).parent
MODEL_JSON = HERE / "models" / "qwen2_vl_7b.json"
# after the tokens of Qwen2-VL's tokenizer; its embedding table has rows to spare
FIRST_FREE_ID = 151657


def main(overrides: list[str]) -> None:
    paper_scale.validate_curriculum(HERE, "ivt_lr", MODEL_JSON, FIRST_FREE_ID, overrides)


if __name__ == "__main__":
    main(sys.argv[1:])
