#!/bin/sh
# Forms the cluster of the nodes in REDIS_NODES: three masters with a replica each. Does nothing where that has been done.
set -eu
REDISCLI_AUTH=$(cat "${SECRETS:-/run/secrets}/redis-password")
export REDISCLI_AUTH
# shellcheck disable=SC2086 # a node each
set -- $REDIS_NODES
host=${1%:*} port=${1#*:}
says() { redis-cli -h "$host" -p "$port" cluster info | grep -q "^$1"; }
# Its state alone is ok with some of the slots, too.
is_whole() { says cluster_state:ok && says cluster_slots_ok:16384; }
if ! says cluster_slots_assigned:16384; then
    redis-cli --cluster create "$@" --cluster-replicas 1 --cluster-yes
fi
tries=0
until is_whole; do
    tries=$((tries + 1))
    test "$tries" -lt 60 || { echo "the cluster is not whole after 60 s" >&2; exit 1; }
    sleep 1
done
