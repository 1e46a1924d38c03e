#!/usr/bin/env bash
# The GRPO stage of LVR on a running Ray cluster: recipes/quickstart/submit.sh with this recipe's config.
#   RAY_API_SERVER_ADDRESS=http://head:8265 MODEL=… TRAIN=… VAL=… OUT=… bash recipes/lvr/submit.sh [hydra overrides]
set -euo pipefail
cd "$(dirname "$0")/../.."
CONFIG_DIR=recipes/lvr CONFIG_NAME=lvr_grpo exec bash recipes/quickstart/submit.sh "$@"
