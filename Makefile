# Everything a checkout needs, from Python, a C++ compiler and make. `make help` lists the targets.
#
# The active environment (venv or conda) is used; without one, .venv is made here. Nothing is done
# twice: the package is installed again only if the native sources, the build or torch changed.

PYTHON ?= python3
# What to install where there is no torch, e.g. TORCH='torch==2.13.0' for the small CPU build.
TORCH ?= torch
# Options for the command behind a target: make train ARGS="--steps 20"
ARGS ?=

ENV := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),$(CURDIR)/.venv)
RUN := $(ENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install -q

# Stamps live in the environment that they describe. An editable install serves one checkout, so
# that of another counts as none.
INSTALLED := $(ENV)/.fused-installed
DEV_TOOLS := $(ENV)/.fused-dev-tools
ifneq ($(shell cat $(INSTALLED) 2>/dev/null),$(CURDIR))
$(INSTALLED): again
endif
NATIVE := $(shell find csrc -type f -not -path 'csrc/emulator/*') $(wildcard build_support/*.py)
TORCH_HERE := $(wildcard $(ENV)/lib/python3*/site-packages/torch/version.py)

.PHONY: help install train bench test test-emulated lint format types nvcc check check-full clean again
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## torch where there is none, and the package, into the environment

$(RUN):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fused needs Python 3.10 or later")'
	$(PYTHON) -m venv $(ENV)

$(INSTALLED): $(RUN) $(NATIVE) setup.py pyproject.toml fused/_version.py $(TORCH_HERE)
	$(RUN) -c 'import torch' 2>/dev/null || $(PIP) '$(TORCH)'
	@echo "building the kernels: a few minutes the first time, what changed from then on"
	$(PIP) -e '.[train,test]'
	@$(RUN) -m fused info
	@echo $(CURDIR) > $@

$(DEV_TOOLS): $(INSTALLED) pyproject.toml
	$(PIP) $$($(RUN) -m build_support.extras dev)
	@touch $@

train: $(INSTALLED) ## train three models on real data, with stock and with fused layers
	$(RUN) -m fused train $(ARGS)

bench: $(INSTALLED) ## every op against stock PyTorch
	$(RUN) -m fused bench $(ARGS)

test: $(INSTALLED) ## the whole test suite
	$(RUN) -m pytest $(ARGS)

test-emulated: $(INSTALLED) ## the CUDA kernels alone, on the CPU by the emulator
	$(RUN) -m pytest -k emulat $(ARGS)

lint: $(DEV_TOOLS) ## ruff and clang-format, changing nothing
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	git ls-files -z $(CPP) | xargs -0 $(ENV)/bin/clang-format --dry-run -Werror

format: $(DEV_TOOLS) ## ruff and clang-format, in place
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format
	git ls-files -z $(CPP) | xargs -0 $(ENV)/bin/clang-format -i

CPP := '*.h' '*.cpp' '*.inl' '*.cu' '*.cuh'

types: $(DEV_TOOLS) ## mypy
	$(RUN) -m mypy

nvcc: $(INSTALLED) ## compile every .cu file, where nvcc is found: make nvcc ARGS="8.0 9.0a"
	$(RUN) -m build_support.nvcc_check $(ARGS)

check: lint types nvcc test ## what has to pass before a change lands

check-full: $(DEV_TOOLS) ## what takes longer: sanitizers, coverage, four architectures, installs, aarch64
	PATH="$(ENV)/bin:$$PATH" .ci/full $(ARGS)

clean: ## remove what was built (the environment stays)
	rm -rf build dist *.egg-info fused/*.so fused/_build_info.py $(ENV)/.fused-*
