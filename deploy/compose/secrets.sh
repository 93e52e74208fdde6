#!/bin/sh
# Makes the stack's secrets, each a file of FOLDER; those that are there stay.
#   deploy/compose/secrets.sh [FOLDER]        # deploy/compose/secrets unless told
set -eu
folder=${1:-$(dirname "$0")/secrets}
# The folder is its owner's alone; in it containers read files as the users that they run as.
mkdir -p "$folder" && chmod 700 "$folder"
cd "$folder"
keep() {
    test -s "$1" || printf %s "$2" >"$1"
    chmod 644 "$1"
}
for name in redis-password postgres-password weir-db-password replication-password audit-key admin-token grafana-password; do
    keep "$name" "$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')"
done
weir=$(cat weir-db-password)
# Between containers of one host; over a network between hosts, Postgres wants certificates, and this sslmode=require.
keep database-url "postgres://weir:$weir@${POSTGRES_PRIMARY:-postgres-primary:5432}/weir?sslmode=disable"
keep database-read-url "postgres://weir:$weir@${POSTGRES_REPLICA:-postgres-replica:5432}/weir?sslmode=disable"
