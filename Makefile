# Each target makes .venv if it is missing and installs what it needs; the second call starts at once.
# PYTHON=... chooses the interpreter of a new environment, VENV=... another place for it, WORKERS=... the processes that
# share the tests, PYTEST_ARGS="..." adds arguments to pytest.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=
VENV_TL4 ?= .venv-tl4
BIN := $(VENV)/bin
READY := $(VENV)/installed
READY_TL4 := $(VENV_TL4)/installed

.PHONY: help venv demo test test-tl4 check format-check lint types format docs clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      show what the shipped models do in both streams, and train one for a minute"
	@echo "make test      run the tests"
	@echo "make test-tl4  run the tests with TransformerLens 4, in $(VENV_TL4)"
	@echo "make check     formatter, linter, type checker, tests"
	@echo "make format    rewrite the code as the formatter wants it"
	@echo "make docs      build the documentation into site/, warnings being errors"
	@echo "make venv      only make $(VENV) with everything in it"
	@echo "make clean     remove what was built, and $(VENV)"

venv: $(READY)

$(VENV)/pyvenv.cfg $(VENV_TL4)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; ok = sys.version_info >= (3, 11); sys.exit(None if ok else \
	  "Python 3.11 or later is needed, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(@D) || { rm -rf $(@D); exit 1; }

# The stamp is newer than both files, or everything is installed again.
$(READY): pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(READY_TL4): pyproject.toml constraints-tl4.txt | $(VENV_TL4)/pyvenv.cfg
	$(VENV_TL4)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-tl4.txt --editable '.[test]'
	@touch $@

demo: $(READY)
	$(BIN)/python -m sa_lens demo

# Whole files go to one process, so that what a file's tests share is made once; tests/conftest.py says which go first
# and which files go together. Compiled tests are kept also where the environment forbids it: compiling takes 10 s each.
PYTEST := -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test test-tl4: export OMP_NUM_THREADS := 1
test test-tl4: export PYTHONDONTWRITEBYTECODE :=
test: $(READY)
	$(BIN)/python $(PYTEST)

# Those of SAELens, of the site and of the decoder against TransformerLens 3 are skipped.
test-tl4: $(READY_TL4)
	$(VENV_TL4)/bin/python $(PYTEST)

check: format-check lint types test

format-check: $(READY)
	$(BIN)/ruff format --check .

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

# Lines of code on a page must fit beside the margins of the site; tests/test_docs.py checks it.
format: $(READY)
	$(BIN)/ruff format .
	find README.md docs -name '*.md' | xargs $(BIN)/ruff format --line-length 88 --config 'format.exclude = []'
	$(BIN)/ruff check --fix .

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "the documentation is in site/: open site/index.html"

clean:
	rm -rf $(VENV) $(VENV_TL4) site build dist .pytest_cache .ruff_cache .mypy_cache
