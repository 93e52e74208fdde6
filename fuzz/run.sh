#!/bin/sh
# Runs each target for so many seconds, one on each core; fails with what a target found, which stays in target/fuzz/TARGET.
set -eu
cd "$(dirname "$0")/.."
seconds=$1
run() {
    target=$1
    mkdir -p "target/fuzz/$target/corpus"
    log=target/fuzz/$target/log
    if target/debug/fuzz-"$target" "target/fuzz/$target/corpus" "fuzz/seeds/$target" -max_total_time="$seconds" -timeout=10 \
        -artifact_prefix="target/fuzz/$target/" -print_final_stats=1 >"$log" 2>&1
    then
        echo "$target: $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") inputs"
    else
        tail -n 60 "$log"
        echo "$target found something" >&2
        return 1
    fi
}
if [ $# -eq 2 ]; then
    run "$2"
else
    ls fuzz/seeds | xargs -P "$(nproc)" -n 1 "$0" "$seconds"
fi
