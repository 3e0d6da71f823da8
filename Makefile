# make demo    learn to learn on glyphs, print a table, draw plots (minutes, no download)
# make test    run the tests
# make docs    build the documentation into build/docs; warnings are errors
# make bench   measure speed and memory
# make faults  kills, full disks, damaged files, bad input; count losses (12 minutes)
# make lint    format check, lint, type check
#
# Each makes .venv when there is none. PYTHON=/path/to/python chooses another Python;
# ARGS="..." goes to the command, e.g. make test ARGS="tests/test_inner.py -k memory"
.DEFAULT_GOAL := help
.PHONY: help demo test smoke docs bench faults lint format clean

VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
WORKERS ?= 2

# The first of these that runs (a name on PATH may be a stub), is >= 3.11 and has venv.
PYENV_ROOT ?= $(HOME)/.pyenv
CANDIDATES := $(foreach version,3.13 3.12 3.11 3.14,python$(version) \
	$(wildcard $(PYENV_ROOT)/versions/$(version).*/bin/python)) python3 python
PYTHON ?= $(shell for python in $(CANDIDATES); do \
	if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	>/dev/null 2>&1; then echo $$python; break; fi; done)

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 with the venv module among: $(CANDIDATES)"; \
	  echo "install one, or name it: make PYTHON=/path/to/python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=/path/to/python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp for each set of extras: `make demo` does not install what only tests need.
# The versions are pinned where constraints/ has them for this Python.
$(VENV)/.installed-%: pyproject.toml $(wildcard constraints/*.txt) | $(VENV)/bin/python
	@echo "installing metalstm[$*] into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]' \
	  $$($(BIN)/python constraints/arguments.py)
	@touch $@

# Linux: memory in large pages; docs/performance.md has the gains.
demo: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
demo: $(VENV)/.installed-experiments
	$(BIN)/python -m experiments.few_shot --preset demo $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder $(ARGS)

smoke: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder -m smoke $(ARGS)

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going $(ARGS) docs build/docs
	@echo "open build/docs/index.html"

bench: $(VENV)/.installed-experiments
	$(BIN)/python -m benchmarks.alternatives
	$(BIN)/python -m benchmarks.convolutions --quick
	$(BIN)/python -m benchmarks.memory --quick
	$(BIN)/python -m benchmarks.own_network
	$(BIN)/python -m benchmarks.roofline
	$(BIN)/python -m benchmarks.speed $(ARGS)
	$(BIN)/python -m benchmarks.updates --rounds 2

faults: $(VENV)/.installed-dev
	$(BIN)/python -m tests.faults $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
