#!/usr/bin/env bash
# LVR on GPUs: SFT, GRPO, evaluation. Needs a Qwen2.5-VL folder, the published LVR JSON, and prepare.sh's parquet files.
#   MODEL=/models/Qwen2.5-VL-3B-Instruct SFT_JSON=/data/lvr/train.json IMAGES=/data/lvr/images \
#   TRAIN=/data/virl39k/train.parquet VAL=/data/virl39k/val.parquet bash recipes/lvr/run.sh [published=true] [hydra overrides of GRPO]
# published=true: as the authors' code trains where it differs from the paper (docs/checkpoints.md says in what).
set -euo pipefail
cd "$(dirname "$0")/../.."
source recipes/last_checkpoint.sh
: "${MODEL:?a Hugging Face folder}" "${SFT_JSON:?LVR JSON}" "${IMAGES:?image folder}" "${TRAIN:?parquet}" "${VAL:?parquet}"
OUT=${OUT:-outputs/lvr}
SFT=lvr_sft
GRPO=lvr_grpo
if [ "${1:-}" = published=true ]; then
  SFT=lvr_published_sft
  GRPO=lvr_published_grpo
  shift
elif [ "${1:-}" = published=false ]; then
  shift
fi
GPUS=${GPUS:-8}
python recipes/lvr/validate.py trainer.n_gpus_per_node="$GPUS" "$@"
# the config's default engine
python -c "from grpo_latent.rollout.vllm.supported import check_installed; check_installed()"

torchrun --nproc_per_node "$GPUS" -m grpo_latent.sft --config-dir recipes/lvr --config-name "$SFT" \
  model.path="$MODEL" data.train_files="$SFT_JSON" data.image_folder="$IMAGES" trainer.output_dir="$OUT/sft"

python -m grpo_latent.train --config-dir recipes/lvr --config-name "$GRPO" \
  actor_rollout_ref.model.path="$OUT/sft/model" data.train_files="$TRAIN" data.val_files="$VAL" \
  latent.output_dir="$OUT/grpo" trainer.n_gpus_per_node="$GPUS" "$@"

CHECKPOINT=$(last_checkpoint "$OUT/grpo")
for STEPS in 4 8 16; do
  python -m grpo_latent.evaluate model.path="$CHECKPOINT" \
    model.device=cuda model.dtype=bfloat16 data.val_files="$VAL" data.max_response_length=512 latent.steps=$STEPS \
    reward.custom_reward_function.path=reward/accuracy.py 'ablations=[zero,noise,shuffle]' leak_prompts=0 \
    prompts_per_batch=16 latent.max_batch_rows=16 \
    output="$OUT/evaluation_steps_$STEPS.json"
done
