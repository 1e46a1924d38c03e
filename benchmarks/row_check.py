"""`python benchmarks/row_check.py`: what the check of all rows before a run costs.

CPU seconds of one process for rows of the embedded task (one picture of 56 x 56 each), as the
quickstart trains on them: when a file is new, and when its digest is known.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from grpo_latent.data.checks import check_files
from grpo_latent.data.embedded import digits
from grpo_latent.models import tiny
from grpo_latent.models.prompts import PromptLength

NUM_ROWS = (2_000, 10_000)


def main() -> None:
    _, tokenizer, processor = tiny.tiny_qwen2_5_vl(digits.WORDS)
    length = PromptLength(tokenizer, processor)
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = name  # nothing is known yet
        for num_rows in NUM_ROWS:
            path = Path(name) / f"{num_rows}.parquet"
            examples = digits.generate(num_rows, stream="rl", seed=0)
            digits.write_verl_parquet(path, digits.to_rows(examples, "rl"))
            for state in ("new", "known"):
                start = time.process_time()
                check_files([path], length)
                print(f"{num_rows} rows, {state}: {time.process_time() - start:.2f} CPU s")


if __name__ == "__main__":
    main()
