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
DATA=$OUT/data
CONFIGS=recipes/ivt_lr
source recipes/common.sh
begin

LABELS=(--kinds max --sft 1024 --labels-per-answer -1)
echo "== data and vision tower (seed $SEED)"
python -m grpo_latent.data.embedded.digits --out "$DATA" --seed "$SEED" "${LABELS[@]}" --steps short
python -m grpo_latent.data.embedded.digits --out "$OUT/data_direct" --seed "$SEED" "${LABELS[@]}" --steps none --rl 0 --dev 0 --heldout 0
python -m grpo_latent.data.embedded.vision_pretrain --out "$OUT/vision" --seed "$SEED" --log-every 100

# stages that write steps out, and the control, may have text before the answer, and need no slots
TEXT=('latent.reward.functions=[{path: reward/digits.py, kwargs: {variant: text}}]' 'ablations=[]' rollout.n=0)

control() { # the same answers, no rationale, no slots
  sft digits_sft "$OUT/vision" "$OUT/data_direct/train_sft.parquet" "$OUT/direct" \
    latent.steps=0 'loss.steps_per_stage=[]' loss.save_stages=false
  evaluate digits_evaluate "$OUT/direct/model" direct "${TEXT[@]}"
}
beside "$OUT/direct.log" control # on the other core

echo "== SFT curriculum: 1024 questions with rationale and answer"
sft digits_sft "$OUT/vision" "$DATA/train_sft.parquet" "$OUT/sft"
evaluate digits_evaluate "$OUT/sft/stage_0" stage0 "${TEXT[@]}"
evaluate digits_evaluate "$OUT/sft/stage_1" stage1 "${TEXT[@]}"
evaluate digits_evaluate "$OUT/sft/model" stage2

echo "== GRPO over latent trajectories"
grpo digits_grpo "$OUT/sft/model" "$@"
evaluate_rl digits_evaluate
join
summarize --name ivt_lr --stages stage0 stage1 stage2 --controls direct
