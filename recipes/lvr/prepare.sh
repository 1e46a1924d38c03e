#!/usr/bin/env bash
# ViRL-39K-style rows (question, answer, image paths) -> verl parquet.
#   IMAGE_ROOT=/data/virl39k  bash recipes/lvr/prepare.sh /data/virl39k/train.json /data/virl39k/parquet/train.parquet
set -euo pipefail
cd "$(dirname "$0")/../.."
IN=${1:?usage: prepare.sh IN.json OUT.parquet}
OUT=${2:?usage: prepare.sh IN.json OUT.parquet}
python -m grpo_latent.data.lvr_json to-parquet "$IN" "$OUT" --image-root "${IMAGE_ROOT:-$(dirname "$IN")}"
