# Two commands: `make demo` compares norms, `make test` checks everything. Both set up what they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
RUNS ?= runs
WORKERS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test check-all bench docs lint format readme clean

help:
	@echo "make demo     install, compare norms on a CNN, an RNN and a Transformer, print and write the report"
	@echo "make test     install, then lint, types, import rules and tests"
	@echo "make check-all  run every check on every norm and keep the results for the documentation"
	@echo "make bench    measure what the documentation says of speed (about five minutes, on a quiet machine)"
	@echo "make docs     build the documentation: docs/_build/html/index.html"
	@echo "make readme   write the README's table of norms from the registry"
	@echo "make format   let ruff format the code and mend what it can"
	@echo "make clean    remove the environment and caches (results in $(RUNS)/ are kept)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "normzoo needs Python 3.11 or newer, $(PYTHON) is older: make PYTHON=python3.12 …" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and by itself, so that nothing else chooses another build of it
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(PIP) torch
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	@$(BIN)/normzoo run experiments/quickstart.py --out $(RUNS) $(if $(WORKERS),--workers $(WORKERS))

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto

$(VENV)/.installed-docs: $(VENV)/.installed
	@$(PIP) --editable '.[docs]'
	@touch $@

docs: $(VENV)/.installed-docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going -b html docs docs/_build/html
	@echo "docs: docs/_build/html/index.html"

check-all: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python docs/check_all.py

bench: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/normzoo bench --suite --out docs/speed.json

readme: $(VENV)/.installed
	$(BIN)/python docs/readme.py

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache .hypothesis
