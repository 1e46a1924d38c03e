#!/usr/bin/env bash
# The GRPO stage of ILVR on a running Ray cluster: recipes/quickstart/submit.sh with this recipe's config.
#   RAY_API_SERVER_ADDRESS=http://head:8265 MODEL=… TRAIN=… VAL=… OUT=… bash recipes/ilvr/submit.sh [hydra overrides]
set -euo pipefail
cd "$(dirname "$0")/../.."
CONFIG_DIR=recipes/ilvr CONFIG_NAME=ilvr_grpo exec bash recipes/quickstart/submit.sh "$@"
