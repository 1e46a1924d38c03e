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
HERE=recipes/quickstart
export SEED OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
[ -f "$OUT/summary.json" ] || { echo "no $OUT/summary.json: run recipes/quickstart/run.sh first" >&2; exit 1; }

grpo() { # checkpoint, output folder, overrides
  python -m grpo_latent.train --config-dir $HERE --config-name digits_grpo \
    actor_rollout_ref.model.path="$1" data.train_files="$OUT/data/train_rl.parquet" \
    data.val_files="$OUT/data/dev.parquet" latent.output_dir="$2" latent.seed="$SEED" trainer.resume_mode=disable "${@:3}"
}
evaluate() { # checkpoint, output, overrides
  python -m grpo_latent.evaluate --config-dir $HERE --config-name digits_evaluate \
    model.path="$1" data.val_files="$OUT/data/heldout.parquet" output="$2" seed="$SEED" "${@:3}"
}
last() { echo "$1/checkpoints/global_step_$(cat "$1/checkpoints/latest_checkpointed_iteration.txt")/actor/huggingface"; }

echo "== control: random reward"
rm -rf "$OUT/control_random"
grpo "$OUT/sft/model" "$OUT/control_random" 'latent.reward.functions=[{path: recipes/quickstart/random_reward.py}]' "$@"
evaluate "$(last "$OUT/control_random")" "$OUT/control_random/evaluation.json" 'ablations=[]' rollout.n=0 leak_prompts=0

echo "== control: text only"
VARIANTS=direct VISION="$OUT/vision" OUT="$OUT/control_text" bash recipes/text_grpo/run.sh "$@"

python - "$OUT" "$SEED" <<'PYTHON'
import json, pathlib, sys

out = pathlib.Path(sys.argv[1])
accuracy = lambda path: json.loads((out / path).read_text())["greedy"]["accuracy"]
controls = {
    "seed": int(sys.argv[2]),
    "random_reward": {"sft": accuracy("evaluation_sft.json"), "grpo": accuracy("control_random/evaluation.json")},
    "text_only": {
        "sft": accuracy("control_text/direct/evaluation_sft.json"),
        "grpo": accuracy("control_text/direct/evaluation_grpo.json"),
    },
}
(out / "controls.json").write_text(json.dumps(controls, indent=2) + "\n")
print(json.dumps(controls, indent=2))
PYTHON
