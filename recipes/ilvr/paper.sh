#!/usr/bin/env bash
# ILVR on GPUs: both SFT stages, GRPO, evaluation. Needs a Qwen2.5-VL-7B folder and the published JSONL with its images.
#   MODEL=/models/Qwen2.5-VL-7B-Instruct TRAIN=/data/comt/TRAIN.jsonl VAL=/data/comt/TEST.jsonl IMAGES=/data/comt \
#     bash recipes/ilvr/paper.sh [hydra overrides of GRPO]
# RL_TRAIN names other questions for GRPO: JSONL of the same form, which needs no sequence_plan.
set -euo pipefail
cd "$(dirname "$0")/../.."
source recipes/last_checkpoint.sh
: "${MODEL:?a Hugging Face folder}" "${TRAIN:?ILVR JSONL}" "${VAL:?ILVR JSONL}" "${IMAGES:?what image paths are relative to}"
OUT=${OUT:-outputs/ilvr_7b}
GPUS=${GPUS:-8}
python recipes/ilvr/validate.py trainer.n_gpus_per_node="$GPUS" "$@"

rows() { python -m grpo_latent.data.formats.ilvr_jsonl --in "$1" --images "$IMAGES" --out "$2" --split "$3"; }
rows "${RL_TRAIN:-$TRAIN}" "$OUT/data/train.parquet" train
rows "$VAL" "$OUT/data/val.parquet" val

stage() { # config, model, output folder
  torchrun --nproc_per_node "$GPUS" -m grpo_latent.sft --config-dir recipes/ilvr --config-name "$1" \
    model.path="$2" data.train_files="$TRAIN" data.image_folder="$IMAGES" trainer.output_dir="$3"
}
stage ilvr_stage1 "$MODEL" "$OUT/stage1"
stage ilvr_stage2 "$OUT/stage1/model" "$OUT/stage2"

python -m grpo_latent.train --config-dir recipes/ilvr --config-name ilvr_grpo \
  actor_rollout_ref.model.path="$OUT/stage2/model" data.train_files="$OUT/data/train.parquet" \
  data.val_files="$OUT/data/val.parquet" latent.output_dir="$OUT/grpo" trainer.n_gpus_per_node="$GPUS" "$@"

CHECKPOINT=$(last_checkpoint "$OUT/grpo")
python -m grpo_latent.evaluate model.path="$CHECKPOINT" \
  model.device=cuda model.dtype=bfloat16 data.val_files="$OUT/data/val.parquet" data.max_response_length=1024 \
  'latent.reward.functions=[{path: reward/accuracy.py, kwargs: {variant: stated}}]' latent.max_spans=8 \
  prompts_per_batch=16 latent.max_batch_rows=16 leak_prompts=0 \
  'ablations=[zero,noise,shuffle,shuffle@span0,image_blind_after_span]' output="$OUT/evaluation.json"
