# Everything here makes what it needs first: a virtual environment, the packages in it, and for `bench` wrk and nginx.
# Stamps in the environment remember what is installed, so that a second run begins at once.
#
#   make demo            two minutes of kos with a real client; stays up until ^C       (CHECK=1: ends, exit status tells;
#                                                                                        NODES=5: a cluster)
#   make test            the tests                          (ARGS='-k name', SLOW=1: the slow ones too, JOBS=1: in one process, not two)
#   make check           ruff, format, mypy --strict
#   make fuzz            the parsers, guided by coverage, NAME for one                  (SECONDS=60 each)
#   make bench           every figure, then the plots                                   (NAME=hot_get for one)
#   make venv            the environment alone, with everything in it
#   make clean           remove what make made

PYTHON ?= python3
VENV ?= .venv
NAME ?= all
NODES ?=
ARGS ?=
JOBS ?= 2
SECONDS ?= 60

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test check fuzz bench image clean

BIN := $(VENV)/bin
STAMP := $(VENV)/stamp

help:
	@sed -n 's/^#  *make /  make /p' Makefile

venv: $(STAMP)-test $(STAMP)-check $(STAMP)-bench

demo: $(STAMP)-demo
	$(BIN)/kos demo $(if $(CHECK),--check) $(if $(NODES),--nodes $(NODES))

# The tests of one file stay in one process, so that they share what is started for them.
test: $(STAMP)-test
	$(BIN)/python -m pytest -q $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist loadfile) $(if $(SLOW),-m 'slow or not slow') $(ARGS)

check: $(STAMP)-check $(STAMP)-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

FUZZED = $(if $(filter all,$(NAME)),$(shell $(BIN)/python -m tests.fuzz.targets),$(NAME))

fuzz: $(STAMP)-fuzz
	for target in $(FUZZED); do $(BIN)/python -m tests.fuzz.run $$target --seconds $(SECONDS); done

bench: $(STAMP)-bench $(STAMP)-system
	$(BIN)/python -m bench $(NAME) $(ARGS)

image:
	docker build --tag kos .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

$(STAMP)-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "kos needs Python 3.11 or later; found: $$($(PYTHON) --version 2>&1). Try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	      "python$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"; \
	  else \
	    echo "$(PYTHON) has no venv module. On Debian, as root: apt-get install python3-venv" >&2; exit 1; \
	  fi
	$(PYTHON) -m venv $(VENV)
	@touch $@

# One pattern for every extra of pyproject.toml: it is read again whenever that file changes.
$(STAMP)-demo $(STAMP)-test $(STAMP)-check $(STAMP)-bench $(STAMP)-fuzz: $(STAMP)-%: pyproject.toml | $(STAMP)-venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

# RUNLEVEL=1: installing nginx must not start it as a service. `bench` runs its own, on ports of its own.
$(STAMP)-system: | $(STAMP)-venv
	@missing=""; \
	for tool in wrk nginx; do PATH="$$PATH:/usr/sbin" command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && \
	    RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; \
	  else \
	    echo "bench needs:$$missing. On Debian, as root: apt-get install$$missing" >&2; exit 1; \
	  fi; \
	fi
	@touch $@
