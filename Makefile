# `make` alone lists the targets. Each of them does its own set-up, in .venv, and only once.

PYTHON ?= python3
FRAMEWORKS := torch,tensorflow-cpu,jax
BIN := .venv/bin
DEMO := .venv/.installed-demo
DOCS := .venv/.installed-docs
TEST := .venv/.installed-test
PEERS := .venv/.installed-peers
MUTANTS := .venv-mutants/.installed
REPORT := benchmarks/html/index.html
# The modules of a backend whose framework is missing have no examples to run. The one test in the suite folder is
# for `nonlocal conformance`; the drivers of the peers need what only `make peers` installs.
IGNORED := conformance/nonlocal_conformance/suite conformance/peers
# Each process holds three frameworks, in 2 GB or so.
WORKERS ?= 2
DOCTESTS := --doctest-modules --doctest-ignore-import-errors $(IGNORED:%=--ignore=%)

# uv does not read the settings of pip.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# TensorFlow's notes about this machine's processor.
export TF_CPP_MIN_LOG_LEVEL ?= 2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test faults peers mutants lint style types format bench bench-full bench-compare bench-publish
.PHONY: docs docs-serve docs-test

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 15

demo: $(DEMO) ## denoise a photograph with every installed backend and draw demo.png; ARGS="--help" lists the options
	$(BIN)/nonlocal demo $(ARGS)

test: $(TEST) ## run the examples of the docstrings and the whole test suite; ARGS are given to pytest
	$(BIN)/pytest -n $(WORKERS) --dist worksteal $(DOCTESTS) nonlocal_core backends conformance $(ARGS)

peers: $(PEERS) ## run the suite on other implementations of the block and write docs/peers.md
	PYTHONPATH=conformance $(BIN)/python -m peers > .venv/peers.md
	mv .venv/peers.md docs/peers.md

faults: $(TEST) ## print the faulty implementations and the checks that reject them, as a table
	$(BIN)/python conformance/tests/meta/faults.py

mutants: $(MUTANTS) ## change the core line by line and see that its tests notice; takes about 20 minutes
	PYTHONPATH=conformance:backends .venv-mutants/bin/mutmut run $(ARGS)
	.venv-mutants/bin/mutmut results

lint: style types ## run style and types

style: $(TEST) ## check the style of the code
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(TEST) ## check the types of the core, of the conformance suite and of the benchmarks
	$(BIN)/mypy

format: $(TEST) ## correct the style where that can be done by rule
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(PEERS) ## measure some of the benchmarks in a few minutes; ARGS are names of their classes, such as Scaling
	$(BIN)/python benchmarks/run.py quick $(ARGS)
	$(BIN)/nonlocal bench

bench-full: $(PEERS) ## measure all benchmarks, which takes hours; ARGS are names of their classes
	$(BIN)/python benchmarks/run.py full $(ARGS)

bench-compare: $(PEERS) ## measure the commit BASE and HEAD and compare them; ARGS are names of their classes
	$(BIN)/python benchmarks/run.py compare $(BASE) $(ARGS)

bench-publish: $(PEERS) ## make the pages of all results, in benchmarks/html; npm fetches their scripts
	$(BIN)/python benchmarks/run.py publish

# The report of asv brings a style sheet that names fonts of icons, of which it shows none.
docs: $(DOCS) $(REPORT) ## build the site in build/site, every warning an error, and check its links
	$(BIN)/sphinx-build -W -n --keep-going -d build/site.state docs build/site
	$(BIN)/linkchecker --no-status --no-warnings --no-robots --ignore-url=/report/fonts/ build/site/index.html
	@echo "The site is in build/site; make docs-serve shows it."

docs-serve: docs ## build the site and show it at http://localhost:8000
	$(BIN)/python -m http.server -b 127.0.0.1 -d build/site 8000

docs-test: docs ## build the site and test it in Chromium; SCREENSHOTS=1 keeps build/screenshots, ARGS are given to pytest
	$(BIN)/pytest -n $(WORKERS) docs/tests $(ARGS)

$(BIN)/uv: constraints.txt
	@echo "Setting up .venv: a minute or so when everything must be downloaded, and only this once."
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; name one: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt uv
	@touch $@

.venv/.installed-%: pyproject.toml constraints.txt $(BIN)/uv
	$(BIN)/uv pip install --python $(BIN)/python -c constraints.txt -b constraints.txt -e ".[$(FRAMEWORKS),$*]"
	@touch $@

$(REPORT): benchmarks/npm.py benchmarks/page.py $(wildcard benchmarks/results/*/*.json) | $(DOCS)
	$(BIN)/python benchmarks/run.py publish

# mmcv-lite asks for opencv-python, whose modules opencv-python-headless has too, without a window system. fastreid and
# slowfast ask for packages that cannot be had beside this PyTorch; their blocks need none of them.
$(PEERS): pyproject.toml constraints.txt $(TEST)
	echo "opencv-python" > .venv/excluded
	$(BIN)/uv pip install --python $(BIN)/python -c constraints.txt -b constraints.txt --excludes .venv/excluded -e ".[peers]"
	$(BIN)/uv pip install --python $(BIN)/python -c constraints.txt --no-deps fastreid slowfast
	@touch $@

# Without this project itself: its editable install would be found before the changed copy.
$(MUTANTS): pyproject.toml constraints.txt $(BIN)/uv
	$(BIN)/uv venv --clear --python $(BIN)/python .venv-mutants
	$(BIN)/uv pip install --python .venv-mutants/bin/python -c constraints.txt -r pyproject.toml --extra test mutmut
	@touch $@
