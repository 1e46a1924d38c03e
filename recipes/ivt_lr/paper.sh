#!/usr/bin/env bash
# IVT-LR on GPUs: the curriculum on M3CoT, GRPO, evaluation. Needs a Qwen2-VL-7B folder and M3CoT's parquet files.
#   MODEL=/models/Qwen2-VL-7B-Instruct TRAIN="/data/m3cot/train-*.parquet" VAL="/data/m3cot/validation-*.parquet" \
#     bash recipes/ivt_lr/paper.sh [hydra overrides of GRPO]
set -euo pipefail
cd "$(dirname "$0")/../.."
source recipes/last_checkpoint.sh
: "${MODEL:?a Hugging Face folder}" "${TRAIN:?parquet files}" "${VAL:?parquet files}"
OUT=${OUT:-outputs/ivt_lr_7b}
GPUS=${GPUS:-8}
FORMAT=${FORMAT:-m3cot}  # m3cot_published: prompts and images as the published code has them
python recipes/ivt_lr/validate.py trainer.n_gpus_per_node="$GPUS" "$@"

# shellcheck disable=SC2086  (patterns of files)
python -m grpo_latent.data.formats.stepwise --format "$FORMAT" --in $TRAIN --out "$OUT/data/train.parquet"
# shellcheck disable=SC2086
python -m grpo_latent.data.formats.stepwise --format "$FORMAT" --in $VAL --out "$OUT/data/val.parquet" --split val

# shellcheck disable=SC2086
FILES=$(printf '%s,' $TRAIN)
torchrun --nproc_per_node "$GPUS" -m grpo_latent.sft --config-dir recipes/ivt_lr --config-name ivt_lr_sft \
  model.path="$MODEL" data.format="$FORMAT" data.train_files="[${FILES%,}]" trainer.output_dir="$OUT/sft"

python -m grpo_latent.train --config-dir recipes/ivt_lr --config-name ivt_lr_grpo \
  actor_rollout_ref.model.path="$OUT/sft/model" data.train_files="$OUT/data/train.parquet" \
  data.val_files="$OUT/data/val.parquet" latent.output_dir="$OUT/grpo" trainer.n_gpus_per_node="$GPUS" "$@"

# accuracy of guessing, over questions with different numbers of choices
# shellcheck disable=SC2086
CHANCE=$(python -c 'import sys; from statistics import fmean; from pyarrow.parquet import read_table as read
print(fmean(1 / len(choices) for file in sys.argv[1:] for choices in read(file, columns=["choices"])["choices"].to_pylist()))' $VAL)
CHECKPOINT=$(last_checkpoint "$OUT/grpo")
python -m grpo_latent.evaluate model.path="$CHECKPOINT" \
  model.device=cuda model.dtype=bfloat16 data.val_files="$OUT/data/val.parquet" data.max_response_length=355 \
  reward.custom_reward_function.path=reward/choice.py leak_prompts=0 verdict.chance="$CHANCE" \
  prompts_per_batch=32 latent.max_batch_rows=32 \
  'ablations=[zero,shuffle,shuffle@text,shuffle@vision,image_blind_after_span]' output="$OUT/evaluation.json"
