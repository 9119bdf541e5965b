# make setup | demo | test | bench: everything lives in .venv, runs/ and data/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.up-to-date
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc -type f)
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: setup demo test bench clean

setup: $(STAMP)

# torch comes first and by its exact version: asked for loosely, pip takes the newest build with gigabytes of CUDA
# packages. The rest is resolved with it in place.
$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH) "setuptools>=77" "pybind11>=2.13" "cmake>=3.24" ninja
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/mfwm demo --out runs/demo

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

bench: setup
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf build dist *.egg-info mfwm_kernels/_native*.so
