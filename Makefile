# Every target makes its own `.venv` first; all paths are relative, so that the checkout may lie anywhere (spaces too).
# Programs are started as `python -m`: the first line of a console script cannot hold a long path or a space.
.DEFAULT_GOAL := help
.PHONY: help install demo up down test slow lint bench-train bench-paper bench-stream bench-scale bench-cache bench-cache-scale peers chaos soak clean
PY := .venv/bin/python

help: ## this list
	@echo "Calotype: train latent diffusion models, from a laptop to a cluster."
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' Makefile

install: ## .venv with everything pinned; nothing to do if it is there and fits
	@for python in python3 python3.13 python3.12 python3.11; do \
	  if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
	    exec $$python infra/install.py; \
	  fi; \
	done; \
	echo "Calotype needs Python 3.11, 3.12 or 3.13 on the PATH: install one, then run make again." >&2; exit 1

demo: install ## from nothing to pictures
	@$(PY) -m calotype demo

up: install ## start the embedded stack: S3, MLflow, Ray
	@$(PY) -m calotype up

down: install ## stop it; what it stored stays
	@$(PY) -m calotype down

# Two processes, each with a stack of its own; a file's tests share fixtures, so they stay together, in this order.
test: lint ## lint and every test but those marked slow or chaos
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15 -m "not slow and not chaos and not soak"

slow: install ## what takes minutes: engines compared over 200 steps, the demo, whole
	@CALOTYPE_TEST_STEPS=200 $(PY) -m pytest tests/tasks/test_denoiser.py
	@$(PY) -m pytest -m slow

chaos: install ## the tests that kill and cut
	@$(PY) -m pytest -m chaos

soak: install ## a training of a quarter of an hour with a kill every minute: goodput against what restarts allow
	@$(PY) -m pytest -s -m soak

lint: install ## ruff and mypy --strict
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

bench-train: install ## steps, starts beside PyTorch, DeepSpeed, Ray Train; MLflow down; caching; saves in the background; kill -9 to the next step
	@$(PY) -m calotype up
	@$(PY) tests/bench/train.py

bench-paper: install ## latent against pixel space at equal compute, three seeds
	@$(PY) tests/bench/paper.py

peers: install ## .venv-peers, with the readers that bench-stream compares with
	@$(PY) -m venv .venv-peers
	@.venv-peers/bin/python -m pip install --quiet --requirement tests/bench/peers.txt

bench-stream: install ## the reader against webdataset, and against litdata, mosaicml-streaming, spdl + obstore after make peers
	@$(PY) tests/bench/stream.py

bench-scale: install ## the order at 10^9 samples and 4,096 ranks: seconds, memory, GETs, dollars
	@$(PY) tests/bench/scale.py

bench-cache: install ## caching latents beside the bare encoder, one file per image, and Ray Data; bytes a sample
	@$(PY) tests/bench/cache.py

bench-cache-scale: install ## a cache of 10^5 shards on 1,000 dying workers, in virtual time: requests, work lost, commit
	@$(PY) tests/bench/cache_scale.py

clean: ## remove caches and builds; .venv and .calotype stay
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
