# Everything runs in this repository's own virtual environment; `make demo` and `make test` need nothing set up before.
#   PYTHON=python3.12   the interpreter to build it with (3.10 or newer)
#   VENV=.venv          where it lies
#   PYTEST_ARGS=...     extra arguments for pytest, for instance PYTEST_ARGS="-k camera"
#   RUNS=...            benchmarks to repeat: groups or runs of benchmarks/runs.toml, or "all"
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= auto
PYTEST_ARGS ?=
RUNS ?=
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

.DEFAULT_GOAL := help
.PHONY: help demo test slow lint format types boundaries spell docs serve-docs bench clean

help:
	@echo "make demo    render a robot video, decode it, write plot, overlay and error table to jidm_demo/"
	@echo "make test    the default test suite;  make slow: the long tests"
	@echo "make lint    ruff;  make types: mypy;  make boundaries: what may import what;  make format: rewrite"
	@echo "make docs    the documentation site in site/;  make serve-docs: the same on http://127.0.0.1:8000"
	@echo "make spell   codespell, American spelling"
	@echo "make bench   list the benchmarks;  make bench RUNS=decoding: measure and write docs/benchmarks.md"
	@echo "make clean   remove the virtual environment and what was written"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "jidm needs Python 3.10 or newer: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# Two stamps: who only wants the demo does not install the test tools.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[sim]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[sim,raft,train,ray,serve,view,docs,dev]'
	@touch $@ $(VENV)/.demo $(VENV)/.docs

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[docs]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/jidm demo --out jidm_demo

test: $(VENV)/.dev
	@echo "The default tests take up to ten minutes on two cores; PYTEST_ARGS=\"-k camera\" runs a part of them."
	$(PYTEST)

slow: $(VENV)/.dev
	$(PYTEST) -m slow

boundaries: $(VENV)/.dev
	$(BIN)/python -m pytest -q tests/test_import_boundaries.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev
	$(BIN)/mypy
	@for script in benchmarks/*.py; do MYPYPATH=tests $(BIN)/mypy $$script || exit 1; done

spell: $(VENV)/.dev
	git ls-files -z | xargs -0 $(BIN)/codespell

# Material announces its successor on every build; the variable keeps that out of the log.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

serve-docs: docs
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory site 8000

# make bench lists the runs, make bench RUNS="decoding memory" repeats these and writes the page.
bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run_all.py $(RUNS)
	$(BIN)/python benchmarks/page.py

clean:
	rm -rf $(VENV) jidm_demo site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
