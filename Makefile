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
.PHONY: help demo test test-peers test-models test-gpu bench-gpu gpu-check lint install
.PHONY: clean FORCE

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.examples ## Run a small quantized language model, end to end
	$(bin)/python examples/llm/demo.py $(ARGS)

# Eight workers at most: each holds its own JAX.
test: $(VENV)/.dev ## Run all tests and the doctests
	$(bin)/python -m pytest --numprocesses=logical --maxprocesses=8 $(ARGS)

# In an environment of its own, on the oldest Python, for which PyTorch's packages are
# all built.
test-peers: ## Let PyTorch's own packages read what qjax wrote
	@$(MAKE) --no-print-directory .venv-peers/.peers VENV=.venv-peers \
		PYTHON='$(or $(PYTHON),oldest)'
	.venv-peers/bin/python -m pytest tests/peers $(ARGS)

# In an environment of its own, on the newest Python, for which google-tunix is written.
test-models: ## Quantize models that google-tunix wrote, and arrays of qwix
	@$(MAKE) --no-print-directory .venv-models/.models VENV=.venv-models \
		PYTHON='$(or $(PYTHON),newest)'
	.venv-models/bin/python -m pytest tests/models $(ARGS)

# In an environment of its own, on the newest Python, with the libraries of CUDA.
test-gpu: ## Run the tests of the kernels compiled, on an NVIDIA GPU
	@$(need_gpu)
	@$(in_cuda) .venv-cuda/.cuda
	.venv-cuda/bin/python -m pytest tests/pallas/test_kernels.py --on-gpu $(ARGS)

# PyTorch's peers have an environment of theirs.
bench-gpu: ## Time products and decoding on an NVIDIA GPU, beside peers
	@$(need_gpu)
	@$(in_cuda) .venv-cuda/.bench
	.venv-cuda/bin/python benchmarks/gpu_matmul.py \
		--peer-python .venv-cuda-torch/bin/python $(ARGS)
	.venv-cuda/bin/python benchmarks/gpu_decode.py

# In an environment of its own, on the newest Python: the counts are those of the newest
# JAX. Without a GPU, JAX would complain of the plugin if it were not told to stay on the
# CPU.
gpu-check: ## Compile, count and emulate the GPU kernels, without a GPU
	@$(MAKE) --no-print-directory .venv-gpu/.gpu VENV=.venv-gpu \
		PYTHON='$(or $(PYTHON),newest)'
	JAX_PLATFORMS=cpu .venv-gpu/bin/python -m pytest tests/gpu $(ARGS)

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

$(VENV)/.peers: $(VENV)/.dev
	@echo 'Installing qjax[peers] into $(VENV): PyTorch, and all that reads its tensors'
	@$(pip_install) --editable '.[dev,peers]'
	@touch $@

$(VENV)/.models: $(VENV)/.dev
	@echo 'Installing qjax[models] into $(VENV): google-tunix and qwix'
	@$(pip_install) --editable '.[dev,models]'
	@$(pip_install) --no-deps google-tunix==0.1.7
	@touch $@

need_gpu = nvidia-smi --list-gpus >/dev/null 2>&1 || \
	{ echo 'make $@: this needs an NVIDIA GPU, and nvidia-smi finds none.' >&2; exit 1; }
in_cuda = $(MAKE) --no-print-directory VENV=.venv-cuda PYTHON='$(or $(PYTHON),newest)'

$(VENV)/.cuda: $(VENV)/.dev
	@echo 'Installing qjax[cuda] into $(VENV): the libraries of CUDA, some gigabytes'
	@$(pip_install) --editable '.[dev,cuda]'
	@touch $@

# One by one: a peer that does not install here is listed with its error, and the others
# are measured.
$(VENV)/.bench: $(VENV)/.cuda benchmarks/peers-jax.txt benchmarks/peers-torch.txt
	@echo 'Installing the peers of benchmarks/peers-*.txt: PyTorch, some gigabytes'
	@scripts/make-venv .venv-cuda-torch '$(PYTHON)'
	@for peer in $$(cat benchmarks/peers-jax.txt); do $(pip_install) "$$peer" || true; done
	@for peer in $$(cat benchmarks/peers-torch.txt); do .venv-cuda-torch/bin/python -m pip \
		--disable-pip-version-check install --quiet "$$peer" || true; done
	@touch $@

$(VENV)/.gpu: $(VENV)/.dev
	@echo 'Installing qjax[gpu-check] into $(VENV): the CUDA plugin of JAX, 400 MB'
	@$(pip_install) --editable '.[dev,gpu-check]'
	@touch $@

# Always asked, but written only when the environment is made anew.
$(VENV)/.made-by: FORCE
	@scripts/make-venv '$(VENV)' '$(PYTHON)'

FORCE:
