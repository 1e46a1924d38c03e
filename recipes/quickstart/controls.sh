#!/usr/bin/env bash
# Controls of the quickstart, on the checkpoints and data of a finished run.sh:
#   random   the same GRPO with a reward that does not look at the completion
#   text     the same labels without boxes and latents: SFT on the answer alone, then GRPO on text, image in sight
#
#   SEED=0 OUT=outputs/quickstart bash recipes/quickstart/controls.sh [hydra overrides of both GRPO stages]
#
# Result: $OUT/controls.json
set -euo pipefail
cd "$(dirname "$0")/../.."
SEED=${SEED:-0}
OUT=${OUT:-outputs/quickstart}
HERE=recipes/quickstart
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
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
evaluate "$(last "$OUT/control_random")" "$OUT/control_random/evaluation.json"

echo "== control: text only"
TEXT_REWARD='latent.reward.functions=[{path: reward/digits.py, kwargs: {variant: text}}]'
rm -rf "$OUT/control_text"
python -m grpo_latent.data.digits --out "$OUT/control_text/data" --seed "$SEED" --no-boxes
python -m grpo_latent.sft --config-dir $HERE --config-name digits_sft model.path="$OUT/vision" \
  data.train_files="$OUT/control_text/data/train_sft.parquet" trainer.output_dir="$OUT/control_text/sft" \
  trainer.seed="$SEED" latent.visibility=full latent.max_spans=0 latent.head=none \
  loss.latent_weight=0 loss.latent_loss_norm=none
TEXT_EVALUATION=("$TEXT_REWARD" 'ablations=[]' leak_prompts=0)
evaluate "$OUT/control_text/sft/model" "$OUT/control_text/evaluation_sft.json" "${TEXT_EVALUATION[@]}"
grpo "$OUT/control_text/sft/model" "$OUT/control_text/grpo" "$TEXT_REWARD" latent.preflight.min_emission_rate=0 "$@"
evaluate "$(last "$OUT/control_text/grpo")" "$OUT/control_text/evaluation_grpo.json" "${TEXT_EVALUATION[@]}"

python - "$OUT" "$SEED" <<'PYTHON'
import json, pathlib, sys

out = pathlib.Path(sys.argv[1])
accuracy = lambda path: json.loads((out / path).read_text())["greedy"]["accuracy"]
controls = {
    "seed": int(sys.argv[2]),
    "random_reward": {"sft": accuracy("evaluation_sft.json"), "grpo": accuracy("control_random/evaluation.json")},
    "text_only": {
        "sft": accuracy("control_text/evaluation_sft.json"),
        "grpo": accuracy("control_text/evaluation_grpo.json"),
    },
}
(out / "controls.json").write_text(json.dumps(controls, indent=2) + "\n")
print(json.dumps(controls, indent=2))
PYTHON
