#!/bin/sh
# Starts a node of the Redis Cluster. The password goes by standard input, so that no list of processes shows it.
set -eu
here=$(dirname "$0")
password=$(cat "${SECRETS:-/run/secrets}/redis-password")
port=${REDIS_PORT:-6379}
{
    cat "$here/redis.conf"
    printf 'port %s\ndir %s\ncluster-announce-ip %s\n' "$port" "${REDIS_DATA:-/data}" "$REDIS_IP"
    printf 'requirepass "%s"\nmasterauth "%s"\n' "$password" "$password"
} | exec redis-server -
