# `make` alone lists the targets. Each of them does its own set-up, in .venv, and only once.

PYTHON ?= python3
FRAMEWORKS := torch
BIN := .venv/bin
DEMO := .venv/.installed-demo
TEST := .venv/.installed-test
# The modules of a backend whose framework is missing have no examples to run. The one test in the suite folder is
# for `nonlocal conformance`.
DOCTESTS := --doctest-modules --doctest-ignore-import-errors --ignore=conformance/nonlocal_conformance/suite

# uv does not read the settings of pip.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint style types format

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: $(DEMO) ## denoise a photograph with every installed backend and draw demo.png; ARGS="--help" lists the options
	$(BIN)/nonlocal demo $(ARGS)

test: $(TEST) ## run the examples of the docstrings and the whole test suite; ARGS are given to pytest
	$(BIN)/pytest $(DOCTESTS) nonlocal_core backends conformance $(ARGS)

lint: style types ## run style and types

style: $(TEST) ## check the style of the code
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(TEST) ## check the types of the core and of the conformance suite
	$(BIN)/mypy

format: $(TEST) ## correct the style where that can be done by rule
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(BIN)/uv: constraints.txt
	@echo "Setting up .venv: a minute or so when everything must be downloaded, and only this once."
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; name one: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt uv
	@touch $@

.venv/.installed-%: pyproject.toml constraints.txt $(BIN)/uv
	$(BIN)/uv pip install --python $(BIN)/python -c constraints.txt -b constraints.txt -e ".[$(FRAMEWORKS),$*]"
	@touch $@
