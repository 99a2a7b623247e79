# Everything runs from a fresh clone with Python 3.11 or newer, git and make; .venv is built once and again when the lock changes.
PYTHON  ?= python3
PROFILE ?= mini
SET     ?=
DEVICE  ?= cpu
VENV    := .venv
BIN     := $(VENV)/bin
LOCKED  := $(VENV)/.built-from-lock
STAMP   := $(VENV)/.installed
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

.PHONY: reproduce test test-slow lint format figures lab bench-mini bench-pairs bench-generate bench-train bench-batches bench-score lock clean

reproduce: $(STAMP)  ## run every notebook in order under PROFILE
	$(BIN)/persodpo reproduce --profile $(PROFILE) $(foreach s,$(SET),--set $(s))

test: $(STAMP)  ## quick tests
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(STAMP)  ## tests that run whole notebooks
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)  ## style, docstrings, notebooks, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

figures: $(STAMP)  ## redraw every figure from the run folder's tables
	$(BIN)/persodpo figures --profile $(PROFILE) --overwrite

lab: $(STAMP)  ## open the notebooks
	$(BIN)/jupyter lab --notebook-dir=notebooks

bench-mini: $(STAMP)  ## the miniature from nothing: time, memory, findings
	$(BIN)/python benchmarks/bench_mini.py

bench-pairs: $(STAMP)  ## metric values -> pairs, up to 100 million responses
	$(BIN)/python benchmarks/bench_pairs.py

bench-generate: $(STAMP)  ## asking an endpoint (throughput, faults, kills, memory) and a model of this machine
	$(BIN)/python benchmarks/bench_generate.py
	$(BIN)/python benchmarks/bench_local.py

bench-train: $(STAMP)  ## the trainer's ladder against TRL; needs the pairs (persodpo pairs)
	$(BIN)/python benchmarks/bench_train.py --device $(DEVICE)

bench-batches: $(STAMP)  ## whole prompts a step against shuffled pairs, over seeds
	$(BIN)/python benchmarks/bench_batches.py

bench-score: $(STAMP)  ## scorers against the released loops, growth, a full cache; needs the published files
	$(BIN)/python benchmarks/bench_score.py

$(LOCKED): requirements.lock
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another with make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

$(STAMP): $(LOCKED) pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# The packages that torch pins for its own CUDA builds are left to torch, so that one lock serves CPU and GPU machines.
lock:  ## resolve pyproject.toml anew
	$(PYTHON) -m venv --clear $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --dry-run --ignore-installed --quiet --report $(VENV)-lock/report.json "torch==2.13.0" setuptools ".[dev]"
	$(VENV)-lock/bin/python tests/lockfile.py $(VENV)-lock/report.json > requirements.lock
	rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
