#!/bin/sh
# Installs those of these programs and libraries that are not there, as root; Debian's packages have the same names.
set -eu
is_there() {
    case $1 in
        lib*) ls /usr/lib/*/*/"$1".so.* >/dev/null 2>&1 ;;
        postgresql) ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || command -v postgres >/dev/null ;;
        nftables) command -v nft >/dev/null ;;
        nginx) PATH=$PATH:/usr/sbin command -v nginx >/dev/null ;;
        iproute2) command -v ip >/dev/null ;;
        python3-venv) python3 -c 'import ensurepip, venv' 2>/dev/null ;;
        nghttp2-client) command -v h2load >/dev/null ;;
        *) command -v "$1" >/dev/null ;;
    esac
}
missing=
for name in "$@"; do
    is_there "$name" || missing="$missing $name"
done
test -n "$missing" || exit 0
test "$(id -u)" = 0 || { echo "install first:$missing" >&2; exit 1; }
# shellcheck disable=SC2086 # a name each
exec "$(dirname "$0")/apt-install.sh" $missing
