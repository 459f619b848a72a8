# Everything runs in a virtual environment of its own, .venv.
PYTHON ?= python3
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
export VIRTUAL_ENV := $(VENV)

.DEFAULT_GOAL := help
.PHONY: help develop demo test test-rust test-python lint format bench wheel clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/maturin:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "maturin>=1.9,<2"

develop: $(BIN)/maturin ## Build the extension and install it with all that the tests need
	$(BIN)/maturin develop --release --quiet --extras test,demo,packages

demo: develop ## Segment with a small model before and after compression, without network
	$(BIN)/birkhoff demo --force

test: test-rust test-python ## Run all tests

test-rust: ## Run the tests of the Rust crates
	cargo test --workspace --quiet

test-python: develop ## Run the tests of the Python package and the command line
	$(BIN)/pytest

lint: develop ## Check format, lints, types and stubs
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/stubtest birkhoff._core

format: develop ## Format all code
	cargo fmt --all
	$(BIN)/ruff check --fix --quiet
	$(BIN)/ruff format

bench: ## Measure encode and decode by bits and instruction set
	cargo bench -p birkhoff-core --bench codec

wheel: $(BIN)/maturin ## Build a wheel in dist/
	$(BIN)/maturin build --release --out dist

clean: ## Remove what was built
	rm -rf $(VENV) dist target
