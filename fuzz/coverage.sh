#!/bin/sh
# rustc for weir and its fuzz targets: libFuzzer is told where they have been and what they compared. Third-party crates do without, and are
# the tests' own. cargo-fuzz has the same built with all of them anew, under a sanitizer, which finds nothing in safe code.
exec "$@" --cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares
