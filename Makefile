# `make demo` and `make test` do all their own set-up in .venv; the second time they start at once.
# Another interpreter: make test PYTHON=python3.12. Without the tested pins: make test CONSTRAINTS=

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
JOBS ?= 2
VENV := .venv
# Files that compare bits; they have to pass whatever instructions a processor has.
PORTABLE := tests/kernels/test_attention_ops.py tests/kernels/test_cpu_core.py tests/kernels/test_landmark_selection.py \
  tests/kernels/test_landmark_solve.py tests/model/attacks/test_gradient_attacks.py \
  tests/model/attacks/test_optimum.py tests/model/test_model.py tests/model/test_neck.py \
  tests/model/training/test_loop.py \
  tests/model/test_ablate.py::test_without_links_nothing_of_the_attention_arrives
BIN := $(VENV)/bin
DEMO_DIR ?= runs/demo
QUICK_DEMO_DIR ?= runs/quick-demo
DOCS_DIR ?= build/docs

.DELETE_ON_ERROR:
.PHONY: help demo quick-demo test test-portable test-versions lint docs

help:
	@echo 'make demo        train, attack and report on two necks; writes $(DEMO_DIR)/report.html'
	@echo 'make quick-demo  a short demo with small models, as a smoke test'
	@echo 'make test        the whole test suite'
	@echo 'make test-portable  the tests that compare bits, as on a processor without AVX'
	@echo 'make test-versions  the whole suite with the oldest and the newest torch and Triton: 11 GB of packages'
	@echo 'make lint        ruff, mypy and codespell'
	@echo 'make docs        build the documentation into $(DOCS_DIR)/index.html; warnings are errors'

demo: $(VENV)/.installed-demo
	$(BIN)/srm-iqa demo --out $(DEMO_DIR)

quick-demo: $(VENV)/.installed-demo
	$(BIN)/srm-iqa demo --quick --out $(QUICK_DEMO_DIR)

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

test-portable: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(BIN)/python -m pytest -n $(JOBS) $(PORTABLE)

# Both run, then the outcome is that of both.
test-versions:
	@failed=; for name in oldest newest; do \
	  $(MAKE) test VENV=.venv-$$name CONSTRAINTS=constraints/$$name.txt || failed="$$failed $$name"; \
	done; \
	test -z "$$failed" || { echo "make test-versions: failed with the versions of:$$failed" >&2; exit 1; }

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

# From scratch each time: Sphinx repeats no warning about a page that it does not read again.
docs: $(VENV)/.installed-docs
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --quiet --fail-on-warning --fresh-env --conf-dir docs . $(DOCS_DIR)
	@echo 'make docs: wrote $(DOCS_DIR)/index.html'

# torch comes first: the install compiles csrc/ against its headers.
$(VENV)/.installed-%: pyproject.toml setup.py $(CONSTRAINTS) $(wildcard constraints/common.txt csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "srm-iqa needs Python 3.11 or newer, which PYTHON=$(PYTHON) is not; name another: make PYTHON=python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch $(addprefix --constraint ,$(CONSTRAINTS))
	$(BIN)/python -m pip install --quiet --editable '.[$*]' $(addprefix --constraint ,$(CONSTRAINTS))
	@touch $@
