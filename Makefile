# Two commands do everything on a machine with Python 3.11 or newer, git and make:
#   make demo    compress a network, from nothing to the result table and a report
#   make test    every check, in about 25 minutes; make quick takes a few minutes
# And make docs builds the documentation's site into build/site.
# Both install first, into .venv; nothing outside this folder is touched, except that root on Debian gets python3-venv
# when it is missing, and for make test what FFCV is built from, Chromium and Slurm (make ffcv, browser, slurm): it says so
# first, and SYSTEM=no does without.
# `make setup PYTHON=/path/to/python3` chooses the interpreter.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help setup ffcv browser slurm system demo docs quick test proof lint clean

BIN := .venv/bin
STAMP := .venv/.installed
COMPILED := .venv/.compiled
FFCV := .venv/.ffcv
FFCV_PACKAGES := g++ pkg-config libturbojpeg0-dev libopencv-dev
BROWSER_PACKAGES := chromium fonts-dejavu-core
SLURM_PACKAGES := slurmctld slurmd slurmdbd slurm-client munge mariadb-server iproute2
SLURM_DAEMONS := slurmctld slurmd slurmdbd sbatch munged mariadbd ip
PYTHON ?=
# More need more memory: some tests start a Ray of their own.
TEST_PROCESSES := 2
# A file of tests stays with one process, whose fixtures it shares; conftest.py has the slow files begin first. Modules are
# compiled once, whatever the environment says: tests start a thousand processes. Those compute with one thread: two that
# share a core with others wait for one another most of the time.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
RECIPE := pipelines/recipes/digits.yaml

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

setup: $(STAMP) $(COMPILED)

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
	    if [ "$(SYSTEM)" != no ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
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
	run install --upgrade pip
	run install --no-compile -c constraints.txt -e '.[dev]'
	run check
	touch $@
	echo "setup: done; start with .venv/bin/pbkd --help"

# Modules compiled by all processors, where pip would use one; tests compile those that they import. Packages carry files of
# other Pythons, which nobody imports.
$(COMPILED): $(STAMP)
	@$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' .venv/lib || true
	touch $@

# Debian's packages, which only root on Debian or Ubuntu gets, and not with SYSTEM=no. `without NAME COMMAND...` prints
# those commands that are missing; `packages NAME PACKAGE...` installs, or says what to type, and fails.
define SYSTEM_PACKAGES
export PATH=$$PATH:/usr/sbin:/sbin
without() { for name in "$$@"; do command -v "$$name" >/dev/null || echo "$$name"; done; }
may_install() { [ "$(SYSTEM)" != no ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; }
packages() {
    local part=$$1; shift
    if ! may_install; then
        echo "$$part: not installed here; as root on Debian or Ubuntu:" >&2
        echo "      apt-get install --no-install-recommends $$*; then: make $$part" >&2
        return 1
    fi
    echo "$$part: installing Debian's $$*"
    mkdir -p build
    # The daemons of a package are not started by its installation.
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
        printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d
    fi
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$$@"; } \
        >"build/apt-$$part.log" 2>&1 || { tail -n 5 "build/apt-$$part.log" >&2; return 1; }
}
has_ffcv_packages() { command -v g++ >/dev/null && pkg-config --exists opencv4 libturbojpeg 2>/dev/null; }
endef

# FFCV reads data at full speed. It is built here, in a minute or two.
ffcv: $(FFCV)

$(FFCV): $(STAMP)
	@$(SYSTEM_PACKAGES)
	has_ffcv_packages || packages ffcv $(FFCV_PACKAGES)
	echo "ffcv: building FFCV"
	if ! $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt -e '.[ffcv]' >.venv/ffcv.log 2>&1 ||
	    ! $(BIN)/python -c 'import ffcv' >>.venv/ffcv.log 2>&1; then
	    tail -n 20 .venv/ffcv.log >&2
	    echo "ffcv: the build failed; all it said is in .venv/ffcv.log" >&2
	    exit 1
	fi
	touch $@

# The tests of what a person sees drive Debian's Chromium.
browser:
	@$(SYSTEM_PACKAGES)
	[ -z "$$(without chromium)" ] || packages browser $(BROWSER_PACKAGES)

# The tests of `pbkd slurm` run a Slurm of two nodes on this machine (benchmarks/slurm_lab), by Debian's daemons.
slurm:
	@$(SYSTEM_PACKAGES)
	[ -z "$$(without $(SLURM_DAEMONS))" ] || packages slurm $(SLURM_PACKAGES)

# What `make test` needs of Debian, at once.
system:
	@$(SYSTEM_PACKAGES)
	wanted=()
	has_ffcv_packages || wanted+=($(FFCV_PACKAGES))
	[ -z "$$(without chromium)" ] || wanted+=($(BROWSER_PACKAGES))
	[ -z "$$(without $(SLURM_DAEMONS))" ] || wanted+=($(SLURM_PACKAGES))
	if [ $${#wanted[@]} = 0 ]; then exit; fi
	if ! may_install; then
	    echo "system: without Debian's $${wanted[*]}, some tests will be skipped" >&2
	    exit
	fi
	echo "system: as root, this installs Debian's $${wanted[*]}"
	echo "system: make test SYSTEM=no does without, and skips the tests that need them"
	packages system "$${wanted[@]}" || echo "WARNING: without these, some tests will be SKIPPED" >&2

demo: setup
	@$(BIN)/pbkd run $(RECIPE)

# Its warnings are errors (mkdocs.yml); the variable silences an advertisement of the theme's makers.
docs: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet && echo "docs: build/site/index.html"

# Each tool once; the first that fails ends it and is named in the last line.
lint: $(STAMP)
	@step() { echo "== $$*"; "$(BIN)/$$@" || { echo "FAILED: $$*" >&2; exit 1; }; }
	step ruff check .
	step mypy
	step lint-imports --no-logo

# Lint, types and the unit tests that take no time.
quick: lint
	@echo "== pytest, without what is slow"
	$(PYTEST) -m "not slow" tests/unit tests/golden || { echo "FAILED: pytest" >&2; exit 1; }

# What of this the machine cannot have has its tests skipped, which pytest says once more at the end; where PBKD_REQUIRE
# names it, that is a failure.
test:
	@echo "test: lint, types, and every test but the proofs: about 25 minutes on two cores"
	$(MAKE) --no-print-directory -j 2 system $(STAMP)
	$(MAKE) --no-print-directory -j 2 lint $(FFCV) || {
	    $(MAKE) --no-print-directory lint
	    if [[ ",$${PBKD_REQUIRE:-}," == *",ffcv,"* ]]; then echo "FAILED: PBKD_REQUIRE=ffcv" >&2; exit 1; fi
	    echo "WARNING: no ffcv, so its tests will be SKIPPED; the reason stands above" >&2
	}
	echo "== pytest"
	$(PYTEST) || { echo "FAILED: pytest" >&2; exit 1; }

# What is too long for every run, some hours: benchmarks/proof.py, which appends its figures to benchmarks/results/proof.csv.
proof: setup
	@$(BIN)/python -m benchmarks.proof

# What can be made again; finished stages in runs/ are work done and stay.
clean:
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
