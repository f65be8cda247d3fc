# Two commands do everything on a machine with Python 3.11 or newer, git and make:
#   make demo    compress a network, from nothing to the result table and a report
#   make test    every check
# And make docs builds the documentation's site into build/site.
# Both install first, into .venv; nothing outside this folder is touched, except that root on Debian gets python3-venv
# when it is missing, and for make test what FFCV is built from, Chromium and Slurm (make ffcv, browser, slurm).
# `make setup PYTHON=/path/to/python3` chooses the interpreter.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help setup ffcv browser slurm demo docs test lint clean

BIN := .venv/bin
STAMP := .venv/.installed
FFCV := .venv/.ffcv
FFCV_PACKAGES := g++ pkg-config libturbojpeg0-dev libopencv-dev
BROWSER_PACKAGES := chromium fonts-dejavu-core
SLURM_PACKAGES := slurmctld slurmd slurmdbd slurm-client munge mariadb-server iproute2
PYTHON ?=
# More need more memory: some tests start a Ray of their own.
TEST_PROCESSES := 2
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

# FFCV reads data at full speed. It is built here, in a minute or two; root on Debian gets the packages that takes.
ffcv: $(FFCV)

$(FFCV): $(STAMP)
	@buildable() { command -v g++ >/dev/null && pkg-config --exists opencv4 libturbojpeg 2>/dev/null; }
	if ! buildable && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
	    echo "ffcv: installing Debian's $(FFCV_PACKAGES)"
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	        $(FFCV_PACKAGES); } >.venv/apt.log 2>&1 || tail -n 5 .venv/apt.log >&2
	fi
	if ! buildable; then
	    echo "ffcv: its system packages are missing, and are installed only by root on Debian or Ubuntu:" >&2
	    echo "      sudo apt-get install --no-install-recommends $(FFCV_PACKAGES); then: make ffcv" >&2
	    exit 1
	fi
	echo "ffcv: building FFCV"
	if ! $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt -e '.[ffcv]' >.venv/ffcv.log 2>&1 ||
	    ! $(BIN)/python -c 'import ffcv' >>.venv/ffcv.log 2>&1; then
	    tail -n 20 .venv/ffcv.log >&2
	    echo "ffcv: the build failed; all it said is in .venv/ffcv.log" >&2
	    exit 1
	fi
	touch $@

# The tests of what a person sees drive Debian's Chromium; root on Debian gets it.
browser:
	@if ! command -v chromium >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
	    echo "browser: installing Debian's $(BROWSER_PACKAGES)"
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	        $(BROWSER_PACKAGES); } >.venv/browser.log 2>&1 || tail -n 5 .venv/browser.log >&2
	fi
	if ! command -v chromium >/dev/null; then
	    echo "browser: there is no Chromium, and it is installed only by root on Debian or Ubuntu:" >&2
	    echo "      sudo apt-get install --no-install-recommends $(BROWSER_PACKAGES); then: make browser" >&2
	    exit 1
	fi

# The tests of `pbkd slurm` run a Slurm of two nodes on this machine (benchmarks/slurm_lab); root on Debian gets its
# daemons, none of which is started by the installation.
slurm:
	@missing() {
	    for name in slurmctld slurmd slurmdbd sbatch munged mariadbd ip; do
	        command -v "$$name" >/dev/null || return 0
	    done
	    return 1
	}
	export PATH=$$PATH:/usr/sbin:/sbin
	if missing && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
	    echo "slurm: installing Debian's $(SLURM_PACKAGES)"
	    if [ ! -e /usr/sbin/policy-rc.d ]; then
	        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
	        printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d
	    fi
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	        $(SLURM_PACKAGES); } >.venv/slurm.log 2>&1 || tail -n 5 .venv/slurm.log >&2
	fi
	if missing; then
	    echo "slurm: its daemons are missing, and are installed only by root on Debian or Ubuntu:" >&2
	    echo "      sudo apt-get install --no-install-recommends $(SLURM_PACKAGES); then: make slurm" >&2
	    exit 1
	fi

demo: setup
	@$(BIN)/pbkd run $(RECIPE)

# Its warnings are errors (mkdocs.yml); the variable silences an advertisement of the theme's makers.
docs: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet && echo "docs: build/site/index.html"

# Each tool once; the first that fails ends it and is named in the last line.
lint: setup
	@step() { echo "== $$*"; "$(BIN)/$$@" || { echo "FAILED: $$*" >&2; exit 1; }; }
	step ruff check .
	step mypy
	step lint-imports --no-logo

# What of this the machine cannot have has its tests skipped, which pytest says once more at the end; where PBKD_REQUIRE
# names it, that is a failure.
test: lint
	@for part in ffcv browser slurm; do
	    if $(MAKE) --no-print-directory $$part; then continue; fi
	    if [[ ",$${PBKD_REQUIRE:-}," == *",$$part,"* ]]; then echo "FAILED: PBKD_REQUIRE=$$part" >&2; exit 1; fi
	    echo "WARNING: no $$part, so its tests will be SKIPPED; the reason stands above" >&2
	done
	echo "== pytest"
	$(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile || { echo "FAILED: pytest" >&2; exit 1; }

# What can be made again; finished stages in runs/ are work done and stay.
clean:
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
