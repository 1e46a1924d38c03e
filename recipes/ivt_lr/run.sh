#!/usr/bin/env bash
# IVT-LR end to end on two CPU cores, on the embedded two-object task ("max red blue ?"): vision pretraining, the curriculum
# (stage s: the first s steps of the rationale are slots), GRPO, evaluation with ablations of the slots' text and vision, and
# the control that answers directly, trained on the same labels for as many steps. Starts anew each time.
#
#   SEED=0 OUT=outputs/ivt_lr bash recipes/ivt_lr/run.sh [hydra overrides of the GRPO stage]
#
# Result: $OUT/summary.json (one `sft` entry a stage), $OUT/learning_curve.png, $OUT/grpo/config.yaml
#
# Expect, held out, seeds 0 / 1: stages 0.333 0.545 0.748 / 0.370 0.757 0.746, the direct control 0.380 / 0.407, after GRPO
# 0.813 / 0.802. Another question's slots cost little (0.753 / 0.764): the text still sees the image.
set -euo pipefail
cd "$(dirname "$0")/../.."
SEED=${SEED:-0}
OUT=${OUT:-outputs/ivt_lr}
HERE=recipes/ivt_lr
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

rm -rf "$OUT"
mkdir -p "$OUT"
STARTED=$(date +%s)

LABELS=(--kinds max --sft 1024 --labels-per-answer -1)
echo "== data and vision tower (seed $SEED)"
python -m grpo_latent.data.digits --out "$OUT/data" --seed "$SEED" "${LABELS[@]}" --steps short
python -m grpo_latent.data.digits --out "$OUT/data_direct" --seed "$SEED" "${LABELS[@]}" --steps none --rl 0 --dev 0 --heldout 0
python -m grpo_latent.data.vision_pretrain --out "$OUT/vision" --seed "$SEED" --log-every 100

sft() { # folder of the data, output, overrides
  python -m grpo_latent.sft --config-dir $HERE --config-name digits_sft model.path="$OUT/vision" \
    data.train_files="$OUT/$1/train_sft.parquet" trainer.output_dir="$OUT/$2" trainer.seed="$SEED" "${@:3}"
}
evaluate() { # name, checkpoint, overrides
  python -m grpo_latent.evaluate --config-dir $HERE --config-name digits_evaluate model.path="$2" \
    data.val_files="$OUT/data/heldout.parquet" output="$OUT/evaluation_$1.json" seed="$SEED" "${@:3}"
}
# stages that write steps out, and the control, may have text before the answer, and need no slots
TEXT=('latent.reward.functions=[{path: reward/digits.py, kwargs: {variant: text}}]' 'ablations=[]' rollout.n=0)

control() { # the same answers, no rationale, no slots
  sft data_direct direct latent.steps=0 'loss.steps_per_stage=[]' loss.save_stages=false
  evaluate direct "$OUT/direct/model" "${TEXT[@]}"
}
control > "$OUT/direct.log" 2>&1 & # on the other core
CONTROL=$!
trap 'kill $CONTROL 2> /dev/null || true' EXIT

echo "== SFT curriculum: 1024 questions with rationale and answer"
sft data sft
evaluate stage0 "$OUT/sft/stage_0" "${TEXT[@]}"
evaluate stage1 "$OUT/sft/stage_1" "${TEXT[@]}"
evaluate stage2 "$OUT/sft/model"

echo "== GRPO over latent trajectories"
GRPO_STARTED=$(date +%s)
python -m grpo_latent.train --config-dir $HERE --config-name digits_grpo \
  actor_rollout_ref.model.path="$OUT/sft/model" \
  data.train_files="$OUT/data/train_rl.parquet" data.val_files="$OUT/data/dev.parquet" \
  latent.output_dir="$OUT/grpo" latent.seed="$SEED" "$@"
GRPO_SECONDS=$(($(date +%s) - GRPO_STARTED))
STEP=$(cat "$OUT/grpo/checkpoints/latest_checkpointed_iteration.txt")
evaluate grpo "$OUT/grpo/checkpoints/global_step_$STEP/actor/huggingface"

wait $CONTROL || { echo "the control failed: $OUT/direct.log" >&2; exit 1; }
python recipes/summarize.py "$OUT" --name ivt_lr --stages stage0 stage1 stage2 --controls direct --seed "$SEED" \
  --grpo-seconds "$GRPO_SECONDS" --seconds-total $(($(date +%s) - STARTED))
