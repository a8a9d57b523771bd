# SPDX-License-Identifier: Apache-2.0
# Every target sets up what it needs: Python >= 3.10, a C++20 compiler and make are enough to start with.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=

SHELL := /bin/bash
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export PATH := $(abspath $(BIN)):$(PATH)
NATIVE := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
CPP := $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu')
SOURCES := csrc kernels pytorch_ext bench

.PHONY: demo test bench smoke lint format wheel asan clean

# Packed training, sparse video, adapters on one base: index.html in report/, report/video/ and report/experts/.
demo: $(VENV)/.demo
	gapless demo $(ARGS)

test: $(VENV)/.dev build/native/build.ninja
	cmake --build build/native
	ctest --test-dir build/native --output-on-failure
	python -m pytest $(ARGS)

bench: $(VENV)/.dev
	python -m pytest bench $(ARGS)

smoke: $(VENV)/.dev
	python -m pytest bench --benchmark-disable $(ARGS)

lint: $(VENV)/.dev
	ruff check
	ruff format --check
	clang-format --dry-run -Werror $(CPP)
	./.ci/house-rules
	rm -rf build/typed && python setup.py -q build_py --build-lib build/typed
	MYPYPATH=build/typed mypy

format: $(VENV)/.dev
	ruff check --fix
	ruff format
	clang-format -i $(CPP)

# A wheel carries kernels for every CPU of its architecture: they are chosen at run time.
wheel: $(VENV)/.torch
	rm -rf build/lib.* build/bdist.* dist
	$(PIP) wheel --no-build-isolation --no-deps -w dist .

# Everything that crosses into C++ once more, under the address and undefined-behaviour sanitizers: arguments at random
# on the kernels of each ISA in turn. EXAMPLES=1000 looks longer. Reports go past pytest's capture.
EXAMPLES ?= 20
ISAS ?= baseline avx2 avx512 avx512_bf16 amx
asan: $(VENV)/.dev
	rm -rf build/lib.* build/bdist.* build/asan-site
	GAPLESS_SANITIZE=ON GAPLESS_BUILD_TYPE=RelWithDebInfo CMAKE_ARGS=-DGAPLESS_TESTS=ON \
	$(PIP) install --no-build-isolation --no-deps --target build/asan-site .
	ctest --test-dir $$(echo build/cmake-*-asan) --output-on-failure
	failed=; for isa in $(ISAS); do \
	LD_PRELOAD="$$($(or $(CXX),c++) -print-file-name=libasan.so) $$($(or $(CXX),c++) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc PYTHONPATH=build/asan-site \
	GAPLESS_KEEP_MIB=0 GAPLESS_ISA=$$isa GAPLESS_FUZZ_EXAMPLES=$(EXAMPLES) \
	python -m pytest --capture=sys $(or $(ARGS),-q tests/test_plan_varlen.py tests/test_fuzz.py \
	tests/test_varlen_errors.py tests/test_varlen_attention.py tests/test_block_sparse_errors.py \
	tests/test_block_sparse_fuzz.py tests/test_block_sparse_attention.py tests/test_block_mass.py \
	tests/test_reroute.py tests/test_reroute_fuzz.py tests/test_expert_dispatch.py tests/test_fused_experts.py tests/test_grouped_mm.py \
	tests/test_permute.py tests/test_experts_fuzz.py) || failed+=" $$isa"; \
	done; test -z "$$failed" || { echo "failed on$$failed" >&2; exit 1; }

clean:
	rm -rf build dist report *.egg-info pytorch_ext/*.so
	find $(SOURCES) tests -name __pycache__ -prune -exec rm -rf {} +

build/native/build.ninja: | $(VENV)/.torch
	cmake -S . -B build/native -G Ninja

# Stamps. Build tools and torch come first, so that the build can run beside them with no isolation.
$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install "setuptools>=77" wheel "pybind11>=3" "cmake>=3.24" ninja "$(TORCH)"
	touch $@

$(VENV)/.%: $(VENV)/.torch $(NATIVE)
	$(PIP) install --no-build-isolation -e ".[$*]"
	touch $@
