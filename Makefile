.DEFAULT_GOAL := help
.PHONY: help test check

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

test: ## Run every test
	cargo test --all-targets

check: ## Formatting and lints
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
