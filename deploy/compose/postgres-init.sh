#!/bin/sh
# Run once by Postgres's image on the primary's empty folder: weir's role and database, and the role by which the replica follows.
set -eu
secrets=${SECRETS:-/run/secrets}
psql -v ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres \
    -v weir="$(cat "$secrets/weir-db-password")" -v replicator="$(cat "$secrets/replication-password")" <<'SQL'
CREATE ROLE weir LOGIN PASSWORD :'weir';
CREATE DATABASE weir OWNER weir;
CREATE ROLE replicator REPLICATION LOGIN PASSWORD :'replicator';
SELECT pg_create_physical_replication_slot('replica');
SQL
echo 'host replication replicator all scram-sha-256' >>"$PGDATA/pg_hba.conf"
