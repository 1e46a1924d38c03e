#!/usr/bin/env bash
# Coconut on GPUs: the curriculum, GRPO, evaluation. Needs a Qwen3-0.6B folder and JSON files in Coconut's form, such as
# GSM8K-Aug: [{"question": …, "answer": …, "steps": […]}, …]
#   MODEL=/models/Qwen3-0.6B TRAIN=/data/gsm_train.json VAL=/data/gsm_valid.json \
#     bash recipes/coconut/paper.sh [hydra overrides of GRPO]
set -euo pipefail
cd "$(dirname "$0")/../.."
source recipes/last_checkpoint.sh
: "${MODEL:?a Hugging Face folder}" "${TRAIN:?JSON file}" "${VAL:?JSON file}"
OUT=${OUT:-outputs/coconut_gsm}
GPUS=${GPUS:-8}
python recipes/coconut/validate.py trainer.n_gpus_per_node="$GPUS" "$@"

python -m grpo_latent.data.formats.stepwise --format coconut_json --in "$TRAIN" --out "$OUT/data/train.parquet"
python -m grpo_latent.data.formats.stepwise --format coconut_json --in "$VAL" --out "$OUT/data/val.parquet" --split val

torchrun --nproc_per_node "$GPUS" -m grpo_latent.sft --config-dir recipes/coconut --config-name coconut_sft \
  model.path="$MODEL" data.train_files="$TRAIN" trainer.output_dir="$OUT/sft"

python -m grpo_latent.train --config-dir recipes/coconut --config-name coconut_grpo \
  actor_rollout_ref.model.path="$OUT/sft/model" data.train_files="$OUT/data/train.parquet" \
  data.val_files="$OUT/data/val.parquet" latent.output_dir="$OUT/grpo" trainer.n_gpus_per_node="$GPUS" "$@"

CHECKPOINT=$(last_checkpoint "$OUT/grpo")
python -m grpo_latent.evaluate model.path="$CHECKPOINT" \
  model.device=cuda model.dtype=bfloat16 data.val_files="$OUT/data/val.parquet" data.max_response_length=70 \
  reward.custom_reward_function.path=reward/accuracy.py leak_prompts=0 \
  'ablations=[zero,noise,shuffle,mean]' output="$OUT/evaluation.json"
