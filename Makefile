# Everything is installed into .venv below this folder; nothing else on the machine is touched. `make` lists the targets.

PYTHON ?= python3
CORPUS ?=
PYTEST_OPTIONS ?=

VENV := .venv
SYSTEM_PATH := $(PATH)
# First, so that `deepspeed` and everything it starts come from the environment.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Two processes of tests; what shares a fixture stays in one (tests/conftest.py).
PYTEST := $(VENV)/bin/python -m pytest -n 2
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup setup-test quickstart test test-full test-all gpu lint clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/.installed ## install what training needs into .venv

setup-test: $(VENV)/.installed-test ## install what the tests need, too

quickstart: $(VENV)/.installed ## the whole pipeline on real English text, in minutes; CORPUS="a.txt b.jsonl" takes your own
	@$(VENV)/bin/python tools/quickstart.py $(if $(CORPUS),--corpus $(CORPUS))

test: $(VENV)/.installed-test ## every test but the full matrices; PYTEST_OPTIONS="-k config" chooses
	$(PYTEST) -m "not full and not gpu" $(PYTEST_OPTIONS)

test-full: $(VENV)/.installed-test ## the full matrices alone, which `make test` leaves out
	$(PYTEST) -m "full and not gpu" $(PYTEST_OPTIONS)

test-all: $(VENV)/.installed-test ## every test that needs no GPU: both of them in one run
	$(PYTEST) -m "not gpu" $(PYTEST_OPTIONS)

gpu: $(VENV)/.installed-test ## all that NVIDIA GPUs are asked, in ten minutes: tests, benchmarks, a report in runs/gpu
	$(VENV)/bin/python benchmarks/gpu.py

lint: $(VENV)/.installed-test ## style and format of the source
	$(VENV)/bin/python -m ruff check
	$(VENV)/bin/python -m ruff format --check

clean: ## remove .venv, caches and the quickstart's results; runs/ stays
	rm -rf $(VENV) build quickstart *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps below are older than the files they depend on when something has to be installed again.

$(VENV)/.created:
	@PATH="$(SYSTEM_PATH)"; \
	command -v "$(PYTHON)" >/dev/null || { \
	  echo "error: there is no $(PYTHON); install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; \
	  exit 1; }; \
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) --version); Python 3.11 or newer is needed: make PYTHON=python3.11" >&2; \
	  exit 1; }; \
	echo "Creating $(VENV) with $$($(PYTHON) --version) ..."; \
	"$(PYTHON)" -m venv $(VENV) || { \
	  echo "error: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; \
	  exit 1; }
	@touch $@

$(VENV)/.installed: requirements.txt pyproject.toml | $(VENV)/.created
	@echo "Installing requirements.txt (torch is large: some minutes the first time) ..."
	@$(PIP) install -qq -r requirements.txt
	@echo "Installing the package itself ..."
	@$(PIP) install -qq --no-deps -e .
	@touch $@

$(VENV)/.installed-test: requirements-test.txt $(VENV)/.installed
	@echo "Installing requirements-test.txt ..."
	@$(PIP) install -qq -r requirements-test.txt
	@touch $@
