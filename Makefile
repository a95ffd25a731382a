# `make test` and `make demo` set up everything they need in .venv on a fresh machine (Python 3.11 or newer, a C++ compiler).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The kernels are compiled ahead of time with two versions of Triton; the second one has a folder of its own.
SECOND_TRITON := $(VENV)/second-triton

.PHONY: help setup test lint pytest compile inplace cuda demo bench gpu-check clean

help:
	@echo "make test    lint, types and all tests (pytest options: ARGS='-k mlp')"
	@echo "make cuda    compiles the CUDA kernels and puts them into the package, if there is an nvcc (docs/building.md)"
	@echo "make demo    correctness, training on digits and a small benchmark, in under 3 minutes"
	@echo "make bench   the quick benchmark suite; python -m bench has the rest"
	@echo "make gpu-check OUT=dir   on a machine with a GPU: tests, sanitizers, benchmarks, in under 8 minutes"
	@echo "make clean   removes .venv and everything built"

setup: $(READY)

$(READY): requirements-dev.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	SCORE_KERNELS_CUDA=0 $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $$(sed -n 's/^# CUTLASS.*: //p' requirements-dev.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(SECOND_TRITON) \
		$$(sed -n 's/^# The second Triton.*: //p' requirements-dev.txt)
	@touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A test that hangs is stopped, shows where it was, and fails; the others go on.
HANGS := -o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true

# The kernels compile beside the tests, and come into the package after them: no test sees them arrive.
test: lint
	@$(MAKE) --no-print-directory --jobs=2 pytest compile
	@$(MAKE) --no-print-directory inplace

pytest: $(READY)
	SCORE_KERNELS_OTHER_TRITON=$(CURDIR)/$(SECOND_TRITON) $(BIN)/pytest -n 2 $(HANGS) --durations=25 --ignore=tests/test_cuda_module.py $(ARGS)

compile: $(READY)
	nice -n 19 $(BIN)/python setup.py --quiet build_ext
	@for tree in build/cpython-*/CTestTestfile.cmake; do test ! -e $$tree || \
		PATH="$(CURDIR)/$(BIN):$$PATH" nice -n 19 ctest --test-dir $$(dirname $$tree) --output-on-failure || exit; done

inplace: $(READY)
	$(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/pytest -q tests/test_cuda_module.py

cuda: compile inplace

demo: $(READY)
	@$(BIN)/python -m score_kernels demo $(ARGS)

# On a machine with a GPU and torch, triton and pytest: nothing is installed. PYTHON picks the interpreter that has them.
gpu-check:
	$(PYTHON) -m bench.gpu_check --out $(or $(OUT),bench/results/gpu-check) $(ARGS)

bench: $(READY)
	@$(BIN)/python -m bench run --suite quick $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info score_kernels/_cuda.*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
