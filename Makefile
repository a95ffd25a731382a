# `make test` and `make demo` set up everything they need in .venv on a fresh machine (Python 3.11 or newer, a C++ compiler).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The kernels are compiled ahead of time with two versions of Triton; the second one has a folder of its own.
SECOND_TRITON := $(VENV)/second-triton

.PHONY: help setup test lint demo bench gpu-check clean

help:
	@echo "make test    lint, types and all tests (pytest options: ARGS='-k mlp')"
	@echo "make demo    correctness, training on digits and a small benchmark, in under 3 minutes"
	@echo "make bench   the quick benchmark suite; python -m bench has the rest"
	@echo "make gpu-check OUT=dir   on a machine with a GPU: tests, sanitizers, benchmarks, in under 8 minutes"
	@echo "make clean   removes .venv and everything built"

setup: $(READY)

$(READY): requirements-dev.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(SECOND_TRITON) \
		$$(sed -n 's/^# The second Triton.*: //p' requirements-dev.txt)
	@touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	SCORE_KERNELS_OTHER_TRITON=$(CURDIR)/$(SECOND_TRITON) $(BIN)/pytest -n 2 $(ARGS)

demo: $(READY)
	@$(BIN)/python -m score_kernels demo $(ARGS)

# On a machine with a GPU and torch, triton and pytest: nothing is installed. PYTHON picks the interpreter that has them.
gpu-check:
	$(PYTHON) -m bench.gpu_check --out $(or $(OUT),bench/results/gpu-check) $(ARGS)

bench: $(READY)
	@$(BIN)/python -m bench run --suite quick $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
