# nordsparse: one YAML file to a trained sparse text encoder. `make` alone prints this help.
# Kept to what GNU make 3.81 (macOS) understands. Logic lives in Python, where it is tested.

CONFIG  ?= quickstart
PYTHON  ?= python3.11
VENV    ?= .venv
BIN     := $(VENV)/bin
REQ     := docker/requirements

# Which build of torch: cpu (Linux without an NVIDIA driver) or cuda (the default index: CUDA on Linux, MPS on macOS).
TORCH   ?= $(shell if [ "$$(uname -s)" = Darwin ] || command -v nvidia-smi >/dev/null 2>&1; then echo cuda; else echo cpu; fi)
# Where the CPU build comes from, unless pip is already configured with a folder that holds it.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

PIP     := $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary=:all:
SETS    := $(foreach pair,$(SET),--set '$(pair)')
# An MPS kernel that does not exist yet runs on the CPU instead of raising.
export PYTORCH_ENABLE_MPS_FALLBACK ?= 1

.PHONY: help train resume eval check show bm25 publish export tensorboard test lint smoke bench lock schema clean
.DEFAULT_GOAL := help

help: ## this help
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14
	@echo
	@echo "CONFIG is one of: $(sort $(patsubst configs/training_config_%.yaml,%,$(wildcard configs/training_config_*.yaml))), or a path."
	@echo 'Any key can be overridden: make train CONFIG=splade SET="training.max_steps=50 hardware.device=cpu"'

train: $(VENV)/.ok ## train CONFIG (quickstart) into models/<CONFIG>
	@$(BIN)/python -m trainer train $(CONFIG) $(SETS)

resume: $(VENV)/.ok ## continue CONFIG from its newest complete checkpoint
	@$(BIN)/python -m trainer train $(CONFIG) --resume $(SETS)

check: $(VENV)/.ok ## print the plan of CONFIG without training
	@$(BIN)/python -m trainer check $(CONFIG) $(SETS)

show: $(VENV)/.ok ## print CONFIG flat, each value with its origin
	@$(BIN)/python -m trainer show $(CONFIG) $(SETS)

eval: $(VENV)/.ok ## measure the run of CONFIG, or MODEL=path: TASKS=… BASELINE=results DENSE=model
	@$(BIN)/python -m evaluate run $(if $(MODEL),--model '$(MODEL)',$(CONFIG)) $(if $(TASKS),--tasks '$(TASKS)') \
	  $(if $(LANGUAGE),--language $(LANGUAGE)) $(foreach file,$(BASELINE),--baseline '$(file)') $(if $(DENSE),--dense '$(DENSE)') $(ARGS)

bm25: $(VENV)/.ok ## nDCG@10 of BM25: TASKS=folder:no (BEIR layout) or mteb tasks
	@$(BIN)/python -m evaluate bm25 --tasks '$(TASKS)' $(if $(LANGUAGE),--language $(LANGUAGE)) $(ARGS)

publish: $(VENV)/.ok ## upload the trained model of CONFIG: REPO=owner/name, PUBLIC=1, DRY_RUN=1
	@$(BIN)/python -m trainer publish $(CONFIG) --repo '$(REPO)' \
	  $(if $(filter-out 0,$(PUBLIC)),--public) $(if $(filter-out 0,$(DRY_RUN)),--dry-run)

export: $(VENV)/.ok ## files for a search engine: TO=lucene CORPUS=file.jsonl QUERIES=… OUTPUT=folder SHARD=1/4
	@$(BIN)/python -m trainer export $(CONFIG) --to '$(TO)' $(if $(CORPUS),--corpus '$(CORPUS)') \
	  $(if $(QUERIES),--queries '$(QUERIES)') $(if $(OUTPUT),--output '$(OUTPUT)') $(if $(SHARD),--shard $(SHARD)) $(ARGS)

tensorboard: $(VENV)/.ok ## watch runs at http://127.0.0.1:6006
	@$(BIN)/tensorboard --logdir models --host 127.0.0.1 --port 6006

test: $(VENV)/.dev ## the fast tests, offline
	@$(BIN)/python -m pytest -q -n 2 $(ARGS)

lint: $(VENV)/.dev ## ruff: errors, style, format
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

smoke: $(VENV)/.ok ## train two steps of the quickstart
	@rm -rf models/smoke
	@$(BIN)/python -m trainer train quickstart --name smoke --set training.max_steps=2 $(SETS)

bench: $(VENV)/.dev ## measured ratios: tests/benchmarks
	@$(BIN)/python -m tests.benchmarks.batches
	@$(BIN)/python -m tests.benchmarks.search

lock: ## remake the hash-locked requirement files (needs uv)
	@$(REQ)/lock.sh

schema: $(VENV)/.ok ## remake configs/schema.json
	@$(BIN)/python -m trainer schema > configs/schema.json

clean: ## remove the virtual environment (models stay)
	rm -rf $(VENV)

# ------------------------------------------------------------------------------------------- set-up
$(VENV)/.ok: $(REQ)/base.txt $(REQ)/torch-$(TORCH).txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || \
	  { echo "Error: Python 3.11 is needed; $(PYTHON) is not one. Say which: make PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || $(MAKE) --no-print-directory .debian-venv
	@echo "setting up $(VENV) with the $(TORCH) build of torch (once, a few minutes)"
	@$(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),cpu)
	@$(PIP) --no-index -r $(REQ)/torch-cpu.txt 2>/dev/null || $(PIP) --index-url $(TORCH_CPU_INDEX) -r $(REQ)/torch-cpu.txt
else
	@$(PIP) -r $(REQ)/torch-$(TORCH).txt
endif
	@$(PIP) -r $(REQ)/base.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.ok $(REQ)/dev.txt
	@$(PIP) -r $(REQ)/dev.txt
	@touch $@

# Debian keeps ensurepip in a package of its own.
.PHONY: .debian-venv
.debian-venv:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing Debian's python3.11-venv"; apt-get update -qq && apt-get install -qq -y python3.11-venv >/dev/null; \
	else \
	  echo "Error: $(PYTHON) has no ensurepip. Install it (Debian: apt install python3.11-venv), then run make again"; exit 2; \
	fi
