# Every target makes what it needs: nothing but python3 and make has to be there.
#
#   make test PYTHON=/usr/bin/python3.11    another interpreter (or newest, or oldest)
#   make test VENV=.venv-other              another virtual environment
#   make test ARGS='tests/test_bits.py -x'  more arguments for the command

PYTHON ?=
VENV ?= .venv
ARGS ?=

bin := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint install clean FORCE

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.examples ## Run a small quantized language model, end to end
	$(bin)/python examples/llm/demo.py $(ARGS)

# Eight workers at most: each holds its own JAX.
test: $(VENV)/.dev ## Run all tests and the doctests
	$(bin)/python -m pytest --numprocesses=logical --maxprocesses=8 $(ARGS)

lint: $(VENV)/.dev ## Check style, format, types and the direction of imports
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/pyright --pythonpath $(bin)/python
	$(bin)/lint-imports --no-logo

install: $(VENV)/.dev ## Make .venv with everything for development

clean: ## Remove virtual environments, caches and builds
	rm -rf .venv .venv-* build dist htmlcov .coverage .coverage.*
	rm -rf .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The dates of these files tell whether pyproject.toml, or the environment itself,
# has changed since the installation.
pip_install := $(bin)/python -m pip --disable-pip-version-check install --quiet

$(VENV)/.examples: pyproject.toml $(VENV)/.made-by
	@echo 'Installing qjax[examples] into $(VENV): some minutes the first time'
	@$(pip_install) --editable '.[examples]'
	@touch $@

# dev has all of examples in it.
$(VENV)/.dev: pyproject.toml $(VENV)/.made-by
	@echo 'Installing qjax[dev] into $(VENV): some minutes the first time'
	@$(pip_install) --editable '.[dev]'
	@touch $@ $(VENV)/.examples

# Always asked, but written only when the environment is made anew.
$(VENV)/.made-by: FORCE
	@scripts/make-venv '$(VENV)' '$(PYTHON)'

FORCE:
