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
# No wheel for Linux on arm64: there, and only there, it is compiled. Its source is locked too.
COMPILED := $(shell if [ "$$(uname -s)-$$(uname -m)" = Linux-aarch64 ]; then echo pytrec-eval-terrier; fi)
# Values reach the shell as its own variables: blanks, brackets, quotes and apostrophes arrive as they were typed.
SETS     = $(if $(SET),--set "$$SET")
# An MPS kernel that does not exist yet runs on the CPU instead of raising.
export PYTORCH_ENABLE_MPS_FALLBACK ?= 1

# In a container or in $(VENV), as RUNTIME=auto|docker|host says; docker/run prints which, and why.
# In place of the shell, since make hands on a signal to its own child alone.
RUN     := exec docker/run
export CONFIG SET RUNTIME VENV NODES PROCS RENDEZVOUS PORT IMAGE
export MODEL ONLY TASKS BASELINE DENSE REPO TO CORPUS QUERIES OUTPUT LLM

.PHONY: help train resume eval check show pin bm25 prove publish export queries tensorboard images test test-docker lint audit smoke bench soak lock schema clean
.DEFAULT_GOAL := help

help: ## this help
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-14s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "CONFIG is one of: $(sort $(patsubst configs/training_config_%.yaml,%,$(wildcard configs/training_config_*.yaml))), or a path."
	@echo 'Any key can be overridden: make train CONFIG=splade SET="training.max_steps=50 hardware.device=cpu"'
	@echo "A value with blanks is written as in YAML: SET='model_card.model_name=\"Our model\" datasets.nli.mine.range=[10, 100]'"
	@echo 'RUNTIME=docker|host: in a container, or in $(VENV). Without it: in a container where a Docker engine answers, except on a Mac.'
	@echo 'PROCS=8: one training process per GPU. NODES=2 RENDEZVOUS=host:port: the same on each of two machines.'

train: ## train CONFIG (quickstart) into models/<CONFIG>
	@$(RUN) trainer train "$$CONFIG" $(SETS)

resume: ## continue CONFIG from its newest complete checkpoint
	@$(RUN) trainer train "$$CONFIG" --resume $(SETS)

check: ## print the plan of CONFIG without training
	@$(RUN) trainer check "$$CONFIG" $(SETS)

show: ## print CONFIG flat, each value with its origin
	@$(RUN) trainer show "$$CONFIG" $(SETS)

pin: ## look up the commits of CONFIG, show its model's code, ask for trust: TRUST=1 ARGS="--code --diff"
	@$(RUN) trainer pin "$$CONFIG" $(SETS) $(if $(filter-out 0,$(TRUST)),--trust) $(ARGS)

eval: ## measure the run of CONFIG, or MODEL=path: TASKS=… BASELINE=results DENSE=model
	@$(RUN) evaluate run $(if $(MODEL),--model "$$MODEL","$$CONFIG") $(if $(TASKS),--tasks "$$TASKS") \
	  $(if $(LANGUAGE),--language $(LANGUAGE)) $(if $(BASELINE),--baseline "$$BASELINE") $(if $(DENSE),--dense "$$DENSE") $(ARGS)

bm25: ## nDCG@10 of BM25: TASKS=folder:no (BEIR layout) or mteb tasks
	@$(RUN) evaluate bm25 --tasks "$$TASKS" $(if $(LANGUAGE),--language $(LANGUAGE)) $(ARGS)

prove: ## train and measure the eight configs beside baselines, into docs/results.md: ONLY=splade_h100 DRY_RUN=1
	@$(RUN) evaluate prove $(if $(ONLY),--only "$$ONLY") $(if $(TASKS),--tasks "$$TASKS") $(SETS) \
	  $(if $(filter-out 0,$(DRY_RUN)),--dry-run)

publish: ## upload the trained model of CONFIG: REPO=owner/name, PUBLIC=1, DRY_RUN=1
	@$(RUN) trainer publish "$$CONFIG" --repo "$$REPO" \
	  $(if $(filter-out 0,$(PUBLIC)),--public) $(if $(filter-out 0,$(DRY_RUN)),--dry-run)

export: ## files for a search engine: TO=lucene CORPUS=file.jsonl QUERIES=… OUTPUT=folder SHARD=1/4
	@$(RUN) trainer export "$$CONFIG" --to "$$TO" $(if $(CORPUS),--corpus "$$CORPUS") \
	  $(if $(QUERIES),--queries "$$QUERIES") $(if $(OUTPUT),--output "$$OUTPUT") $(if $(SHARD),--shard $(SHARD)) $(ARGS)

queries: ## have an LLM write queries for a corpus that has none: CORPUS=pages.jsonl LLM=http://localhost:11434/v1 MODEL=gemma3
	@$(RUN) trainer queries "$$CORPUS" --llm "$$LLM" --model "$$MODEL" $(if $(OUTPUT),--output "$$OUTPUT") $(ARGS)

tensorboard: ## watch runs at http://127.0.0.1:6006, or PORT=…
	@$(RUN) tensorboard

images: ## build the container images nordsparse:cpu and nordsparse:cuda
	@$(RUN) images

test: $(VENV)/.dev ## the fast tests, offline; some of them: ARGS=tests/test_config.py
	@$(BIN)/python -m pytest -q -n $(if $(findstring tests/,$(ARGS)),0,2) --dist worksteal $(ARGS)

lint: $(VENV)/.dev ## ruff: errors, style, format; mypy: types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

audit: $(VENV)/.dev ## ask a vulnerability service about every locked package
	@$(BIN)/python $(REQ)/audit.py $(ARGS)

smoke: $(VENV)/.ok ## train two steps of the quickstart
	@rm -rf models/smoke
	@$(BIN)/python -m trainer train quickstart --name smoke --set training.max_steps=2 $(SETS)

bench: $(VENV)/.dev ## measured ratios: tests/benchmarks
	@$(BIN)/python -m tests.benchmarks.speed $(ROWS)
	@$(BIN)/python -m tests.benchmarks.batches
	@$(BIN)/python -m tests.benchmarks.search

soak: $(VENV)/.dev ## kill trainings anywhere, resume them, compare: KILLS=25 (of each kind of run)
	@$(BIN)/python -m tests.soak --kills $(or $(KILLS),25) $(ARGS)

lock: ## remake the hash-locked requirement files (needs uv)
	@$(REQ)/lock.sh

schema: $(VENV)/.ok ## remake configs/schema.json
	@$(BIN)/python -m trainer schema > configs/schema.json

test-docker: $(VENV)/.dev ## what the containers promise, tried in real ones (needs a Docker engine)
	@$(BIN)/python -m pytest -q -m docker tests/test_containers.py $(ARGS)

clean: ## remove the virtual environment (models stay)
	rm -rf $(VENV)

# ------------------------------------------------------------------------------------------- set-up
$(VENV)/.ok: $(REQ)/base.txt $(REQ)/torch-$(TORCH).txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || \
	  { echo "Error: Python 3.11 is needed; $(PYTHON) is not one. Say which: make PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || $(MAKE) --no-print-directory .debian-venv
	@$(if $(COMPILED),$(MAKE) --no-print-directory .compiler)
	@echo "setting up $(VENV) with the $(TORCH) build of torch (once, perhaps some minutes)"
	@$(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),cpu)
	@$(PIP) --no-index -r $(REQ)/torch-cpu.txt 2>/dev/null || $(PIP) --index-url $(TORCH_CPU_INDEX) -r $(REQ)/torch-cpu.txt
else
	@$(PIP) -r $(REQ)/torch-$(TORCH).txt
endif
	@$(PIP) $(if $(COMPILED),--no-binary=$(COMPILED)) -r $(REQ)/base.txt
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

# With Debian's own Python, its headers are a package too.
.PHONY: .compiler
.compiler:
	@command -v gcc >/dev/null && command -v g++ >/dev/null && $(PYTHON) -c 'import os, sys, sysconfig; \
	  sys.exit(not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")))' || \
	  { echo "Error: Linux on arm64 compiles $(COMPILED), and gcc, g++ or Python.h is missing. Install them" \
	    "(Debian: apt install gcc g++ python3.11-dev), then run make again"; exit 2; }
