# Two commands matter: `make demo` and `make test`. Each sets up .venv by itself and says what it does.
# Times in this file are for 2 cores, after `make setup`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=loadfile
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
READY := $(VENV)/.ready
MODEL ?= gemma4
# Without bytecode on disk each of pytest's processes compiles every module and rewrites every test again.
export PYTHONDONTWRITEBYTECODE :=
TRITON_VERSIONS ?= 3.6.0 3.8.0 3.9.0

.PHONY: help setup demo test about-test compiler test-all test-gpu fuzz lint docs figures pytest matrix triton-versions environments dist transformers-check vllm-check vllm-overlay xpu-check clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## virtual environment in .venv, torch by constraints.txt, the project editable: some minutes

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

test: about-test compiler $(READY) ## lint, types, docs and the quick tests: about 3 minutes
	@$(MAKE) --no-print-directory --jobs=2 lint docs
	@$(MAKE) --no-print-directory pytest

test-all: compiler $(READY) ## the tests that `make test` leaves out, slow or with pip: about 30 minutes
	@echo "==> the slow tests, and those that install packages with pip: about 30 minutes on 2 cores"
	@$(PYTEST) -m "(slow or network) and not gpu"

test-gpu: $(READY) ## the contract on an NVIDIA GPU, for the backends eager and triton: some minutes
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "make test-gpu: torch sees no NVIDIA GPU")'
	@echo "==> the tests that need an NVIDIA GPU: some minutes"
	@$(BIN)/python -m pytest -m gpu

BACKEND ?= eager

fuzz: $(READY) ## random calls against a reference of their own: 20,000 in 3 minutes (BACKEND=triton, interpreted: 2,000 in 10)
	@echo "==> random calls of $(BACKEND): some minutes, more on a busy machine"
	@$(BIN)/python tests/support/fuzz/run.py $(BACKEND)

about-test:
	@echo "==> lint, types, docs and the quick tests: about 3 minutes on 2 cores, plus some minutes for the first setup"

# Before anything is installed: torch.compile needs it, and so do its tests. `make CXX=clang++ test` names another.
compiler:
	@command -v $(CXX) >/dev/null || { echo "make test: expected a C++ compiler for torch.compile, found no $(CXX): apt-get install g++, or make CXX=clang++ test"; exit 1; }

lint: $(READY) ## part of `make test`, ruff, mypy --strict and layers: 30 seconds, the next time 3
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "==> mypy --strict"
	@$(BIN)/mypy
	@echo "==> layers (import-linter)"
	@$(BIN)/lint-imports --no-cache

docs: $(READY) ## part of `make test`, docs/_build/html, warnings are errors: 10 seconds
	@echo "==> docs"
	@$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

figures: $(READY) ## docs/figures, the tables of README and docs, and the constants of `scale`, from benchmarks/results
	@$(BIN)/python benchmarks/tables.py
	@$(BIN)/python benchmarks/scale_constants.py
	@$(BIN)/python benchmarks/figures.py

pytest: $(READY) ## part of `make test`, the quick tests and the doctests: about 3 minutes
	@echo "==> the quick tests and the doctests: about 3 minutes on 2 cores"
	@$(PYTEST) -m "not (slow or network or gpu)"

OLDEST := $(VENV)/transformers-5.17
VLLM := .venv-vllm
XPU := $(CURDIR)/.venv-xpu

# The experts of transformers 5.17 cannot be compiled, patched or not, so the tests of compiled models run with the newest only.
OLDEST_TESTS := $(filter-out %_compile.py,$(wildcard tests/integrations/test_transformers_*.py))

environments: $(OLDEST)/.ready $(VLLM)/.ours $(XPU)/.ready ## what the next targets but vllm-overlay install, some minutes of downloads

transformers-check: $(OLDEST)/.ready ## the integration with the oldest transformers that it is for
	@echo "==> transformers 5.17"
	@PYTHONPATH=$(OLDEST) $(PYTEST) $(OLDEST_TESTS) -m 'not (patch_mapping or gpu)' -k 'not bfloat16 and not gradients and not preset'

$(OLDEST)/.ready: $(READY)
	@$(PIP) install --no-deps --no-compile --upgrade --target $(OLDEST) transformers==5.17.0 'huggingface_hub<2' httpx httpcore h11 anyio
	@touch $@

OVERLAY := 0.33.0
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check -qq install --no-compile

vllm-check: $(VLLM)/.ours ## vLLM's engine on this CPU (Linux, x86-64), routed by itself and by us: same tokens; 2 GB in .venv-vllm
	@echo "==> vLLM"
	@$(VLLM)/bin/python -m pytest -c tests/vllm/pytest.ini tests/vllm

vllm-overlay: $(VLLM)/.ours ## the same with a later vLLM's Python files over that build's compiled ones; 3 GB more
	@echo "==> vLLM $(OVERLAY)"
	@rm -rf $(VLLM)-$(OVERLAY) && cp -r $(VLLM) $(VLLM)-$(OVERLAY)
	@$(VLLM)-$(OVERLAY)/bin/python -m pip --disable-pip-version-check -q download --no-deps --dest $(VLLM)-$(OVERLAY)/wheel vllm==$(OVERLAY)
	@$(VLLM)-$(OVERLAY)/bin/python tests/vllm/overlay.py $(VLLM)-$(OVERLAY)/wheel/vllm-*.whl
	@$(VLLM)-$(OVERLAY)/bin/python -m pytest -c tests/vllm/pytest.ini tests/vllm

$(VLLM)/.ready: tests/vllm/requirements.txt tests/vllm/no-deps.txt constraints.txt
	@echo "==> vLLM's virtual environment in $(VLLM) (a gigabyte, a minute or more)"
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM_PIP) "$$(grep ^torch== constraints.txt)"
	@$(VLLM_PIP) -r tests/vllm/requirements.txt
	@$(VLLM_PIP) --no-deps -r tests/vllm/no-deps.txt
	@touch $@

$(VLLM)/.ours: $(VLLM)/.ready pyproject.toml
	@$(VLLM_PIP) --no-deps -e .
	@touch $@

matrix: ## the tests and the kit with other versions of Python, torch, Triton and transformers (MATRIX=oldest for one set), about 10 minutes and 7 GB each
	@echo "==> versions: about 10 minutes for each set, on 2 cores; docs/versions.md has the result"
	@$(PYTHON) tests/versions/run.py $(MATRIX)
	@$(MAKE) --no-print-directory $(READY)
	@$(BIN)/python docs/tables.py

triton-versions: $(READY) ## the direct launch of `route` and `plan` beside Triton's own, for the versions that are not installed (downloads 0.6 GB)
	@for version in $(TRITON_VERSIONS); do \
		echo "==> Triton $$version"; site=$$(mktemp -d); \
		$(PIP) install --no-deps --target $$site triton==$$version && \
		PYTHONPATH=$$site TRITON_CACHE_DIR=$$site/cache $(BIN)/python tests/triton/launched.py >/dev/null; \
		status=$$?; rm -rf $$site; [ $$status = 0 ] || exit $$status; \
	done

XPU_PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
XPU_INSTALL := install --no-deps --no-compile

xpu-check: $(READY) $(XPU)/.ready ## the kernels, compiled for an Arc Pro B60; doctor beside Intel's packages, right and wrong; 2 GB in .venv-xpu
	@command -v spirv-val >/dev/null || { echo "spirv-val is not installed: apt-get install --yes spirv-tools"; exit 1; }
	@echo "==> Intel GPUs"
	@XPU_SITE=$(XPU)/triton-xpu XPU_IPEX=$(XPU)/ipex XPU_OVERWRITTEN=$$(echo $(XPU)/overwritten/lib/python3*/site-packages) \
		$(BIN)/python -m pytest tests/xpu

$(XPU)/.ready: $(READY)
	@echo "==> Triton-XPU, IPEX, and a triton that overwrites Triton-XPU, in folders of $(XPU)"
	@rm -rf $(XPU)
	@$(XPU_PIP) $(XPU_INSTALL) --pre --target $(XPU)/triton-xpu triton-xpu==3.3.0b1
	@$(XPU_PIP) $(XPU_INSTALL) --target $(XPU)/ipex intel-extension-for-pytorch==2.8.0
	@$(PYTHON) -m venv --without-pip $(XPU)/overwritten
	@$(XPU_PIP) --python $(XPU)/overwritten $(XPU_INSTALL) --pre triton-xpu==3.3.0b1
	@$(XPU_PIP) --python $(XPU)/overwritten $(XPU_INSTALL) triton==3.7.1
	@touch $@

dist: $(READY) ## wheel and sdist in dist/, of the last commit: the same commit gives the same bytes
	@git diff --quiet HEAD || { echo "make dist: the tree has changes that are not committed: git stash, or commit them"; exit 1; }
	@rm -rf dist
	@SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m build --quiet
	@cd dist && sha256sum *

clean: ## remove what the other targets made
	rm -rf $(VENV) .venv-matrix $(VLLM) $(VLLM)-$(OVERLAY) $(XPU) docs/_build .mypy_cache .ruff_cache .pytest_cache
