#!/usr/bin/env bash
# verl 0.9.1 (with torch 2.13.0, numpy 2.3.5), seen on 2026-11-29.
#
# Guess: adv_estimator=grpo gives a group of equal rewards the advantage 0, or 1e-7 from rounding: (r - mean) / (std + 1e-6)
#        has 0 above.
# Seen:  the float32 mean of G equal numbers need not be that number, and both the difference and the std are as large as the
#        error of it, beside which 1e-6 is little. Eight rewards of 0.7 get +0.056 each, of 10.1 +0.47, of 100.1 +0.83 (AVX2). All
#        members have the same sign, that of the rounding. Numbers that float32 adds exactly, such as 0, 7 or 0.5, get 0.
#
# Means: a run whose reward has a part that is no binary fraction (a format bonus of 0.1, a length over its limit, a mean of
#        three terms) is pushed by groups that should be silent, and a count of advantages that are not 0 does not see that they are. grpo_latent/algo/advantages.py takes
#        the group's maximum off before anything is rounded: exactly 0 (tests/algo/test_advantages.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0 numpy==2.3.5
# only one function of one file is wanted: verl's other dependencies stay out
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "$folder/verl" verl==0.9.1
"$folder/venv/bin/python" - "$folder/verl/verl/trainer/ppo/core_algos.py" <<'PYTHON'
import ast
import sys
from collections import defaultdict
from typing import Any, Optional

import numpy as np
import torch

NAME = "compute_grpo_outcome_advantage"
(function,) = (node for node in ast.parse(open(sys.argv[1]).read()).body if getattr(node, "name", "") == NAME)
function.decorator_list = []
names = {"torch": torch, "np": np, "defaultdict": defaultdict, "Optional": Optional, "AlgoConfig": Any}
exec(compile(ast.Module([function], []), "core_algos", "exec"), names)
changed = False
for reward, least in ((7.0, 0.0), (0.5, 0.0), (0.7, 0.05), (10.1, 0.4), (100.1, 0.8)):
    most = 0.0
    for size in range(2, 17):  # in which of them the mean is exact depends on the order of its sum, so on the processor
        rewards = torch.full((size, 1), reward)  # completions of one token
        advantages, _ = names[NAME](rewards, torch.ones(size, 1), np.array(["a group"] * size))
        changed |= len(advantages.unique()) > 1
        most = max(most, advantages.abs().max().item())
    print(f"groups of 2 to 16 equal rewards of {reward}: an advantage of up to {most:.3f}, the same for all of its group")
    changed |= most < least if least else most > 0
sys.exit("changed: see above" if changed else 0)
PYTHON
