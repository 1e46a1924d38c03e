#!/usr/bin/env bash
# datasets 5.2.0 (with pyarrow 26.0.1, pandas 3.1.1), seen on 2026-11-28.
#
# Guess: a JSON string read by load_dataset("json") is that string.
# Seen:  where *all* strings of a field look like dates, also inside a struct, they come back as datetime: "2026-11-28" is
#        datetime(2026, 11, 28, 0, 0), whose text is another. One row with another text, and all of the file stay strings.
#        So what a row is depends on its neighbours, and on where a file was cut into train and test.
#
# Means: verl reads JSON so; the ground truth "2026-11-28" reaches the reward as "2026-11-28 00:00:00" or as a datetime, and
#        no answer is right. grpo_latent/data/files.py reads JSON by Python's reader (tests/data/test_checks.py,
#        test_json_keeps_texts_as_they_are).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1
HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys
from pathlib import Path

import datasets

datasets.disable_progress_bars()
folder = Path(sys.argv[1])
cases = {
    "dates": (["2026-11-28", "2026-11-29"], "datetime"),
    "a year among them": (["2026-11-28", "2026"], "str"),
    "a word among them": (["2026-11-28", "unknown"], "str"),
    "times": (["12:30", "13:00"], "str"),
    "leading zeros": (["007", "008"], "str"),
}
changed = False
for name, (texts, expected) in cases.items():
    path = folder / f"{name.replace(' ', '_')}.jsonl"
    path.write_text("".join(json.dumps({"reward_model": {"ground_truth": text}}) + "\n" for text in texts))
    table = datasets.load_dataset("json", data_files=str(path))["train"]
    read = [row["reward_model"]["ground_truth"] for row in table]
    print(f"{name:18} {texts} -> {read}")
    changed |= {type(value).__name__ for value in read} != {expected}
sys.exit("changed: see above" if changed else 0)
PYTHON
