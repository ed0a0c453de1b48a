# `make demo` and `make test` set everything up themselves; ARGS is passed on.
PYTHON ?= python3
# Test processes. One thread each: more than the cores only slow each other down.
WORKERS ?= 2
ARGS ?=

BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: setup demo test check format clean

setup:
	@$(PYTHON) tools/bootstrap.py

demo: setup
	@$(BIN)/memdlm demo $(ARGS)

test: setup
	$(PYTEST) $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy
	$(PYTEST)

format: setup
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf .venv build dist
