#!/usr/bin/env bash
# ViRL-39K-style records (LVR JSON without <image>, answers as <answer>4</answer>) -> verl parquet.
#   bash recipes/lvr/prepare.sh /data/virl39k/train.json /data/virl39k/images /data/virl39k/train.parquet
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# = 3 ] || { echo "usage: prepare.sh IN.json IMAGE_FOLDER OUT.parquet" >&2; exit 2; }
python -m grpo_latent.data.formats.lvr_json to-parquet --json "$1" --images "$2" --out "$3" --data-source virl39k
