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
DATA=$OUT/data
CONFIGS=recipes/quickstart
source recipes/common.sh
case $KIND in
  read) ROWS=4096 LABELS=1 LENGTH=10 CHANCE=0.1 SFT_OVERRIDES=() ;;
  max) ROWS=2048 LABELS=4 LENGTH=16 CHANCE=0.19 SFT_OVERRIDES=(trainer.max_steps=240) ;; # both stages of recipes/ilvr
  *) echo "KIND=$KIND: expected read or max" >&2; exit 2 ;;
esac
begin

echo "== data and vision tower (seed $SEED)"
python -m grpo_latent.data.embedded.digits --out "$DATA" --seed "$SEED" --kinds "$KIND" --sft 0
if [ -z "$VISION" ]; then
  VISION=$OUT/vision
  python -m grpo_latent.data.embedded.vision_pretrain --out "$VISION" --seed "$SEED" --log-every 100
fi

REWARD='latent.reward.functions=[{path: reward/digits.py, kwargs: {variant: text}}]'
TEXT=("$REWARD" data.max_response_length=$LENGTH 'ablations=[]' leak_prompts=0 verdict.chance=$CHANCE)
NO_LATENTS=(latent.preflight.min_emission_rate=0 latent.usage.num_prompts=0 latent.alarm.min_frac_rollouts=0)

run() { # variant, overrides of GRPO
  local OUT=$OUT/$1
  begin
  echo "== $1: SFT"
  python -m grpo_latent.data.embedded.digits --out "$OUT/data" --seed "$SEED" --kinds "$KIND" --form "$1" \
    --sft $ROWS --labels-per-answer $LABELS --rl 0 --dev 0 --heldout 0
  sft digits_sft "$VISION" "$OUT/data/train_sft.parquet" "$OUT/sft" latent.visibility=full latent.max_spans=0 \
    latent.head=none loss.latent_weight=0 loss.latent_loss_norm=none "${SFT_OVERRIDES[@]}"
  evaluate digits_evaluate "$OUT/sft/model" sft "${TEXT[@]}"

  echo "== $1: GRPO"
  grpo digits_grpo "$OUT/sft/model" data.max_response_length=$LENGTH trainer.experiment_name="text_$1" \
    "${NO_LATENTS[@]}" "$REWARD" "${@:2}"
  evaluate_rl digits_evaluate "${TEXT[@]}"
  summarize --name "text_grpo, $1"
}

for VARIANT in $VARIANTS; do
  run "$VARIANT" "$@"
done

python - "$OUT" $VARIANTS <<'PYTHON'
import json, pathlib, sys

out, *variants = sys.argv[1:]
summary = {name: json.loads(pathlib.Path(out, name, "summary.json").read_text()) for name in variants}
pathlib.Path(out, "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
PYTHON
echo "$OUT/summary.json"
