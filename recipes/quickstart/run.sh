#!/usr/bin/env bash
# The embedded experiment end to end on two CPU cores: vision pretraining, LVR SFT with ten answers, latent GRPO,
# evaluation with ablations. Starts anew each time.
#
#   SEED=0 OUT=outputs/quickstart bash recipes/quickstart/run.sh [hydra overrides of the GRPO stage]
#   ROLLOUT=vllm bash recipes/quickstart/run.sh    # rollouts by vLLM (make vllm); its kernels take no attention mask, so
#                                                  # text sees the image throughout and the latents are not needed
#
# Result: $OUT/summary.json, $OUT/learning_curve.png, $OUT/grpo/config.yaml
set -euo pipefail
cd "$(dirname "$0")/../.."
SEED=${SEED:-0}
OUT=${OUT:-outputs/quickstart}
ROLLOUT=${ROLLOUT:-hf}
DATA=$OUT/data
CONFIGS=recipes/quickstart
source recipes/common.sh

case $ROLLOUT in
  hf) SFT_OVERRIDES=() GRPO_OVERRIDES=() ;;
  vllm) SFT_OVERRIDES=(latent.visibility=full) GRPO_OVERRIDES=(actor_rollout_ref.rollout.name=vllm_latent)
    python -c "from grpo_latent.rollout.vllm.supported import check_installed; check_installed()" ;;
  *) echo "ROLLOUT=$ROLLOUT: expected hf or vllm" >&2; exit 2 ;;
esac

begin

echo "== data and vision tower (seed $SEED)"
beside "$OUT/data.log" python -m grpo_latent.data.embedded.digits --out "$DATA" --seed "$SEED"
python -m grpo_latent.data.embedded.vision_pretrain --out "$OUT/vision" --seed "$SEED" --log-every 100
join

echo "== SFT: boxes on 4096 images, the answer on ten of them"
sft digits_sft "$OUT/vision" "$DATA/train_sft.parquet" "$OUT/sft" "${SFT_OVERRIDES[@]}"
beside "$OUT/evaluation_sft.log" \
  evaluate digits_evaluate "$OUT/sft/model" sft 'ablations=[shuffle, oracle]' rollout.n=0 leak_prompts=0 # while Ray starts

echo "== GRPO over latent trajectories"
grpo digits_grpo "$OUT/sft/model" "${GRPO_OVERRIDES[@]}" "$@"
join
evaluate_rl digits_evaluate
summarize
echo "next: grpo-latent inspect $OUT    # one page of what it did, made in a minute or two"
