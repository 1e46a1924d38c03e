#!/usr/bin/env bash
# Coconut end to end on two CPU cores, text only: chains of four additions and multiplications modulo 7, the curriculum (stage
# s: the first s running totals are slots), GRPO with the gradient through the slots, evaluation with ablations of each slot,
# and the control that answers directly, trained on the same answers for as many steps. Starts anew each time.
#
#   SEED=0 OUT=outputs/coconut bash recipes/coconut/run.sh [hydra overrides of the GRPO stage]
#
# Result: $OUT/summary.json (one `sft` entry a stage), $OUT/learning_curve.png, $OUT/grpo/config.yaml
#
# Expect, held out, seed 0: stages 1.000 0.914 0.953 0.990 0.991, the direct control 0.143, after GRPO 0.992; another question's
# vector in any one slot 0.131 to 0.143, in all 0.143; guessing scores 0.143. SFT ends at 0.991, 0.955, 0.835 (seeds 0 to 2) and
# leaves GRPO little to do: 0.992, 0.963, 0.880 (docs/results.md). Six minutes on two crowded cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
SEED=${SEED:-0}
OUT=${OUT:-outputs/coconut}
DATA=$OUT/data
CONFIGS=recipes/coconut
source recipes/common.sh
begin

echo "== data and base model (seed $SEED)"
python $CONFIGS/arithmetic.py --out "$DATA" --model "$OUT/base" --seed "$SEED"

# stages that write totals out, and the control, may have text before the answer, and need no slots
TEXT=('latent.reward.functions=[{path: reward/digits.py, kwargs: {variant: text}}]' 'ablations=[]' rollout.n=0)

control() { # the same answers, no rationale, no slots
  sft chains_sft "$OUT/base" "$DATA/train_direct.parquet" "$OUT/direct" \
    latent.steps=0 'loss.steps_per_stage=[]' loss.save_stages=false
  evaluate chains_evaluate "$OUT/direct/model" direct "${TEXT[@]}"
}
beside "$OUT/direct.log" control # on the other core

echo "== SFT curriculum"
sft chains_sft "$OUT/base" "$DATA/train_sft.parquet" "$OUT/sft"
for STAGE in 0 1 2 3; do
  evaluate chains_evaluate "$OUT/sft/stage_$STAGE" stage$STAGE "${TEXT[@]}"
done
evaluate chains_evaluate "$OUT/sft/model" stage4

echo "== GRPO over latent trajectories"
grpo chains_grpo "$OUT/sft/model" "$@"
evaluate_rl chains_evaluate
join
summarize --name coconut --stages stage0 stage1 stage2 stage3 stage4 --controls direct
