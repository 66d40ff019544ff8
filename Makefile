# Everything here makes its own virtual environment first; a second call finds it ready.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Test processes; each has one thread, which on small tensors beats one process with many. Bytecode is kept, whatever the
# environment says, since many tests start processes that read the same modules.
WORKERS ?= 2
# Temporary files lie in memory where they can: tests write many thousands, and each is synced to the disk.
SCRATCH ?= $(firstword $(wildcard /dev/shm) $(TMPDIR) /tmp)
PYTEST := TMPDIR=$(SCRATCH) PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

.PHONY: help install demo test test-all lint docs bench
.DELETE_ON_ERROR:

help:
	@echo "make demo      distil a small model on real data and write a report"
	@echo "make test      the fast tests, doctests included        make test-all   the slow ones too"
	@echo "make lint      ruff and mypy                            make docs       build the documentation"
	@echo "make bench     run every benchmark                      make install    only the virtual environment"

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): PyTorch is large, the first time takes some minutes ..."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[test,lint]"
	@touch $@

demo: $(READY)
	@$(BIN)/limbeck demo

test: $(READY)
	@$(PYTEST)

test-all: $(READY)
	@$(PYTEST) -m "slow or not slow"

lint: $(READY)
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy

docs: $(READY)
	@$(BIN)/python docs/build.py

bench: $(READY)
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done
