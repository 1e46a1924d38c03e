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
HERE=recipes/quickstart
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

case $ROLLOUT in
  hf) SFT_OVERRIDES=() GRPO_OVERRIDES=() ;;
  vllm) # the use of latents is measured by engine hf: after training, not during it
    SFT_OVERRIDES=(latent.visibility=full)
    GRPO_OVERRIDES=(actor_rollout_ref.rollout.name=vllm_latent latent.usage.num_prompts=0) ;;
  *) echo "ROLLOUT=$ROLLOUT: expected hf or vllm" >&2; exit 2 ;;
esac

rm -rf "$OUT"
mkdir -p "$OUT"
STARTED=$(date +%s)

echo "== data and vision tower (seed $SEED)"
python -m grpo_latent.data.digits --out "$OUT/data" --seed "$SEED" &
python -m grpo_latent.data.vision_pretrain --out "$OUT/vision" --seed "$SEED" --log-every 100
wait $!

echo "== SFT: boxes on 4096 images, the answer on ten of them"
python -m grpo_latent.sft --config-dir $HERE --config-name digits_sft \
  model.path="$OUT/vision" data.train_files="$OUT/data/train_sft.parquet" \
  trainer.output_dir="$OUT/sft" trainer.seed="$SEED" "${SFT_OVERRIDES[@]}"

evaluate() { # checkpoint, output, overrides
  python -m grpo_latent.evaluate --config-dir $HERE --config-name digits_evaluate \
    model.path="$1" data.val_files="$OUT/data/heldout.parquet" output="$2" seed="$SEED" "${@:3}"
}
evaluate "$OUT/sft/model" "$OUT/evaluation_sft.json" 'ablations=[shuffle, oracle]' rollout.n=0 leak_prompts=0 \
  > "$OUT/evaluation_sft.log" 2>&1 & # while Ray starts
EVALUATION=$!

echo "== GRPO over latent trajectories"
GRPO_STARTED=$(date +%s)
python -m grpo_latent.train --config-dir $HERE --config-name digits_grpo \
  actor_rollout_ref.model.path="$OUT/sft/model" \
  data.train_files="$OUT/data/train_rl.parquet" data.val_files="$OUT/data/dev.parquet" \
  latent.output_dir="$OUT/grpo" latent.seed="$SEED" "${GRPO_OVERRIDES[@]}" "$@"
GRPO_SECONDS=$(($(date +%s) - GRPO_STARTED))

wait $EVALUATION || { cat "$OUT/evaluation_sft.log"; exit 1; }
STEP=$(cat "$OUT/grpo/checkpoints/latest_checkpointed_iteration.txt")
evaluate "$OUT/grpo/checkpoints/global_step_$STEP/actor/huggingface" "$OUT/evaluation_grpo.json"

python recipes/summarize.py "$OUT" --seed "$SEED" --grpo-seconds "$GRPO_SECONDS" \
  --seconds-total $(($(date +%s) - STARTED))
