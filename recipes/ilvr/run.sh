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
DATA=$OUT/data
CONFIGS=recipes/ilvr
source recipes/common.sh
begin

echo "== data and vision tower (seed $SEED)"
write_data() {
  python -m grpo_latent.data.embedded.digits --out "$DATA" --seed "$SEED" --kinds max --sft 0
  python -m grpo_latent.data.embedded.digits_ilvr --out "$DATA" --seed "$SEED" --kinds max
}
beside "$OUT/data.log" write_data
python -m grpo_latent.data.embedded.vision_pretrain --out "$OUT/vision" --seed "$SEED" --log-every 100
join

echo "== SFT stage 1: the momentum teacher's targets"
sft digits_stage1 "$OUT/vision" "$DATA/train_sft.jsonl" "$OUT/stage1"
beside "$OUT/evaluation_stage1.log" evaluate digits_evaluate "$OUT/stage1/model" stage1
echo "== SFT stage 2: self-fed latents"
sft digits_stage2 "$OUT/stage1/model" "$DATA/train_sft.jsonl" "$OUT/stage2"
join
beside "$OUT/evaluation_stage2.log" evaluate digits_evaluate "$OUT/stage2/model" stage2 # while Ray starts

echo "== GRPO over latent trajectories"
grpo digits_grpo "$OUT/stage2/model" "$@"
join
evaluate_rl digits_evaluate
summarize --name ilvr --stages stage1 stage2
