# `make run` is the tour, `make test` the suite without its slow tier. Both build their own virtual environment on a bare
# machine. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes of pytest, each with one thread: a file of tests stays in one of them, and so do the models it has made.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
LOCKED := --constraint requirements-dev.lock
# Python compiles what is imported; compiling all 25,000 files of the packages would take a minute.
export PIP_NO_COMPILE := 1

.PHONY: help run test test-fast test-slow test-all test-matrix coverage lint format lock check-wheel clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

run: $(VENV)/.installed ## the tour: one small model from training to fast decoding, with a report
	$(BIN)/telltale tour

test: $(VENV)/.installed-dev lint ## what CI runs: ruff, mypy and every test that is not slow
	$(PYTEST) -m "not slow"

test-fast: $(VENV)/.installed-dev ## the fast tier in one process
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m fast

test-slow: $(VENV)/.installed-dev ## the slow tier alone
	$(PYTEST) -m slow

test-all: $(VENV)/.installed-dev lint ## every test
	$(PYTEST)

test-matrix: ## the fast tier with the lowest, the locked and the highest torch and Transformers
	PYTHON=$(PYTHON) scripts/test_matrix.sh

coverage: $(VENV)/.installed-dev ## the tests of make test, with coverage
	$(PYTEST) -m "not slow" --cov --cov-report=term:skip-covered

lint: $(VENV)/.installed-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: ## make requirements-dev.lock anew from a fresh environment
	PYTHON=$(PYTHON) scripts/lock.sh

check-wheel: ## build the wheel and use it in an empty environment
	PYTHON=$(PYTHON) scripts/check_wheel.sh

# torch comes first and alone: its CPU build satisfies the package's range, so no CUDA build follows it in.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	touch $@

# --strict makes a warning an error: a missing page, a broken anchor, a figure without results. The site goes to site/.
.PHONY: docs
docs: $(VENV)/.installed-docs ## the docs site, into site/
	$(BIN)/python docs/_hooks/check_links.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.installed-docs: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[report,align,edge,world]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml requirements-dev.lock
	$(BIN)/python -m pip install --quiet $(LOCKED) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-matrix build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage*
