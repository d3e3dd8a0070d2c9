# `make bundle` and `make test` do all their own set-up; they need Python >= 3.11, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Extra options of pip, e.g. PIP_OPTIONS='--extra-index-url https://download.pytorch.org/whl/cpu' for a smaller torch.
PIP_OPTIONS ?=
# Extra options of pytest, e.g. PYTEST_OPTIONS=--last-failed.
PYTEST_OPTIONS ?=
# Where specforge_core/demo/inflated_manifest.yaml looks for the enlarged target.
INFLATED := $(HOME)/.cache/specbundle/demo-llama-3.1-8b

ifeq ($(shell command -v nvidia-smi),)
KIND := cpu
EXTRAS := dev
else
KIND := gpu
EXTRAS := dev,gpu
endif
INSTALLED := $(VENV)/.installed-$(KIND)
# Packages that one test needs in other versions (constraints/speculators.txt).
SPECULATORS := .speculators
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) -c constraints/$(KIND).txt

.PHONY: bundle bundle-8b has-gpu test test-slow lint format setup up clean
.DEFAULT_GOAL := help

help:  ## Say what there is to make.
	@sed -n 's/^\([a-z0-9-]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

bundle: setup  ## Build the drafts that this machine has the hardware for; ENTRIES='a b' builds those.
	$(BIN)/specbundle build $(if $(ENTRIES),--only $(ENTRIES))

bundle-8b: has-gpu setup  ## Build a draft for the demo target at the size of an 8B model, on one GPU with SGLang.
	@test -d $(INFLATED) || $(BIN)/python -m specforge_core.demo.inflate --shape llama-3.1-8b --out $(INFLATED)
	$(BIN)/specbundle --manifest specforge_core/demo/inflated_manifest.yaml --store .specbundle build

# Before anything is installed, and 16 GB are written.
has-gpu:
	@nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU ' || \
		{ echo "bundle-8b needs a GPU, and nvidia-smi lists none; \`make bundle\` builds what a CPU can" >&2; exit 1; }

test: setup  ## Run the tests, without those that take minutes, two files at a time.
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_OPTIONS)

test-slow: setup $(SPECULATORS)/.installed  ## Run the tests that take minutes: real servers, end to end.
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile --timeout 900 --durations=15 $(PYTEST_OPTIONS)
	PYTHONPATH=$(SPECULATORS) $(BIN)/python -m pytest -m slow tests/export/test_speculators_package.py

lint: setup  ## Check format, style and types.
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: setup  ## Format and fix what can be fixed.
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

up: setup  ## Start Prefect server, deployment, MLflow page and worker, until Ctrl-C.
	$(BIN)/specbundle up

setup: $(INSTALLED)  ## Create the virtual environment and install into it.

$(INSTALLED): pyproject.toml constraints/$(KIND).txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); SpecBundle needs Python >= 3.11: make PYTHON=/path/to/one" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing for $(KIND), tested versions (a few minutes the first time)"
	@# First alone: a satisfied torch is left alone, and on a CPU nothing else would ask for the right one.
	@$(PIP_INSTALL) torch
	@$(PIP_INSTALL) -e '.[$(EXTRAS)]'
	@touch $@

$(SPECULATORS)/.installed: constraints/speculators.txt | $(INSTALLED)
	@rm -rf $(SPECULATORS)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) --no-deps --target $(SPECULATORS) -r $<
	@touch $@

clean:  ## Remove the virtual environment; artifacts in .specbundle stay.
	rm -rf $(VENV) $(SPECULATORS)
