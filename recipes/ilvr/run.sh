#!/usr/bin/env bash
# ILVR end to end on two CPU cores, on the embedded two-object task ("max red blue ?"): vision pretraining, SFT stage 1 with
# the momentum teacher, stage 2 with self-fed latents, GRPO, evaluation with ablations of each span. Starts anew each time.
#
#   SEED=0 OUT=outputs/ilvr bash recipes/ilvr/run.sh [hydra overrides of the GRPO stage]
#
# Result: $OUT/summary.json (one `sft` entry a stage), $OUT/learning_curve.png, $OUT/grpo/config.yaml
set -euo pipefail
cd "$(dirname "$0")/../.."
SEED=${SEED:-0}
OUT=${OUT:-outputs/ilvr}
HERE=recipes/ilvr
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

rm -rf "$OUT"
mkdir -p "$OUT"
STARTED=$(date +%s)

echo "== data and vision tower (seed $SEED)"
write_data() {
  python -m grpo_latent.data.digits --out "$OUT/data" --seed "$SEED" --kinds max --sft 0
  python -m grpo_latent.data.digits_ilvr --out "$OUT/data" --seed "$SEED" --kinds max
}
write_data &
python -m grpo_latent.data.vision_pretrain --out "$OUT/vision" --seed "$SEED" --log-every 100
wait $!

sft() { # stage, checkpoint
  python -m grpo_latent.sft --config-dir $HERE --config-name "digits_$1" model.path="$2" \
    data.train_files="$OUT/data/train_sft.jsonl" trainer.output_dir="$OUT/$1" trainer.seed="$SEED"
}
evaluate() { # name, checkpoint
  python -m grpo_latent.evaluate --config-dir $HERE --config-name digits_evaluate \
    model.path="$2" data.val_files="$OUT/data/heldout.parquet" output="$OUT/evaluation_$1.json" seed="$SEED" \
    > "$OUT/evaluation_$1.log" 2>&1 || { cat "$OUT/evaluation_$1.log"; exit 1; }
}

echo "== SFT stage 1: the momentum teacher's targets"
sft stage1 "$OUT/vision"
evaluate stage1 "$OUT/stage1/model" & # beside stage 2
EVALUATION=$!
echo "== SFT stage 2: self-fed latents"
sft stage2 "$OUT/stage1/model"
wait $EVALUATION
evaluate stage2 "$OUT/stage2/model" & # while Ray starts
EVALUATION=$!

echo "== GRPO over latent trajectories"
GRPO_STARTED=$(date +%s)
python -m grpo_latent.train --config-dir $HERE --config-name digits_grpo \
  actor_rollout_ref.model.path="$OUT/stage2/model" \
  data.train_files="$OUT/data/train_rl.parquet" data.val_files="$OUT/data/dev.parquet" \
  latent.output_dir="$OUT/grpo" latent.seed="$SEED" "$@"
GRPO_SECONDS=$(($(date +%s) - GRPO_STARTED))
wait $EVALUATION
STEP=$(cat "$OUT/grpo/checkpoints/latest_checkpointed_iteration.txt")
evaluate grpo "$OUT/grpo/checkpoints/global_step_$STEP/actor/huggingface"

python recipes/summarize.py "$OUT" --name ilvr --stages stage1 stage2 --seed "$SEED" \
  --grpo-seconds "$GRPO_SECONDS" --seconds-total $(($(date +%s) - STARTED))
