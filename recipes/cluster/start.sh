#!/usr/bin/env bash
# Starts Ray on one node of a cluster, with token authentication and on the given address; run it on each node.
#
#   bash recipes/cluster/start.sh head 10.0.0.1 [options of ray start]
#   bash recipes/cluster/start.sh node 10.0.0.2 10.0.0.1 [options of ray start]    # its own address, the head's
#
# All nodes need the same token: RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token (ray get-auth-token --generate).
set -euo pipefail
role=${1:?head or node}
address=${2:?the address of this node, in the network of the cluster}
shift 2
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# a node that does not answer is lost after about 25 s; with Ray's own defaults, after more than a minute
export RAY_health_check_initial_delay_ms=${RAY_health_check_initial_delay_ms:-5000}
export RAY_health_check_period_ms=${RAY_health_check_period_ms:-3000}
export RAY_health_check_timeout_ms=${RAY_health_check_timeout_ms:-5000}
export RAY_health_check_failure_threshold=${RAY_health_check_failure_threshold:-3}
case $role in
  head) exec ray start --head --node-ip-address="$address" --port=6379 --dashboard-host=127.0.0.1 "$@" ;;
  node) head=${1:?the address of the head}
    shift
    exec ray start --address="$head:6379" --node-ip-address="$address" "$@" ;;
  *) echo "$role: expected head or node" >&2; exit 2 ;;
esac
