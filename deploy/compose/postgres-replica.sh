#!/bin/sh
# Starts the replica: of a copy of the primary, which it makes when its folder is empty and then follows.
set -eu
PGPASSWORD=$(cat "${SECRETS:-/run/secrets}/replication-password")
export PGPASSWORD
if ! test -s "$PGDATA/PG_VERSION"; then
    pg_basebackup -h "$PRIMARY_HOST" -p "${PRIMARY_PORT:-5432}" -U replicator -D "$PGDATA" -X stream -S replica -R --checkpoint=fast
    chmod 700 "$PGDATA"
fi
exec postgres -D "$PGDATA" "$@"
