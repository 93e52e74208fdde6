#!/usr/bin/env bash
# The demo: `weir echo` with weir in front of it, until Ctrl-C. It ends what it started, by process id.
# Environment: WEIR_PORT, WEIR_ECHO_PORT and WEIR_ADMIN_PORT, in place of 8080, 3000 and 9901.
set -euo pipefail
cd "$(dirname "$0")/.."

weir=${CARGO_TARGET_DIR:-target}/debug/weir
export WEIR_PORT=${WEIR_PORT:-8080} WEIR_ECHO_PORT=${WEIR_ECHO_PORT:-3000} WEIR_ADMIN_PORT=${WEIR_ADMIN_PORT:-9901}

listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# Asked first, to say how another port is chosen: weir would fail with "Address already in use".
for name in WEIR_PORT WEIR_ECHO_PORT WEIR_ADMIN_PORT; do
	if listens "${!name}"; then
		echo "port ${!name} is taken: end what listens there, or choose another: make run $name=$((${!name} + 1000))" >&2
		exit 1
	fi
done

# The demo begins anew, so that what it shows is what README.md says.
mkdir -p target/demo
rm -f target/demo/audit*.db* target/demo/cookies

pids=()
stop() {
	# A second Ctrl-C must not leave the last of them behind.
	trap '' INT TERM HUP
	for pid in ${pids[@]+"${pids[@]}"}; do kill -TERM "$pid" 2>/dev/null || true; done
	wait
}
trap stop EXIT
trap 'exit 0' INT TERM HUP

"$weir" echo --address "127.0.0.1:$WEIR_ECHO_PORT" &
pids+=($!)
"$weir" run -c config/weir.yaml &
pids+=($!)

up() { listens "$WEIR_ECHO_PORT" && "$weir" healthcheck --address "127.0.0.1:$WEIR_ADMIN_PORT" >/dev/null 2>&1; }
for _ in {1..100}; do
	if up; then break; fi
	for pid in "${pids[@]}"; do
		kill -0 "$pid" 2>/dev/null || { echo "the demo did not start; its log above says why" >&2; exit 1; }
	done
	sleep 0.1
done
up || { echo "the demo was not up within 10 s" >&2; exit 1; }

cat <<TRY

The demo is up; Ctrl-C ends it. In another terminal, in this folder:

a limit     curl -so /dev/null -w '%{http_code} ' 'http://127.0.0.1:$WEIR_PORT/limited?[1-7]'
a session   curl -s http://127.0.0.1:$WEIR_PORT/me
            curl -sc target/demo/cookies -o /dev/null 'http://127.0.0.1:$WEIR_PORT/login?user=ann&role=customer'
            curl -sb target/demo/cookies http://127.0.0.1:$WEIR_PORT/me
a breaker   curl -so /dev/null -w '%{http_code} ' 'http://127.0.0.1:$WEIR_PORT/status/500?[1-5]'
the audit   $weir audit query -c config/weir.yaml --status 4xx
            $weir audit verify -c config/weir.yaml
metrics     curl -s http://127.0.0.1:$WEIR_ADMIN_PORT/metrics | grep ^weir_rejections | sort

TRY
wait "${pids[1]}" # weir: without it there is nothing to show
