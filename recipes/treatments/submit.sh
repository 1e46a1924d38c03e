#!/usr/bin/env bash
# Monet's VLPO on a running Ray cluster: recipes/quickstart/submit.sh with this recipe's config.
#   RAY_API_SERVER_ADDRESS=http://head:8265 MODEL=… TRAIN=… VAL=… OUT=… bash recipes/treatments/submit.sh [hydra overrides]
set -euo pipefail
cd "$(dirname "$0")/../.."
CONFIG_DIR=recipes/treatments CONFIG_NAME=monet_vlpo exec bash recipes/quickstart/submit.sh "$@"
