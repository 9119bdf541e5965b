# make setup | demo | quick | test | bench: everything lives in .venv, runs/ and data/. make docs: the site, in build/docs.
# make prebuild: see docs/gpu.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.up-to-date
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc -type f)
TORCH := $(shell grep '^torch==' constraints.txt)

# Most tests compute on tiny tensors, where a second process helps and a second thread does not. -p no:benchmark:
# pytest-benchmark warns that it does not measure beside other processes.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest $(if $(CI),--durations=25)
SHARED := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(PYTEST) -n $(WORKERS) --dist worksteal -p no:benchmark
COSTLY := interpreter or compile or emulator or aot or process or slow

.PHONY: setup demo lint quick test bench docs prebuild study-packages clean

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

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# make quick OP=fan_out runs those tests of them that have fan_out in their names.
quick: lint
	$(SHARED) -m "not ($(COSTLY) or alone)" $(if $(OP),-k "$(OP)")

test: lint
	$(SHARED) -m "not alone"
	$(PYTEST) -m alone

bench: setup
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.report

# The site has an environment of its own, without the compiled module, which takes minutes to build: torch's CPU build
# and the packages of the extra `docs`.
DOCS := .venv-docs
DOCS_PACKAGES := $(shell sed -n 's/^docs = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ',')

docs: $(DOCS)/.up-to-date
	$(DOCS)/bin/python -m sphinx -q -W --keep-going -b html -d build/doctrees docs build/docs
	$(DOCS)/bin/python docs/_sphinx/check_links.py build/docs

$(DOCS)/.up-to-date: pyproject.toml constraints.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --no-compile -c constraints.txt $(TORCH) numpy $(DOCS_PACKAGES)
	touch $@

# The kernels' objects, for benchmarks/gpu_all.sh: they hold no Python, and on the GPU machine only the bindings are left
# to compile. The list of sums tells there whether the sources are still the same.
GPU_ARCH ?= 90
prebuild: setup
	rm -rf build/prebuilt
	$(BIN)/cmake -S . -B build/objects -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=Release \
	  -DMFWM_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=$(GPU_ARCH) -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build build/objects --target mfwm_cpu mfwm_cuda
	$(BIN)/cmake --install build/objects --component objects --prefix build/prebuilt
	find csrc CMakeLists.txt -type f -exec sha256sum {} + >build/prebuilt/sources

# What benchmarks/gpu_study.sh needs beside torch, for a machine without network.
STUDY_PYTHON ?= 3.12
study-packages: setup
	rm -rf build/study
	$(BIN)/python -m pip download --quiet --dest build/study --no-deps --only-binary=:all: --python-version $(STUDY_PYTHON) \
	  -c constraints.txt -r benchmarks/study/packages.txt

clean:
	rm -rf build dist *.egg-info mfwm_kernels/_native*.so
