#!/usr/bin/env bash
# Controls of the quickstart, on the checkpoints and data of a finished run.sh:
#   random   the same GRPO with a reward that does not look at the completion
#   text     the same labels without boxes and latents: recipes/text_grpo's direct answer, on this run's vision tower
#
#   SEED=0 OUT=outputs/quickstart bash recipes/quickstart/controls.sh [hydra overrides of both GRPO stages]
#
# Result: $OUT/controls.json
set -euo pipefail
cd "$(dirname "$0")/../.."
SEED=${SEED:-0}
OUT=${OUT:-outputs/quickstart}
DATA=$OUT/data
CONFIGS=recipes/quickstart
source recipes/common.sh
[ -f "$OUT/summary.json" ] || { echo "no $OUT/summary.json: run recipes/quickstart/run.sh first" >&2; exit 1; }

random() {
  local CHECKPOINT=$OUT/sft/model OUT=$OUT/control_random
  begin
  grpo digits_grpo "$CHECKPOINT" 'latent.reward.functions=[{path: recipes/quickstart/random_reward.py}]' "$@"
  evaluate digits_evaluate "$(last_checkpoint "$OUT/grpo")" grpo 'ablations=[]' rollout.n=0 leak_prompts=0
}

echo "== control: random reward"
random "$@"

echo "== control: text only"
SEED=$SEED VARIANTS=direct VISION="$OUT/vision" OUT="$OUT/control_text" bash recipes/text_grpo/run.sh "$@"

python - "$OUT" "$SEED" <<'PYTHON'
import json, pathlib, sys

from grpo_latent.common.provenance import provenance

out = pathlib.Path(sys.argv[1])
accuracy = lambda path: json.loads((out / path).read_text())["greedy"]["accuracy"]
controls = {
    "seed": int(sys.argv[2]),
    "random_reward": {"sft": accuracy("evaluation_sft.json"), "grpo": accuracy("control_random/evaluation_grpo.json")},
    "text_only": {
        "sft": accuracy("control_text/direct/evaluation_sft.json"),
        "grpo": accuracy("control_text/direct/evaluation_grpo.json"),
    },
    "provenance": provenance(int(sys.argv[2])),
}
(out / "controls.json").write_text(json.dumps(controls, indent=2) + "\n")
print(json.dumps(controls, indent=2))
PYTHON
