# Two commands do everything on a machine with Python 3.11 or newer, git and make:
#   make demo    compress a network, from nothing to the result table
#   make test    every check
# Both install first, into .venv; nothing outside this folder is touched, except that root on Debian gets python3-venv
# when it is missing. `make setup PYTHON=/path/to/python3` chooses the interpreter.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint clean

BIN := .venv/bin
STAMP := .venv/.installed
PYTHON ?=
RECIPE := pipelines/recipes/digits.yaml

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

setup: $(STAMP)

# torch is installed as constraints.txt pins it, which suits a machine without a GPU (torch==2.13.0 from an index of CPU
# builds) and one with (the CUDA build, several GB). To choose, point pip's own configuration to the index of that build.
$(STAMP): pyproject.toml constraints.txt
	@suits() {
	    command -v "$$1" >/dev/null && "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
	}
	complete() { "$$1" -c 'import ensurepip, venv' 2>/dev/null; }
	find_python() {
	    for candidate in $${PYTHON:-python3.11 python3 python3.12 python3.13 /usr/bin/python3}; do
	        if suits "$$candidate" && "$$1" "$$candidate"; then command -v "$$candidate"; return; fi
	    done
	    return 1
	}
	PYTHON="$(PYTHON)"
	if ! python=$$(find_python complete); then
	    if ! python=$$(find_python true); then
	        echo "setup: no Python 3.11 or newer was found$${PYTHON:+ at $$PYTHON}." >&2
	        echo "       Install one, or name it: make setup PYTHON=/path/to/python3" >&2
	        exit 1
	    fi
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
	        echo "setup: $$python has no venv or pip; installing Debian's python3-venv"
	        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv >/dev/null
	    fi
	    if ! python=$$(find_python complete); then
	        echo "setup: this Python lacks venv or pip: $$(find_python true)" >&2
	        echo "       On Debian and Ubuntu: sudo apt-get install python3-venv; then run make again." >&2
	        exit 1
	    fi
	fi
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then
	    echo "setup: creating .venv with $$python ($$("$$python" --version))"
	    rm -rf .venv
	    "$$python" -m venv .venv
	fi
	run() { $(BIN)/python -m pip --disable-pip-version-check "$$@" >.venv/install.log 2>&1 || {
	    tail -n 20 .venv/install.log >&2
	    echo "setup: 'pip $$1' failed; all it said is in .venv/install.log" >&2
	    exit 1
	} }
	echo "setup: installing pbkd and what it needs into .venv (about 2 GB; two to five minutes the first time)"
	run install -c constraints.txt -e '.[dev]'
	run check
	touch $@
	echo "setup: done; start with .venv/bin/pbkd --help"

demo: setup
	@$(BIN)/pbkd run $(RECIPE)

# Each tool once; the first that fails ends it and is named in the last line.
lint: setup
	@step() { echo "== $$*"; "$(BIN)/$$@" || { echo "FAILED: $$*" >&2; exit 1; }; }
	step ruff check .
	step mypy
	step lint-imports --no-logo

test: lint
	@echo "== pytest"
	$(BIN)/pytest || { echo "FAILED: pytest" >&2; exit 1; }

# What can be made again; finished stages in runs/ are work done and stay.
clean:
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
