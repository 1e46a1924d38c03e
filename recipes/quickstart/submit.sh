#!/usr/bin/env bash
# The GRPO stage of the quickstart on a running Ray cluster, by `ray job submit`, after a preflight on its nodes.
#
#   export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265   # and RAY_AUTH_MODE=token where the cluster asks for it
#   MODEL=/abs/sft/model TRAIN=/abs/train_rl.parquet VAL=/abs/dev.parquet OUT=/abs/out \
#     bash recipes/quickstart/submit.sh [hydra overrides]
#
# Paths are those of the cluster's nodes. This folder travels as working directory; its code is what runs there.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${RAY_API_SERVER_ADDRESS:?address of the cluster, such as http://127.0.0.1:8265}"
: "${MODEL:?folder of an SFT checkpoint}" "${TRAIN:?parquet}" "${VAL:?parquet}" "${OUT:?output folder}"
RUNTIME_ENV='{"excludes": [".git", ".venv", "outputs", "tests"], "env_vars": {"OMP_NUM_THREADS": "1"}}'
CONFIG_DIR=${CONFIG_DIR:-recipes/quickstart}
CONFIG_NAME=${CONFIG_NAME:-digits_grpo}

submit() { ray job submit --working-dir . --runtime-env-json "$RUNTIME_ENV" -- "$@"; }

submit python -m grpo_latent.check_cluster --require "$MODEL" "$TRAIN" "$VAL" --output-dir "$OUT"
submit python -m grpo_latent.train --config-dir "$CONFIG_DIR" --config-name "$CONFIG_NAME" \
  actor_rollout_ref.model.path="$MODEL" data.train_files="$TRAIN" data.val_files="$VAL" \
  latent.output_dir="$OUT" "$@"
