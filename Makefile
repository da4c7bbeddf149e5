# AI-Flux. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
ENGINE ?= ollama
GPU ?= nvidia
BASE ?= auto
BASE_IMAGE ?=
OLLAMA_TARBALL ?=
OLLAMA_IMAGE ?=
IMAGE ?= aiflux$(if $(filter-out ollama,$(ENGINE)),-$(ENGINE))$(if $(filter amd,$(GPU)),-amd).sif
SIGN ?=
KEY ?=
OLLAMA ?=
MODEL ?=
EXAMPLE ?=
DOCS ?= build/docs
export OLLAMA MODEL EXAMPLE

bin := $(VENV)/bin
sources := $(shell find aiflux_app -name '*.py' -o -name '*.sh' 2>/dev/null)
shell_files := $(shell git ls-files -- '*.sh' tests/stack entrypoint .ci examples slurm 2>/dev/null | \
	grep -v '\.erb$$' | xargs -r grep -lE '^\#!.*\b(ba)?sh\b' 2>/dev/null)

# The tests misspell words on purpose.
spelled := $(shell git ls-files -- '*.md' aiflux_app container entrypoint examples slurm bench docs 2>/dev/null | \
	grep -vE '\.(svg|png|lock|css)$$')

# Files whose wording follows .ci/words and .ci/phrases.
plain := $(shell git ls-files -- aiflux_app docs tests container entrypoint bench slurm '*.md' \
	'examples/*.sh' 'examples/*.py' Makefile 2>/dev/null | \
	grep -vE '\.(lock|svg|png|gz|bin)$$|made_elsewhere|docs/assets')

.PHONY: help install image demo test test-fast test-slow lint bench cluster cluster-down docs release clean

help: ## list the targets
	@grep -hE '^[a-z][a-z-]*:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(bin)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is older than 3.10 -> make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) cannot create virtual\
 environments -> install python3-venv, or: make PYTHON=/path/to/another/python ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(bin)/.installed-dev: pyproject.toml $(bin)/.installed
	$(bin)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,lint,docs]'
	touch $@

install: $(bin)/.installed ## create a virtual environment in .venv with aiflux
	@echo "installed: $(bin)/aiflux"

image: $(bin)/.installed ## build aiflux.sif (ENGINE=ollama|llamacpp|vllm, GPU=nvidia|amd, BASE=auto|docker|debian, BASE_IMAGE=, OLLAMA_TARBALL=, SIGN=1, KEY=)
	$(bin)/aiflux image build --engine '$(ENGINE)' --gpu '$(GPU)' --base '$(BASE)' --output '$(IMAGE)' --force \
		$(if $(OLLAMA_TARBALL),--ollama-tarball '$(OLLAMA_TARBALL)') \
		$(if $(BASE_IMAGE)$(OLLAMA_IMAGE),--base-image '$(or $(BASE_IMAGE),$(OLLAMA_IMAGE))') \
		$(if $(SIGN)$(KEY),--sign) $(if $(KEY),--key '$(KEY)')

# Extras that some examples need.
extras_of_caption := images
extras_of_extract := schema
demo_extras = $(extras_of_$(EXAMPLE))

demo: $(bin)/.installed ## process examples/prompts.jsonl here, without root, Slurm or GPU (ENGINE=, MODEL=, EXAMPLE=)
	$(if $(demo_extras),$(bin)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(demo_extras)]')
	ENGINE='$(ENGINE)' PATH="$(abspath $(bin)):$$PATH" examples/demo.sh

cluster: ## as root: start the test cluster (Slurm, Apptainer, Ollama, a registry)
	tests/stack/up

cluster-down: ## as root: stop the test cluster
	tests/stack/down

lint: $(bin)/.installed-dev ## ruff, mypy --strict, shellcheck, codespell, wording
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/shellcheck -x $(shell_files)
	@echo '$(bin)/codespell'; $(bin)/codespell $(spelled)
	@echo '$(bin)/codespell -D .ci/words'; $(bin)/codespell -D .ci/words $(plain)
	@! grep -nEif .ci/phrases $(plain) || { echo "error: write the phrases above in plain words" >&2; exit 1; }

test-fast: $(bin)/.installed-dev ## unit and property tests, about 5 minutes on two cores
	$(bin)/pytest -q -n 2 tests/unit

test: lint ## everything except the soak tests, on the real Slurm, Apptainer and Ollama
	tests/stack/up || echo "the test stack is incomplete; its tests report what is missing"
	$(bin)/pytest -q -n 2 tests/unit
	$(bin)/pytest -n 2 -m 'not slow' tests/integration

test-slow: $(bin)/.installed-dev ## soak tests
	tests/stack/up || echo "the test stack is incomplete; its tests report what is missing"
	$(bin)/pytest -m slow tests

bench: $(bin)/.installed-dev ## measure the worker with simulated and real engines (BENCH="--quick reading")
	$(bin)/python -m bench $(BENCH)

slurm/run.sbatch: $(sources) $(bin)/.installed ## render the generic batch script
	$(bin)/python -m aiflux.slurm.script > $@.new
	mv $@.new $@

docs: $(bin)/.installed-dev ## build the website and the man pages in build/docs (DOCS=)
	$(bin)/python docs/site.py '$(DOCS)'

release: $(bin)/.installed-dev ## check that this commit can be released, build it in dist and create its tag
	$(bin)/python .ci/release.py --check
	$(bin)/python -m pip install --quiet --disable-pip-version-check 'hatchling>=1.25'
	$(bin)/python .ci/release.py

clean: ## remove build results
	rm -rf $(VENV) aiflux.sif build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
