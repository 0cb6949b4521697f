# The commands of the README. `make PYTHON=python3.12 …` chooses an interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PLUGINS := $(wildcard plugins/*)

.PHONY: help install quickstart test test-sglang lint types imports check clean

$(INSTALLED): pyproject.toml constraints.txt $(PLUGINS:%=%/pyproject.toml)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]' $(PLUGINS:%=--editable %)
	touch $@

install: $(INSTALLED)  ## create .venv and install kdflow, its plugins and what they are developed with

quickstart: install  ## distil a real small model on the CPU
	$(BIN)/kdflow quickstart

test: install  ## run the tests, those of the plugins included
	$(BIN)/python -m pytest

.venv-sglang/.installed: tests/sglang/cpu/install.sh tests/sglang/cpu/requirements.txt pyproject.toml
	bash tests/sglang/cpu/install.sh .venv-sglang $(PYTHON)
	touch $@

test-sglang: .venv-sglang/.installed  ## run the tests that start the real SGLang, on the CPU
	.venv-sglang/bin/python -m pytest -m sglang tests/sglang

lint: install  ## look at style and form
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## check the types
	$(BIN)/mypy

imports: install  ## check which room imports which
	$(BIN)/lint-imports

check: lint types imports  ## what each commit passes

help:  ## show these lines
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

clean:  ## delete the environments, and runs/
	rm -rf $(VENV) .venv-sglang runs
