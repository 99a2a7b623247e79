# Everything runs from a fresh clone with Python 3.11 or newer, git and make; .venv is built once and again when the lock changes.
PYTHON  ?= python3
PROFILE ?= mini
SET     ?=
LAB     ?=
NLI     ?=
KERNELS ?=
VENV    := .venv
BIN     := $(VENV)/bin
LOCKED  := $(VENV)/.built-from-lock
STAMP   := $(VENV)/.installed
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

# Kernels that round alike on every x86 processor with AVX2, at less speed: docs/miniature.md.
ifeq ($(KERNELS),fixed)
export OMP_NUM_THREADS := 2
export MKL_CBWR := COMPATIBLE
export ATEN_CPU_CAPABILITY := avx2
export ONEDNN_MAX_CPU_ISA := AVX2
export OPENBLAS_CORETYPE := Haswell
export NPY_DISABLE_CPU_FEATURES := X86_V4 AVX512_ICL AVX512_SPR
endif

.PHONY: reproduce install test test-slow test-reproduced test-browser browser lint format figures docs lab bench-mini findings bench-browser bench-pairs bench-generate bench-train bench-batches check-architectures bench-score check-scorers lock clean

reproduce: $(STAMP)  ## run every notebook in order under PROFILE
	$(BIN)/persodpo reproduce --profile $(PROFILE) $(foreach s,$(SET),--set $(s))

install: $(STAMP)  ## only build .venv
	@echo "source $(VENV)/bin/activate"

test: $(STAMP)  ## quick tests
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not browser and not reproduced"

test-slow: $(STAMP)  ## tests that take longer, whole notebooks among them
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

test-reproduced: $(STAMP)  ## what `make reproduce` and `make reproduce PROFILE=release` left
	$(BIN)/python -m pytest -m reproduced

test-browser: $(STAMP) browser  ## every notebook in JupyterLab by a real browser, under the miniature, which runs first if it has not
	test -e runs/mini/notebooks/explore.ipynb || $(BIN)/persodpo reproduce --profile mini
	$(BIN)/python -m pytest -m browser

# A Chromium of this machine is taken; without one, root on Debian installs it and everybody else is told what to do.
browser:
	@command -v "$(PERSODPO_CHROMIUM)" || command -v chromium || command -v chromium-browser || command -v google-chrome || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core > /dev/null; \
	} || { echo "There is no Chromium: install it (Debian: apt install chromium), or name one with PERSODPO_CHROMIUM=/path/to/chromium." >&2; exit 1; }

lint: $(STAMP)  ## style, docstrings, notebooks, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

figures: $(STAMP)  ## redraw every figure from the run folder's tables
	$(BIN)/persodpo figures --profile $(PROFILE) --overwrite

docs: $(STAMP)  ## write the measured numbers of README.md and docs/ from benchmarks/results
	$(BIN)/python benchmarks/write_docs.py

lab: $(STAMP)  ## open the notebooks at explore.ipynb; make lab LAB="--allow-root --port 8890"
	$(BIN)/jupyter lab --notebook-dir=notebooks --LabApp.default_url=/lab/tree/explore.ipynb $(LAB)

bench-mini: $(STAMP)  ## the miniature from nothing: time and memory
	$(BIN)/python benchmarks/bench_mini.py

findings: $(STAMP)  ## both worlds of the miniature and their tables; those of the documents with KERNELS=fixed
	$(BIN)/persodpo ablate --profile mini
	$(BIN)/persodpo evaluate --profile mini --set name=second --set seed=7
	$(BIN)/python benchmarks/bench_mini.py --findings

bench-browser: $(STAMP) browser  ## latency of sliders and menus; needs the published files
	$(BIN)/persodpo reproduce --profile mini
	$(BIN)/python benchmarks/bench_browser.py

bench-pairs: $(STAMP)  ## metric values -> pairs, up to 100 million responses
	$(BIN)/python benchmarks/bench_pairs.py

bench-generate: $(STAMP)  ## asking an endpoint (throughput, faults, kills, memory) and a model of this machine
	$(BIN)/python benchmarks/bench_generate.py
	$(BIN)/python benchmarks/bench_local.py

bench-train: $(STAMP)  ## the trainer's ladder against TRL; needs the pairs (persodpo pairs)
	$(BIN)/python benchmarks/bench_train.py

check-architectures: $(STAMP)  ## every causal language model of transformers, tiny: packed rows against plain passes, a step against TRL
	$(BIN)/python benchmarks/check_architectures.py

bench-batches: $(STAMP)  ## whole prompts a step against shuffled pairs, over seeds
	$(BIN)/python benchmarks/bench_batches.py

bench-score: $(STAMP)  ## scorers against the released loops, growth, a full cache; needs the published files
	$(BIN)/python benchmarks/bench_score.py

check-scorers: $(STAMP)  ## other scorers against the published scores; make check-scorers NLI=folder, see its options
	$(BIN)/python benchmarks/check_scorers.py $(NLI)

$(LOCKED): requirements.lock
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another with make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

$(STAMP): $(LOCKED) pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/persodpo fetch encoder
	@touch $@

# The packages that torch pins for its own CUDA builds are left to torch, so that one lock serves CPU and GPU machines.
lock:  ## resolve pyproject.toml anew
	$(PYTHON) -m venv --clear $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --dry-run --ignore-installed --quiet --report $(VENV)-lock/report.json "torch==2.13.0" setuptools ".[dev]"
	$(VENV)-lock/bin/python tests/lockfile.py $(VENV)-lock/report.json > requirements.lock
	rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
