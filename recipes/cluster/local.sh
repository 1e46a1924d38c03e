#!/usr/bin/env bash
# The quickstart's GRPO stage on three nodes of one machine: network namespaces (namespaces.py), so root and iproute2.
# Training workers, each with its rollout server, on two nodes; driver, trainer and TransferQueue on the first.
#
#   QUICKSTART=outputs/quickstart OUT=outputs/cluster bash recipes/cluster/local.sh [hydra overrides]
#
# It needs the SFT checkpoint and the data of `make quickstart` (or ONLY_SFT=1 bash recipes/quickstart/run.sh).
set -euo pipefail
cd "$(dirname "$0")/../.."
QUICKSTART=$(realpath "${QUICKSTART:-outputs/quickstart}")
OUT=$(realpath -m "${OUT:-outputs/cluster}")
export OMP_NUM_THREADS=1
exec python recipes/cluster/namespaces.py --nodes 3 -- env MODEL="$QUICKSTART/sft/model" \
  TRAIN="$QUICKSTART/data/train_rl.parquet" VAL="$QUICKSTART/data/dev.parquet" OUT="$OUT" \
  bash recipes/quickstart/submit.sh trainer.nnodes=2 "$@"
