# Two ways in: `make quickstart` tells the story, `make test` proves it. Each sets up what it needs, once.
#
# Only Python 3.11 is assumed. On Linux, pip's torch may bring GBs of CUDA libraries; a machine without a GPU needs none of
# them: point pip at PyTorch's CPU wheels first (PIP_EXTRA_INDEX_URL).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-slow test-browser test-gpu check docs clean

# What trains and caches: on a GPU it has to hold as well.
ON_GPU := distill models/test_device.py data/test_views.py serve/test_evaluation.py jobs/test_chain.py jobs/test_dry_run.py \
	jobs/test_fleet_on_ray.py

PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV ?= .venv
BIN := $(VENV)/bin

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

quickstart: $(VENV)/.installed  ## train a teacher and a fleet of students on real digits
	$(BIN)/akd-dist quickstart

# Two processes, each with a Ray of its own if it comes to that; the tests of a file share what they are about.
test: $(VENV)/.installed-dev  ## every fast test
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --durations=20

test-slow: $(VENV)/.installed-dev  ## the tests that kill, wait and repeat
	$(BIN)/python -m pytest -m slow

test-browser: $(VENV)/.installed-dev  ## the report in a real chromium, where there is one
	$(BIN)/python -m pytest -m browser

test-gpu: $(VENV)/.installed-dev  ## the tests of training and caching on the GPU of this machine
	AKD_DIST_TEST_DEVICE=cuda $(BIN)/python -m pytest -m "not slow" $(ON_GPU:%=tests/%)

docs: $(VENV)/.installed-dev  ## the documentation as a site, in site/; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

check: $(VENV)/.installed-dev docs  ## lint, format, types, who imports whom, documentation
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports --no-cache

clean:  ## remove the environment and caches, never stores or runs
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamps below are written when an installation is complete, so a second call has nothing to do.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed
