#!/bin/sh
# Installs Debian packages and starts none of their services: the tests start their own.
set -eu
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    # What Debian's invoke-rc.d asks; 101 is "not allowed".
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get update -q
apt-get install -qy --no-install-recommends "$@"
