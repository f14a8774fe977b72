# Two commands matter: `make demo` and `make test`. Each sets up .venv by itself and says what it does.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
READY := $(VENV)/.ready
MODEL ?= gemma4

.PHONY: help setup demo test lint types docs pytest clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## virtual environment in .venv, torch by constraints.txt, the project editable

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is older than 3.10: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "==> virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "==> torch, by constraints.txt (some hundred MB, a minute or more)"
	@$(PIP) install -c constraints.txt torch
	@echo "==> moe-routing, editable, with what tests, docs and lint need"
	@$(PIP) install -c constraints.txt -e '.[test,transformers,docs,bench,triton]' ruff mypy import-linter
	@touch $@

demo: $(READY) ## a random-weight MoE model of transformers, routed by us and by its own code (MODEL=deepseek_v3|qwen3_moe|gpt_oss)
	@$(BIN)/python examples/demo.py --model $(MODEL)

test: lint docs pytest ## lint, types, layers, docs, doctests and tests

lint: $(READY) ## ruff, mypy --strict, layers
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "==> mypy --strict"
	@$(BIN)/mypy
	@echo "==> layers (import-linter)"
	@$(BIN)/lint-imports --no-cache

docs: $(READY) ## the documentation in docs/_build/html, warnings are errors
	@echo "==> docs"
	@$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

pytest: $(READY) ## tests and doctests
	@echo "==> tests"
	@$(BIN)/python -m pytest

clean: ## remove what the other targets made
	rm -rf $(VENV) docs/_build .mypy_cache .ruff_cache .pytest_cache
