# Everything starts from a bare checkout: a target creates .venv, installs what it needs and runs. A second
# call redoes only what changed: the stamps in .venv depend on the sources and on the pinned versions.
#
#   make demo      the whole way on real models: prune, fine-tune, accelerate, compare
#   make test      the test suite, against the installed package
#   make test-huge tests on more than 2**31 elements: 9 GB of memory
#   make bench     the benchmarks
#   make lint      ruff, clang-format, mypy --strict;  make format: apply the first two
#   make sanitize  the kernel tests, and those of operations that need no torch, under the address and
#                  undefined-behaviour sanitizers
#   make sanitize-thread  operations called from many threads, and shared by several, under the thread sanitizer
#   make sanitize-cuda  the CUDA kernels under them, in the emulator
#   make cuda      compile the CUDA part for sm_80 and sm_90a, and one tile of the CUTLASS products
#   make cuda-all  the same for every architecture, and all tiles
#   make arm       cross-build for AArch64, and kernel tests of its levels under qemu; ARGS=tests/kernels: all of those
#   make dev       editable install that rebuilds the extension on import when a source changed
#
# PYTHON=python3.12 chooses the interpreter; ARGS="-k isa -x" goes to pytest or to the demo. WORKERS=0 runs the
# tests in one process (for --pdb), 8 in eight.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4)))

BIN := $(CURDIR)/$(VENV)/bin
# cmake and ninja come from the system, or from the environment when the system has none (see ready).
export PATH := $(BIN):$(PATH)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# A file's tests share what its fixtures made, so they stay in one process. The threads of several processes share
# the cores: one that waits has to let go of its core.
# Without restarts: xdist waits for ever for the files of a worker that crashed, instead of naming the test.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --max-worker-restart=0
CMAKE := cmake -G Ninja -DPython_EXECUTABLE=$(BIN)/python -DPARED_WERROR=ON

# Folders are listed too: their time changes when a file is added or removed.
SOURCES := CMakeLists.txt pyproject.toml constraints.txt README.md LICENSE $(shell find csrc python \
  -name __pycache__ -prune -o \( -type d -o -name '*.cc' -o -name '*.h' -o -name '*.def' -o -name '*.cu' \
  -o -name '*.cuh' -o -name '*.py' -o -name '*.pyi' -o -name py.typed \) -print)
CXX_SOURCES = $(shell find csrc tests -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-huge bench lint format dev sanitized-address sanitized-thread sanitize \
  sanitize-thread sanitize-cuda emulated cuda-compiled cuda cuda-all arm arm-tools clean

demo: $(VENV)/installed-demo
	$(BIN)/pared demo $(ARGS)

test: $(VENV)/installed-test emulated
	$(PYTEST) $(ARGS)

test-huge: $(VENV)/installed-test
	PARED_TEST_HUGE=1 $(BIN)/python -m pytest tests/test_huge.py $(ARGS)

bench: $(VENV)/installed-test
	$(BIN)/python -m pytest bench $(ARGS)

lint: $(VENV)/installed-test $(VENV)/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/mypy

format: $(VENV)/linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# One build folder that outlives the install: an import of pared rebuilds what changed. That needs the build
# tools in the environment, hence no build isolation.
dev: $(VENV)/ready
	$(PIP) --no-build-isolation -C build-dir=build/editable -C editable.rebuild=true \
	  -C editable.verbose=false --editable '.[test]'
	rm -f $(VENV)/installed-*

# The sanitized extension and a copy of the Python files, apart from what is installed.
SANITIZE := build/sanitize
sanitized-address sanitized-thread: sanitized-%: $(VENV)/ready
	$(CMAKE) -S . -B $(SANITIZE)-$* -DPARED_SANITIZE=$* -DPARED_CUDA=off
	cmake --build $(SANITIZE)-$*
	rm -rf $(SANITIZE)-$*/package
	mkdir $(SANITIZE)-$*/package
	cp -R python/pared $(SANITIZE)-$*/package/
	rm -f $(SANITIZE)-$*/package/pared/*.so
	cmake --install $(SANITIZE)-$* --prefix $(SANITIZE)-$*/package

# The interpreter is not sanitized, so the runtime is preloaded. With address sanitizer's libstdc++ too, or the first
# C++ exception finds no __cxa_throw to intercept and aborts. CPython frees little at exit: leak detection would
# report only that.
preload = $$($${CXX:-c++} -print-file-name=$(1).so)
ADDRESS = LD_PRELOAD="$(call preload,libasan) $(call preload,libstdc++)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1

sanitize: sanitized-address
	$(PIP) numpy pytest pytest-xdist hypothesis
	export PYTHONPATH=$(CURDIR)/$(SANITIZE)-address/package PYTHONDONTWRITEBYTECODE=1 $(ADDRESS); \
	$(BIN)/python -c 'from pared import _core; assert "$(SANITIZE)" in _core.__file__, _core.__file__'; \
	PARED_RANDOM_CASES=$${PARED_RANDOM_CASES:-50000} \
	  $(PYTEST) tests/kernels $$(grep -LE '^(import|from) torch' tests/test_ops_*.py) -p no:cacheprovider $(ARGS)

# Four threads of pared's own pool: torch's is not sanitized, so what it synchronises is not seen. One process, whose
# exit status says whether there were reports; they go straight to the terminal, which pytest has to leave alone. The
# first command has to report a race, and the tests fork.
sanitize-thread: sanitized-thread
	$(PIP) numpy pytest hypothesis
	export PYTHONPATH=$(CURDIR)/$(SANITIZE)-thread/package:tests PYTHONDONTWRITEBYTECODE=1 PARED_NUM_THREADS=4 \
	  TSAN_OPTIONS='exitcode=66 die_after_fork=0 suppressions="$(CURDIR)/tests/tsan.supp"' LD_PRELOAD="$(call preload,libtsan)"; \
	$(BIN)/python tests/planted_race.py; \
	PARED_RANDOM_CASES=$${PARED_RANDOM_CASES:-2000} \
	  $(BIN)/python -m pytest -p without_torch --capture=sys tests/test_threads.py tests/kernels/test_random_cases.py \
	  -p no:cacheprovider $(ARGS)

# The CUDA kernels compiled for the CPU, for tests/cuda; and once more so that the emulator knows of every access
# to shared memory, for the bank conflicts.
emulated: $(VENV)/ready
	$(CMAKE) -S csrc/cuda/emulate -B build/emulated
	cmake --build build/emulated
	$(CMAKE) -S csrc/cuda/emulate -B build/accesses -DPARED_ACCESSES=ON
	cmake --build build/accesses

sanitize-cuda: $(VENV)/installed-test emulated
	$(CMAKE) -S csrc/cuda/emulate -B $(SANITIZE)-cuda -DPARED_SANITIZE=ON
	cmake --build $(SANITIZE)-cuda
	export PARED_EMULATED=$(CURDIR)/$(SANITIZE)-cuda $(ADDRESS); \
	$(PYTEST) tests/cuda -p no:cacheprovider $(ARGS)

# Compiles without a GPU, and runs what needs none: host logic, and the errors of a machine without a driver. Of the
# CUTLASS products, which nvcc takes minutes for, one tile here and all in cuda-all.
CUDAARCHS ?= 80-real;90a-real
CUTLASS_ONE_TILE ?= ON
cuda-compiled: $(VENV)/cuda-tools
	$(CMAKE) -S . -B build/cuda -DPARED_CUDA=on -DCMAKE_CUDA_ARCHITECTURES='$(CUDAARCHS)' \
	  -DPARED_CUTLASS_ONE_TILE=$(CUTLASS_ONE_TILE)
	cmake --build build/cuda --target _cuda_kernels

cuda: $(VENV)/installed-test cuda-compiled
	$(BIN)/python tools/check_sass.py build/cuda/_cuda_kernels*.so
	rm -rf build/cuda/package
	mkdir build/cuda/package
	cp -R "$$($(BIN)/python -c 'import os, pared; print(os.path.dirname(pared.__file__))')" build/cuda/package/
	cmake --install build/cuda --component cuda --prefix build/cuda/package
	PYTHONPATH=build/cuda/package $(BIN)/python -m pytest tests/test_cuda.py -p no:cacheprovider $(ARGS)

cuda-all:
	$(MAKE) cuda CUDAARCHS='80-real;86-real;89-real;90' CUTLASS_ONE_TILE=OFF

# AArch64 under qemu-user: its Python, its extension, and a copy of the Python files. The part and the level found on three
# processors come first; the tests then force each level on one that has them all.
ARM := build/arm
ARM_CXX ?= $(shell command -v aarch64-linux-gnu-g++{,-14,-13,-12,-11} | head -n 1)
ARM_TESTS := tests/test_isa.py tests/kernels/test_registry.py tests/kernels/test_random_cases.py

arm-tools:
	@[ -n "$(ARM_CXX)" ] && command -v qemu-aarch64 >/dev/null || { echo "make arm: needs Debian's packages \
	g++-aarch64-linux-gnu (or g++-12-aarch64-linux-gnu) and qemu-user" >&2; exit 1; }

$(ARM)/python/ready: tools/arm_root.sh constraints.txt | $(VENV)/ready
	tools/arm_root.sh $(ARM)/python $(BIN)/python
	touch $@

arm: arm-tools $(ARM)/python/ready
	cmake -G Ninja -S . -B $(ARM)/extension --toolchain cmake/aarch64-linux.cmake -DPARED_ARM_CXX=$(ARM_CXX) \
	  -DPARED_ARM_ROOT=$(CURDIR)/$(ARM)/python/root -DPARED_WERROR=ON -DPARED_CUDA=off \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	cmake --build $(ARM)/extension
	rm -rf $(ARM)/package
	mkdir $(ARM)/package
	cp -R python/pared $(ARM)/package/
	rm -f $(ARM)/package/pared/*.so
	cmake --install $(ARM)/extension --prefix $(ARM)/package
	export PYTHONPATH=$(CURDIR)/$(ARM)/package:$(CURDIR)/$(ARM)/python/site PYTHONDONTWRITEBYTECODE=1; \
	for expected in cortex-a72:0xd08:neon neoverse-n1:0xd0c:neondot max:0x051:neoni8mm; do \
	  found=$$(QEMU_CPU=$${expected%%:*} $(ARM)/python/root/usr/bin/python -c \
	    'import pared._core as c; print(c.cpu_brand().split()[-1] + ":" + c.isa())'); \
	  [ "$$found" = "$${expected#*:}" ] || { echo "expected $$expected, found $$found" >&2; exit 1; }; \
	done; \
	PARED_RANDOM_CASES=$${PARED_RANDOM_CASES:-10000} $(ARM)/python/root/usr/bin/python -m pytest -n $(WORKERS) \
	  --dist loadfile --max-worker-restart=0 -p no:cacheprovider $(or $(ARGS),$(ARM_TESTS))

clean:
	rm -rf build dist $(VENV)

# ---- stamps

# The environment and the build tools, so that the package builds in it without isolation: same versions
# every time, and a build folder whose paths stay valid from one install to the next.
$(VENV)/ready: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "pared needs Python 3.10 or newer; choose one with: make $(MAKECMDGOALS) PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) scikit-build-core pybind11
	v=$$(cmake --version 2>/dev/null | sed -n '1s/[^0-9]*//p' || true); \
	  [ "$$(printf '3.25\n%s\n' "$$v" | sort -V | head -n 1)" = 3.25 ] || $(PIP) cmake
	ninja --version >/dev/null 2>&1 || $(PIP) ninja
	touch $@

$(VENV)/installed-%: $(SOURCES) | $(VENV)/ready
	$(PIP) --no-build-isolation '.[$*]'
	touch $@

$(VENV)/linters: constraints.txt | $(VENV)/ready
	$(PIP) ruff mypy clang-format
	touch $@

$(VENV)/cuda-tools: constraints.txt | $(VENV)/ready
	$(PIP) --no-deps nvidia-cutlass nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	touch $@
