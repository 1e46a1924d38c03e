#!/usr/bin/env bash
# Each RL treatment of latent positions: one GRPO run from one SFT checkpoint, then evaluation with ablations.
# Data, vision tower and SFT are the quickstart's: those of BASE, or made under $OUT/base where BASE has none.
#
#   SEED=0 STEPS=30 OUT=outputs/treatments bash recipes/treatments/run.sh [hydra overrides of every GRPO run]
#   TREATMENTS="gaussian recompute_bptt" bash recipes/treatments/run.sh    only these; the table keeps earlier rows
#   TREATMENTS="gaussian_head vmf" bash recipes/treatments/run.sh              two more, not in the README's table
#
# Result: $OUT/summary.json, one row a treatment
set -euo pipefail
cd "$(dirname "$0")/../.."
SEED=${SEED:-0}
STEPS=${STEPS:-30}
OUT=${OUT:-outputs/treatments}
BASE=${BASE:-outputs/quickstart}
TREATMENTS=${TREATMENTS:-mask recompute_cut recompute_one_hop recompute_bptt gaussian gumbel_soft mask_anchor}
CONFIGS=recipes/quickstart
source recipes/common.sh
mkdir -p "$OUT"
if [ -f "$BASE/summary.json" ] && [ "$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["seed"])' "$BASE/summary.json")" != "$SEED" ]; then
  echo "$BASE is a run of another seed than SEED=$SEED: set BASE, or BASE=none to make data and SFT anew" >&2; exit 2
fi

if [ ! -f "$BASE/sft/model/latent_config.json" ]; then
  BASE=$OUT/base_seed$SEED
  if [ ! -f "$BASE/sft/model/latent_config.json" ]; then
    python -m grpo_latent.data.embedded.digits --out "$BASE/data" --seed "$SEED"
    python -m grpo_latent.data.embedded.vision_pretrain --out "$BASE/vision" --seed "$SEED" --log-every 100
    sft digits_sft "$BASE/vision" "$BASE/data/train_sft.parquet" "$BASE/sft"
  fi
fi
DATA=$BASE/data

# sigma 0.1 is a third of a latent's component here (norm 3.8, hidden size 128); divided by the hidden size, the latent term's
# gradient does not drown the text's under clip_grad
overrides_of() {
  case $1 in
    mask) ;;
    recompute_cut | recompute_one_hop | recompute_bptt)
      echo latent.treatment.name=recompute "latent.treatment.recompute.gradient=${1#recompute_}" ;;
    gaussian)
      echo latent.treatment.name=gaussian latent.treatment.gaussian.sigma=0.1 latent.treatment.gaussian.per_dimension=true ;;
    gaussian_head)
      echo latent.treatment.name=gaussian_head latent.treatment.gaussian_head.sigma=0.1 \
        latent.treatment.gaussian_head.per_dimension=true ;;
    vmf) echo latent.treatment.name=vmf latent.treatment.vmf.kappa=2000 ;;
    gumbel_soft) echo latent.treatment.name=gumbel_soft ;;
    mask_anchor)
      echo latent.treatment.anchor_weight=0.1 ;;
    *) echo "unknown treatment $1" >&2; exit 2 ;;
  esac
}

run() { # name, overrides of every run
  local name=$1 checkpoint=$BASE/sft/model fed=mask overrides
  overrides=$(overrides_of "$name")
  if [ "$name" = gumbel_soft ]; then # feeds token embeddings, so it starts from an SFT without a head on h
    checkpoint=$OUT/sft_without_head_seed$SEED/model fed=gumbel_soft
    [ -f "$checkpoint/latent_config.json" ] ||
      sft digits_sft "$BASE/vision" "$DATA/train_sft.parquet" "$OUT/sft_without_head_seed$SEED" latent.head=none
  fi
  local OUT=$OUT/$name
  begin
  echo "== $name"
  evaluate digits_evaluate "$checkpoint" sft latent.treatment.name=$fed
  # shellcheck disable=SC2086
  grpo digits_grpo "$checkpoint" trainer.total_training_steps="$STEPS" trainer.save_freq="$STEPS" $overrides "${@:2}"
  evaluate digits_evaluate "$(last_checkpoint "$OUT/grpo")" grpo latent.treatment.name=$fed
  echo "{\"treatment\": \"$name\", \"overrides\": \"$overrides\", \"seed\": $SEED, \"seconds\": $GRPO_SECONDS}" > "$OUT/run.json"
}

FAILED=()
for name in $TREATMENTS; do # a run that fails is reported, and the others go on
  set +e # `(…) ||` would switch -e off inside, too
  (set -e; run "$name" "$@")
  [ $? -eq 0 ] || FAILED+=("$name")
  set -e
done
python recipes/treatments/table.py "$OUT" --seed "$SEED"
[ ${#FAILED[@]} -eq 0 ] || { echo "failed: ${FAILED[*]}" >&2; exit 1; }
