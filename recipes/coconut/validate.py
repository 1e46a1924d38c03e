"""Checks recipes/coconut at paper scale without weights or GPU.

Its configs compose, their options agree, and shapes hold on the meta device.

python recipes/coconut/validate.py [hydra overrides of GRPO]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # recipes are scripts, not a package
import paper_scale  # noqa: E402

HERE = Path(__file__).parent
MODEL_JSON = HERE / "models" / "qwen3_0_6b.json"
# after the tokens of Qwen3's tokenizer; its embedding table has rows to spare
FIRST_FREE_ID = 151669


def main(overrides: list[str]) -> None:
    paper_scale.validate_curriculum(HERE, "coconut", MODEL_JSON, FIRST_FREE_ID, overrides)


if __name__ == "__main__":
    main(sys.argv[1:])
