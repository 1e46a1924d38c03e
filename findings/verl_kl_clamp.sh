#!/usr/bin/env bash
# verl 0.9.1 (with torch 2.13.0), seen on 2026-11-28.
#
# Guess: kl_loss_type=low_var_kl pulls a token back the harder, the further it lies below its reference: the gradient of
#        e^d - d - 1 with d = ref - log_prob is 1 - e^d.
# Seen:  its value is clamped at 10, and torch's clamp has no gradient there. A token 2.5 nats below is pulled with -11.2, one
#        of 2.7 nats or more with 0: those that drifted furthest are let go. So is one that lies 12 nats above.
#
# Means: a KL loss against collapse leaves out what collapses. In the quickstart of this project the same coefficient ended at
#        0.854 and 0.884 with the clamp and at 0.947 without. kl_loss_type=low_var_kl_unclamped (worker/algo.py: text_kl;
#        tests/verl_plugin/worker/test_algo_against_verl.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0 numpy
# only two functions of one file are wanted: verl's other dependencies stay out
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "$folder/verl" verl==0.9.1
"$folder/venv/bin/python" - "$folder/verl/verl/trainer/ppo/core_algos.py" <<'PYTHON'
import ast
import sys

import torch

tree = ast.parse(open(sys.argv[1]).read())
wanted = [node for node in tree.body if getattr(node, "name", "") in ("kl_penalty", "kl_penalty_forward")]
names = {"torch": torch}
exec(compile(ast.Module(wanted, []), "core_algos", "exec"), names)
changed = False
for below, is_pulled in ((0.5, True), (2.5, True), (2.7, False), (6.0, False), (-8.0, True), (-12.0, False)):
    log_prob = torch.tensor([-1.0 - below], requires_grad=True)
    value = names["kl_penalty"](log_prob, torch.tensor([-1.0]), "low_var_kl")
    value.sum().backward()
    gradient = log_prob.grad.item()
    print(f"{below:5} nats below the reference: value {value.item():6.2f}, gradient {gradient:7.2f}")
    changed |= (gradient != 0) != is_pulled
sys.exit("changed: see above" if changed else 0)
PYTHON
