# `make` alone lists the targets. Each of them does its own set-up, in VENV, and only once.

PYTHON ?= python3
FRAMEWORKS := torch,tensorflow-cpu,jax
# Another environment beside .venv, and what uv takes the versions from: `make test VENV=.venv-3.13 PYTHON=python3.13`.
VENV ?= .venv
PINS ?= -c constraints.txt -b constraints.txt
BIN := $(VENV)/bin
DEMO := $(VENV)/.installed-demo
DOCS := $(VENV)/.installed-docs
TEST := $(VENV)/.installed-test
PEERS := $(VENV)/.installed-peers
# How much `make fuzz` reads and computes: counts, or times such as 600s.
COUNT ?= 10000
BLOCKS ?= 2000
MUTANTS := .venv-mutants/.installed
REPORT := benchmarks/html/index.html
# The modules of a backend whose framework is missing have no examples to run. The one test in the suite folder is
# for `nonlocal conformance`; the drivers of the peers need what only `make peers` installs.
IGNORED := conformance/nonlocal_conformance/suite conformance/peers
# Each process holds three frameworks, in 2 GB or so.
WORKERS ?= 2
DOCTESTS := --doctest-modules --doctest-ignore-import-errors $(IGNORED:%=--ignore=%)
SUITE := -n $(WORKERS) --dist worksteal $(DOCTESTS) nonlocal_core backends conformance

# Kernels for other processors than this one, and another number of threads: each library has a switch of its own.
# TensorFlow does without oneDNN there, which ends its process in a bfloat16 product; the allocator that remains is
# malloc, which must give back what it is given, or the resident set says nothing of a call. XLA goes down to AVX2 alone,
# since jaxlib has no float16 below it.
ELSEWHERE := TF_ENABLE_ONEDNN_OPTS=0 MALLOC_MMAP_THRESHOLD_=65536 XLA_FLAGS=--xla_cpu_max_isa=AVX2
ELSEWHERE_sse := OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41 \
	OPENBLAS_CORETYPE=Nehalem \
	NPY_DISABLE_CPU_FEATURES="`$(BIN)/python -c 'import numpy; print(*numpy._core._multiarray_umath.__cpu_dispatch__)'`"
ELSEWHERE_avx2 := OMP_NUM_THREADS=2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 \
	OPENBLAS_CORETYPE=Haswell

# uv does not read the settings of pip.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# TensorFlow's notes about this machine's processor.
export TF_CPP_MIN_LOG_LEVEL ?= 2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-elsewhere test-oldest test-torch fuzz faults peers mutants lint style types format bench bench-full bench-compare bench-publish
.PHONY: docs docs-serve docs-test gpu

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 15

demo: $(DEMO) ## denoise a photograph with every installed backend and draw demo.png; ARGS="--help" lists the options
	$(BIN)/nonlocal demo $(ARGS)

# Arrays as small as those of tests only wait for other threads; the tests of threads take their own number.
test: export OMP_NUM_THREADS ?= 1
test: $(TEST) ## run the examples of the docstrings and the whole test suite; ARGS are given to pytest
	$(BIN)/pytest $(SUITE) $(ARGS)

test-elsewhere: test-elsewhere-sse test-elsewhere-avx2 ## run the suite in the arithmetic of older processors, in one thread and in two

test-elsewhere-%: $(TEST)
	env $(ELSEWHERE) $(ELSEWHERE_$*) TORCHINDUCTOR_CACHE_DIR=$(abspath $(VENV))/inductor-$* $(BIN)/pytest $(SUITE) $(ARGS)

test-oldest: ## run the suite on the oldest versions that pyproject.toml declares, in .venv-oldest
	$(MAKE) test VENV=.venv-oldest PINS="--resolution lowest-direct"

test-torch: ## run the suite on another PyTorch, in an environment of its own: make test-torch TORCH=2.11.0
	mkdir -p .venv-torch-$(TORCH)
	sed -e "s/^torch==.*/torch==$(TORCH)/" -e "/^setuptools==/d" constraints.txt > .venv-torch-$(TORCH)/constraints.txt
	$(MAKE) test VENV=.venv-torch-$(TORCH) PINS="-c .venv-torch-$(TORCH)/constraints.txt -b constraints.txt"

peers: $(PEERS) ## run the suite on other implementations of the block and write docs/peers.md
	PYTHONPATH=conformance $(BIN)/python -m peers > $(VENV)/peers.md
	mv $(VENV)/peers.md docs/peers.md

fuzz: $(TEST) ## read COUNT changed files with each reader, compare COUNT blocks of the reference and BLOCKS of each adapter; or times: 600s
	@status=0; $(BIN)/python conformance/tests/fuzz/files.py $(COUNT) || status=1; \
	for call in "numpy $(COUNT)" "torch $(BLOCKS)" "tensorflow $(BLOCKS)" "jax $(BLOCKS)"; do \
		$(BIN)/python conformance/tests/fuzz/specs.py $$call || status=1; \
	done; exit $$status

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

gpu: $(PEERS) ## measure a GPU in less than nine minutes and print one table; ARGS are names of its parts
	$(BIN)/python benchmarks/gpu.py $(ARGS)

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
	@echo "Setting up $(VENV): a minute or so when everything must be downloaded, and only this once."
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; name one: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt uv
	@touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt $(BIN)/uv
	$(BIN)/uv pip install --python $(BIN)/python $(PINS) -e ".[$(FRAMEWORKS),$*]"
	@touch $@

$(REPORT): benchmarks/npm.py benchmarks/page.py $(wildcard benchmarks/results/*/*.json) | $(DOCS)
	$(BIN)/python benchmarks/run.py publish

# mmcv-lite asks for opencv-python, whose modules opencv-python-headless has too, without a window system. fastreid and
# slowfast ask for packages that cannot be had beside this PyTorch; their blocks need none of them.
$(PEERS): pyproject.toml constraints.txt $(TEST)
	echo "opencv-python" > $(VENV)/excluded
	$(BIN)/uv pip install --python $(BIN)/python -c constraints.txt -b constraints.txt --excludes $(VENV)/excluded -e ".[peers]"
	$(BIN)/uv pip install --python $(BIN)/python -c constraints.txt --no-deps fastreid slowfast
	@touch $@

# Without this project itself: its editable install would be found before the changed copy.
$(MUTANTS): pyproject.toml constraints.txt $(BIN)/uv
	$(BIN)/uv venv --clear --python $(BIN)/python .venv-mutants
	$(BIN)/uv pip install --python .venv-mutants/bin/python -c constraints.txt -r pyproject.toml --extra test mutmut
	@touch $@
