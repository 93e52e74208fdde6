#!/bin/sh
# Runs a test program for cargo. Tests wait for most of their time: on few cores twice as many run at a time as there are cores. Not so those
# of the library, which are all work, and those that hold milliseconds, or another program's start, against what they see.
set -eu
case ${1##*/} in
    weir-* | faults-* | redis-* | shed-* | under_load-* | websocket-*) ;;
    *)
        cores=$(nproc)
        test "$cores" -ge 4 || export RUST_TEST_THREADS="${RUST_TEST_THREADS:-$((2 * cores))}"
        ;;
esac
exec "$@"
