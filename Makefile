# Everything a newcomer types. Each target prepares what it needs; a second run of each starts in seconds.
SHELL := /bin/bash
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c

PYTHON := .venv/bin/python
STAMP := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help system setup demo test check bench up format clean

help: ## Say what there is
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

system: ## Install the system packages that are missing (asks sudo when not root)
	@scripts/system-packages

$(STAMP): pyproject.toml constraints.txt
	@scripts/system-packages
	python3 -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

setup: system $(STAMP) ## Prepare everything: system packages, .venv with mica in .venv/bin
	@echo "ready: .venv/bin/mica --help"

demo: setup ## The main job on real guests, with times
	@$(PYTHON) scripts/demo.py

test: setup ## Every test, on real guests too
	@$(PYTHON) -m pytest

check: setup ## Format, lint, types, layers, sizes, generated files
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/mypy
	.venv/bin/lint-imports
	$(PYTHON) scripts/check_sizes.py
	$(PYTHON) scripts/check_generated.py

bench: setup ## The performance table: ratios measured side by side
	@$(PYTHON) -m bench

up: setup ## Run the daemon in the foreground
	@.venv/bin/mica up

format: $(STAMP) ## Format and fix what can be fixed
	.venv/bin/ruff format
	.venv/bin/ruff check --fix

clean: ## Remove what was built here (not MICA_HOME)
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
