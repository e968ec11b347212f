# `make help` lists the targets. Override from the command line: make test VENV=/path/to/venv WORKERS=4
PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
# Neighbours stay together: what a file's tests share is made once. Who is idle takes over half.
SPREAD  := -n $(WORKERS) --dist worksteal
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
WHEEL   := out/wheel
LINES   := $(CURDIR)/out/lines
# What needs the package's metadata, its data files, or most of its modules.
WHEEL_TESTS := tests/behaviour/test_wheel.py tests/behaviour/test_public_names.py tests/tuner/test_adapter.py \
	tests/tasks/test_bank.py tests/dense/metrics/test_evaluate_modules.py

# Idle OpenMP threads that spin slow a shared machine down many times over.
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help .venv demo test pretended coverage e2e wheel-test lint types imports docs house benchmarks conformance conformance-quick versions test-torchvision format check clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z0-9.-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv: $(STAMP)  ## create the virtual environment and install everything into it

$(STAMP): pyproject.toml constraints.txt
	@echo "== install into $(VENV) (once, and again when pyproject.toml or constraints.txt change)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## train frozen, SFA and full on rendered scenes; table and pictures in out/demo
	@mkdir -p out/demo
	@$(BIN)/python examples/compare_methods.py --task semantic_segmentation \
		--runs frozen sfa@0.05 sfa@0.2 full --output_dir out/demo --overwrite_output_dir

test: $(STAMP)  ## run the tests
	@echo "== pytest"
	@$(BIN)/python -m pytest -q $(SPREAD)

pretended: $(STAMP)  ## run the tests on a pretended GPU, in a process of its own; needs a C++ compiler
	@echo "== pytest, on a pretended GPU"
	@$(BIN)/python -m pytest -q tests/pretended

coverage: $(STAMP)  ## run the tests and note which lines they run; `make house` has the floors
	@echo "== pytest, with coverage"
	@rm -rf $(LINES)
	@LINES_FOLDER=$(LINES) $(BIN)/python -m pytest -q $(SPREAD)
	@$(BIN)/python -m coverage combine -q $(LINES)

wheel-test: $(STAMP)  ## build the wheel and run a few tests on it, installed, without src
	@echo "== pytest, on the wheel"
	@rm -rf $(WHEEL)
	@$(BIN)/python -m hatchling build -t wheel -d $(WHEEL) 2>/dev/null
	@$(BIN)/python -m venv --without-pip $(WHEEL)/venv
	@$(BIN)/python -m pip --python $(WHEEL)/venv install -qq --no-deps $(WHEEL)/*.whl
	@$(BIN)/python -c "import sys; print(*(p for p in sys.path if p.endswith('site-packages')), sep='\n')" \
		> "$$(echo $(WHEEL)/venv/lib/python3.*/site-packages)/tools.pth"
	@env -u PYTHONPATH $(WHEEL)/venv/bin/python -m pytest -q $(SPREAD) -p no:cacheprovider $(WHEEL_TESTS)

e2e: $(STAMP)  ## test the page of examples/serve_tasks.py in a headless Chromium, installed if there is none
	@echo "== browser"
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev,e2e]'
	@$(BIN)/python -m tests.e2e.browser
	@echo "== pytest, in the browser"
	@$(BIN)/python -m pytest -q tests/e2e

lint: $(STAMP)  ## ruff: rules and layout
	@echo "== ruff"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .

types: $(STAMP)  ## pyright on src
	@echo "== pyright"
	@$(BIN)/pyright --pythonpath $(BIN)/python

imports: $(STAMP)  ## import-linter: the floors of the house
	@echo "== import-linter"
	@$(BIN)/lint-imports --no-cache --no-logo

house: $(STAMP)  ## every number that the code must keep, with its bar; coverage from the last `make coverage`
	@echo "== house"
	@$(BIN)/python -m tests.house

docs: $(STAMP)  ## build the site into docs/_build/html; a warning is an error
	@echo "== sphinx"
	@$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

conformance: $(STAMP)  ## PEFT's own tests on SFA, and on SHiRA beside it; see docs/conformance.md
	@echo "== conformance"
	@$(BIN)/python -m tests.conformance.run

conformance-quick: $(STAMP)  ## the two quick suites of it, on SFA
	@echo "== conformance, custom and config"
	@$(BIN)/python -m tests.conformance.run --suites custom,config --methods sfa

versions: $(STAMP)  ## the tests on the oldest and newest PEFT and transformers, in .venvs
	@$(BIN)/python -m tests.versions

test-torchvision: $(STAMP)  ## the tests with torchvision and the torch that it was built for (5.5 GB), in .venvs
	@$(BIN)/python -m tests.versions --only torchvision

benchmarks: $(STAMP)  ## measure every figure of docs/benchmarks.md anew; about 20 minutes on two idle cores
	@mkdir -p out
	@for name in cost host_time switching scores trained_size; do \
		echo "== $$name"; $(BIN)/python benchmarks/$$name.py --output out/$$name.json || exit 1; done
	@echo "== file_size"
	@$(BIN)/python benchmarks/file_size.py

format: $(STAMP)  ## let ruff repair what it can
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

check: lint types imports docs coverage pretended house wheel-test conformance-quick  ## all of the above: what CI runs

clean:  ## remove build results and caches; the virtual environment stays
	@rm -rf out/demo out/lines out/pretended out/wheel dist .coverage docs/_build .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find src tests examples docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
