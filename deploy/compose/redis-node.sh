#!/bin/sh
# Starts a node of the Redis Cluster. The password goes by standard input, so that no list of processes shows it. Redis takes this shell's
# place, and with it the signal by which a container is stopped.
set -eu
here=$(dirname "$0")
password=$(cat "${SECRETS:-/run/secrets}/redis-password")
exec redis-server - <<CONF
$(cat "$here/redis.conf")
port ${REDIS_PORT:-6379}
dir ${REDIS_DATA:-/data}
cluster-announce-ip $REDIS_IP
requirepass "$password"
masterauth "$password"
CONF
