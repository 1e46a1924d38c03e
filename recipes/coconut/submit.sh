#!/usr/bin/env bash
# The GRPO stage of Coconut on a running Ray cluster: recipes/quickstart/submit.sh with this recipe's config.
#   RAY_API_SERVER_ADDRESS=http://head:8265 MODEL=… TRAIN=… VAL=… OUT=… bash recipes/coconut/submit.sh [hydra overrides]
set -euo pipefail
cd "$(dirname "$0")/../.."
CONFIG_DIR=recipes/coconut CONFIG_NAME=coconut_grpo exec bash recipes/quickstart/submit.sh "$@"
