# Short names for what a person does every day; "make" alone prints this list.
PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
.DEFAULT_GOAL := help
.PHONY: help install lint format types test check demo bench

help: ## print this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

install: ## make .venv with everything, tests included
	$(PYTHON) run.py setup

lint: install ## ruff: the rules of pyproject.toml
	$(VENV_PYTHON) -m ruff check .

format: install ## ruff: layout
	$(VENV_PYTHON) -m ruff format .

types: install ## mypy: strict for shared/, ordinary for models/
	$(VENV_PYTHON) -m mypy

test: ## all tests; one file: make test ARGS=tests/test_run.py
	$(PYTHON) run.py test $(ARGS)

check: lint test ## what CI runs

bench: install ## counters that must not change; measure more: make bench CASES="C*"
	$(VENV_PYTHON) wgp.py bench --cases "$(or $(CASES),C7)" $(ARGS)

demo: ## a picture from the embedded demo model, into outputs/
	$(PYTHON) run.py generate "a small red circle on a blue ground" --preset z_image_demo
