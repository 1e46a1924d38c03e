#!/usr/bin/env bash
# The negative control of "are the latents used?": a checkpoint that reads the image and ignores its latents, though they
# point at the right digit. Needs the vision tower of a finished quickstart.
#
#   SEED=0 QUICKSTART=outputs/quickstart OUT=outputs/ignored_seed0 bash recipes/ignored_latents/run.sh [SFT overrides]
#
# Result: $OUT/evaluation.json, whose verdict is expected to be "not used".
set -euo pipefail
cd "$(dirname "$0")/../.."
SEED=${SEED:-0}
QUICKSTART=${QUICKSTART:-outputs/quickstart}
OUT=${OUT:-outputs/ignored_seed$SEED}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
[ -d "$QUICKSTART/vision" ] || { echo "no $QUICKSTART/vision: run recipes/quickstart/run.sh first" >&2; exit 1; }

rm -rf "$OUT"
python -m grpo_latent.data.embedded.digits --out "$OUT/data" --seed "$SEED" --labels-per-answer -1
python -m grpo_latent.sft --config-dir recipes/ignored_latents --config-name ignored_sft \
  model.path="$QUICKSTART/vision" data.train_files="$OUT/data/train_sft.parquet" \
  trainer.output_dir="$OUT/sft" trainer.seed="$SEED" "$@"
python -m grpo_latent.evaluate --config-dir recipes/quickstart --config-name digits_evaluate \
  model.path="$OUT/sft/model" data.val_files="$OUT/data/heldout.parquet" output="$OUT/evaluation.json" seed="$SEED" \
  'ablations=[zero,noise,shuffle,mean,image_swap,markers_only,no_span,image_blind_after_span,oracle]'
