# `make demo` and `make test` do all their own set-up in .venv; the second time they start at once.
# Another interpreter: make test PYTHON=python3.12. Without the tested pins: make test CONSTRAINTS=

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
DEMO_DIR ?= runs/demo
QUICK_DEMO_DIR ?= runs/quick-demo

.DELETE_ON_ERROR:
.PHONY: help demo quick-demo test lint

help:
	@echo 'make demo        train, attack and report on two necks; writes $(DEMO_DIR)/report.html'
	@echo 'make quick-demo  the same road in small, to see that it runs'
	@echo 'make test        the whole test suite'
	@echo 'make lint        ruff and mypy'

demo: $(VENV)/.installed-demo
	$(BIN)/srm-iqa demo --out $(DEMO_DIR)

quick-demo: $(VENV)/.installed-demo
	$(BIN)/srm-iqa demo --quick --out $(QUICK_DEMO_DIR)

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first: the install compiles csrc/ against its headers.
$(VENV)/.installed-%: pyproject.toml setup.py $(CONSTRAINTS) $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "srm-iqa needs Python 3.11 or newer, which PYTHON=$(PYTHON) is not; name another: make PYTHON=python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch $(addprefix --constraint ,$(CONSTRAINTS))
	$(BIN)/python -m pip install --quiet --editable '.[$*]' $(addprefix --constraint ,$(CONSTRAINTS))
	@touch $@
