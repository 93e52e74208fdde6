#!/bin/bash
# Runs IMAGE (localhost/weir:local) by podman as the stack does, with a read-only root and no rights, and looks at what it is. As root.
set -euo pipefail
cd "$(dirname "$0")/../.."
image=${IMAGE:-localhost/weir:local}
export CONTAINERS_CONF=$PWD/tests/stack/containers.conf
work=$(mktemp -d)
app=weir-image-app-$$ weir=weir-image-weir-$$
end() {
    podman rm -f "$app" "$weir" >/dev/null 2>&1 || true
    podman volume rm "$weir" >/dev/null 2>&1 || true
    rm -rf "$work"
}
trap end EXIT
fail() { echo "FAILED: $*" >&2; podman logs "$weir" >&2 || true; exit 1; }
of() { podman image inspect --format "$1" "$image"; }

test "$(of '{{.Config.User}}')" = 65532:65532 || fail "its user is $(of '{{.Config.User}}')"
test "$(of '{{json .Config.Entrypoint}}')" = '["/usr/local/bin/weir"]' || fail "its entry point is $(of '{{json .Config.Entrypoint}}')"
test "$(of '{{.Config.StopSignal}}')" = SIGTERM || fail "its stop signal is $(of '{{.Config.StopSignal}}')"
of '{{json .Config.Healthcheck}}' | grep -q '"healthcheck"' || fail "it has no health check"
of '{{json .Config.Labels}}' | grep -q org.opencontainers.image.revision || fail "it has no labels"
podman save -q "$image" | tar -xO --wildcards '*.tar' 2>/dev/null | tar -ti -f - 2>/dev/null >"$work/files" || true
grep -q usr/local/bin/weir "$work/files" || fail "its files cannot be listed"
grep -q usr/share/doc/weir/THIRD-PARTY.txt "$work/files" || fail "the notices of its crates are not in it"
! grep -E '(^|/)(ba|da|a)?sh$|busybox' "$work/files" || fail "there is a shell in it"

read -r app_port port admin < <(python3 -c '
import socket
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(one.getsockname()[1] for one in held))')
cat >"$work/weir.yaml" <<YAML
listen: 127.0.0.1:$port
upstream: http://127.0.0.1:$app_port
admin: {address: 127.0.0.1:$admin}
audit: {}
YAML
chmod 755 "$work" && chmod 644 "$work/weir.yaml"
# By the host's network, which needs no bridge: what is asked here is not the network.
limits=(--read-only --read-only-tmpfs=false --cap-drop all --security-opt no-new-privileges --network host)
podman run -d --name "$app" "${limits[@]}" "$image" echo --address "127.0.0.1:$app_port" >/dev/null
podman run -d --name "$weir" "${limits[@]}" -v "$work/weir.yaml:/etc/weir/weir.yaml:ro" -v "$weir:/var/lib/weir" "$image" >/dev/null
podman exec "$weir" weir await -c /etc/weir/weir.yaml --timeout 30s || fail "it is not ready"
podman exec "$weir" weir healthcheck -c /etc/weir/weir.yaml >/dev/null || fail "it is not well"
test "$(curl -so /dev/null -w '%{http_code}' "http://127.0.0.1:$port/status/201")" = 201 || fail "it does not proxy"
if podman exec "$weir" /bin/sh -c true 2>/dev/null; then fail "a shell runs in it"; fi
user=$(awk '/^Uid:/ {print $2}' "/proc/$(podman inspect --format '{{.State.Pid}}' "$weir")/status")
test "$user" = 65532 || fail "it runs as $user"
podman stop -t 40 "$weir" >/dev/null
code=$(podman inspect --format '{{.State.ExitCode}}' "$weir")
test "$code" = 0 || fail "SIGTERM ended it with $code"
# Where mounts are made is in the layer; nothing else may be.
written=$(podman diff "$weir" | grep -Ev '^[CA] /(etc|etc/weir|etc/weir/weir.yaml|etc/hosts|etc/hostname|etc/resolv.conf|etc/mtab|run|run/.containerenv|dev|proc|sys|var|var/lib|var/lib/weir)$' || true)
test -z "$written" || fail "it wrote to $written"
ls "$(podman volume inspect --format '{{.Mountpoint}}' "$weir")" | grep -q '^weir-audit-.*\.db$' || fail "the audit is not in its volume"
size=$(of '{{.Size}}')
echo "$image: $((size / 1000000)) MB ($((size / 1000)) kB); runs as 65532 on a read-only root, proxies, writes to its volume alone, has no shell"
