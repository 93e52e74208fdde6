#!/bin/sh
# Prints the notices of all crates that weir links, for those who pass it on: each text once, below the names of the crates that have it.
#   deploy/third-party.sh [CARGO OPTIONS]     # --offline
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Those that are in procedural macros alone, too.
cargo tree --locked "$@" -p weir -e normal --prefix none -f '{p}|{l}' | sed 's/ (proc-macro)//; s/ (\*)$//' | sort -u >"$work/crates"
grep -q '|' "$work/crates" || { echo "cargo tree names no crates" >&2; exit 1; }
while IFS='|' read -r crate licence; do
    name=${crate%% v*} version=${crate#* v}
    version=${version%% *}
    # weir itself.
    test "$name" != weir || continue
    found=
    for text in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/"$name-$version"/*; do
        case $(basename "$text" | tr a-z A-Z) in
            LICENSE*|LICENCE*|COPYING*|COPYRIGHT*|NOTICE*|UNLICENSE*) test -f "$text" || continue ;;
            *) continue ;;
        esac
        sum=$(sha256sum <"$text" | cut -d' ' -f1)
        test -e "$work/$sum.text" || cp "$text" "$work/$sum.text"
        found=$found$sum
        echo "$name $version ($licence)" >>"$work/$sum.of"
    done
    test -n "$found" || echo "$name $version ($licence)" >>"$work/without"
done <"$work/crates"
echo "weir links the crates below, each under its licence."
for of in "$work"/*.of; do
    printf '\n%s\n' "================================================================================"
    sort -u "$of"
    printf '%s\n\n' "--------------------------------------------------------------------------------"
    cat "${of%.of}.text"
done
if test -e "$work/without"; then
    printf '\n%s\n' "================================================================================"
    echo "These bring no text of their licence, whose name they state; it is one of those above:"
    sort -u "$work/without"
fi
