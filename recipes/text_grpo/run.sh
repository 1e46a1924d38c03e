#!/usr/bin/env bash
# The matched baselines without latents, with the quickstart's data, labels, model and GRPO; text sees the image throughout.
#   direct      <answer> 7 </answer>             the same answers, no boxes
#   text_boxes  r1 c2 <answer> 7 </answer>       the same answers, and the same boxes on all rows, in words
#
#   SEED=0 OUT=outputs/text_grpo bash recipes/text_grpo/run.sh [hydra overrides of both GRPO stages]
#
# KIND=max asks recipes/ilvr's two-object questions instead, with its labels. VISION=<folder> takes a pretrained vision tower.
# Result: $OUT/summary.json, one entry a variant in the quickstart's schema; $OUT/<variant>/ holds each run.
set -euo pipefail
cd "$(dirname "$0")/../.."
SEED=${SEED:-0}
OUT=${OUT:-outputs/text_grpo}
KIND=${KIND:-read}
VARIANTS=${VARIANTS:-direct text_boxes}
VISION=${VISION:-}
CONFIGS=recipes/quickstart
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
case $KIND in
  read) ROWS=4096 LABELS=1 LENGTH=10 SFT_OVERRIDES=() ;;
  max) ROWS=2048 LABELS=4 LENGTH=16 SFT_OVERRIDES=(trainer.max_steps=240) ;; # both stages of recipes/ilvr
  *) echo "KIND=$KIND: expected read or max" >&2; exit 2 ;;
esac

rm -rf "$OUT"
mkdir -p "$OUT"

echo "== data and vision tower (seed $SEED)"
python -m grpo_latent.data.digits --out "$OUT/data" --seed "$SEED" --kinds "$KIND" --sft 0
if [ -z "$VISION" ]; then
  VISION=$OUT/vision
  python -m grpo_latent.data.vision_pretrain --out "$VISION" --seed "$SEED" --log-every 100
fi

REWARD='latent.reward.functions=[{path: reward/digits.py, kwargs: {variant: text}}]'
evaluate() { # checkpoint, output
  python -m grpo_latent.evaluate --config-dir $CONFIGS --config-name digits_evaluate model.path="$1" output="$2" \
    data.val_files="$OUT/data/heldout.parquet" data.max_response_length=$LENGTH seed="$SEED" \
    "$REWARD" 'ablations=[]' leak_prompts=0
}

for VARIANT in $VARIANTS; do
  RUN=$OUT/$VARIANT
  STARTED=$(date +%s)
  echo "== $VARIANT: SFT"
  python -m grpo_latent.data.digits --out "$RUN/data" --seed "$SEED" --kinds "$KIND" --form "$VARIANT" \
    --sft $ROWS --labels-per-answer $LABELS --rl 0 --dev 0 --heldout 0
  python -m grpo_latent.sft --config-dir $CONFIGS --config-name digits_sft model.path="$VISION" \
    data.train_files="$RUN/data/train_sft.parquet" trainer.output_dir="$RUN/sft" trainer.seed="$SEED" \
    latent.visibility=full latent.max_spans=0 latent.head=none loss.latent_weight=0 loss.latent_loss_norm=none \
    "${SFT_OVERRIDES[@]}"
  evaluate "$RUN/sft/model" "$RUN/evaluation_sft.json"

  echo "== $VARIANT: GRPO"
  GRPO_STARTED=$(date +%s)
  python -m grpo_latent.train --config-dir $CONFIGS --config-name digits_grpo \
    actor_rollout_ref.model.path="$RUN/sft/model" data.train_files="$OUT/data/train_rl.parquet" \
    data.val_files="$OUT/data/dev.parquet" data.max_response_length=$LENGTH latent.output_dir="$RUN/grpo" \
    latent.seed="$SEED" trainer.experiment_name="text_$VARIANT" latent.preflight.min_emission_rate=0 "$REWARD" "$@"
  GRPO_SECONDS=$(($(date +%s) - GRPO_STARTED))
  STEP=$(cat "$RUN/grpo/checkpoints/latest_checkpointed_iteration.txt")
  evaluate "$RUN/grpo/checkpoints/global_step_$STEP/actor/huggingface" "$RUN/evaluation_grpo.json"
  python recipes/summarize.py "$RUN" --name "text_grpo, $VARIANT" --seed "$SEED" --grpo-seconds $GRPO_SECONDS \
    --seconds-total $(($(date +%s) - STARTED))
done

python - "$OUT" $VARIANTS <<'PYTHON'
import json, pathlib, sys

out, *variants = sys.argv[1:]
summary = {name: json.loads(pathlib.Path(out, name, "summary.json").read_text()) for name in variants}
pathlib.Path(out, "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
PYTHON
echo "$OUT/summary.json"
