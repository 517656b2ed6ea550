# Each target makes the one environment, .venv, from nothing if need be.

PYTHON ?= python3
BIN := .venv/bin
CACHE := $(or $(LORAPR_CACHE),$(HOME)/.cache/lorapr_jax)
MODEL := $(CACHE)/smollm2-135m-instruct
# No run is ever written over: each demo gets the next number.
NEXT = $(shell n=1; while [ -e runs/demo-$$n ]; do n=$$((n+1)); done; \
	echo runs/demo-$$n)

# Errors alone: the warnings that a machine's settings of pip lead to would fill
# the screen.
INSTALL := -m pip install --quiet --quiet --disable-pip-version-check

# What users load exports with; each has an environment of its own.
TOOLS := transformers4 transformers5 llama_cpp lm_eval

.PHONY: demo compare test test-slow test-families test-report test-package test-lowest \
  test-export test-aot test-gpu soak bench bench-scaling docs lint clean

demo: .venv/run $(MODEL)/config.json
	$(BIN)/python train.py --config=configs/smollm2_135m.py --workdir=$(NEXT)

# LoRAPrune beside the alternatives; what runs/compare holds is not run again.
# COMPARE='--full' or "--text 'PTB validation=file:ptb.txt?lines'" adds to it.
compare: .venv/run $(MODEL)/config.json
	PYTHONPATH=. $(BIN)/python benchmarks/compare.py --jobs 2 $(COMPARE)

# What has a target of its own below is not among these. Two files at a time:
# most of their time is compiling, on one core.
PAIRS := -n 2 --dist loadfile --no-loadscope-reorder
ELSEWHERE := aot or families or gpu or slow or soak or packaging or browser

# Ours beside PyTorch's, and how a step grows with its sizes.
bench: .venv/dev $(MODEL)/config.json
	PYTHONPATH=. $(BIN)/python benchmarks/bench.py

bench-scaling: .venv/run
	PYTHONPATH=. $(BIN)/python benchmarks/step.py --double

test: .venv/dev
	$(BIN)/python -m pytest $(PAIRS) -m 'not ($(ELSEWHERE))'

test-slow: .venv/dev
	$(BIN)/python -m pytest -m slow

# Every family and every feature in every way; `make test` has a few of each.
test-families: .venv/dev
	$(BIN)/python -m pytest $(PAIRS) -m families

# The report in a real browser: no message, no request, no overflow. Skipped
# where there is no Chromium, but with CI=1, as .ci/run has it, it fails.
test-report: .venv/dev
	$(BIN)/python -m pytest -m browser tests/report

# The wheel, installed in an environment of its own.
test-package: .venv/dev
	$(BIN)/python -m pytest -m packaging

# With the oldest versions that requirements.txt allows. Messages, pages, meshes,
# benchmarks, the algebra of pruning, the newest families and the longest runs are
# left to `test`.
LEFT := errors cli pruning families test_docs.py test_notebook.py test_benchmarks.py \
  training/test_shrinking.py training/test_phases.py training/test_processes.py \
  training/test_ladder.py
test-lowest: .venv-lowest/dev
	.venv-lowest/bin/python -m pytest $(PAIRS) \
	  -m 'not (mesh or $(ELSEWHERE))' $(LEFT:%=--ignore=tests/%)

# What the compilers for TPUs and GPUs make of the step, with neither there.
test-aot: .venvs/aot/made
	JAX_PLATFORMS=cpu .venvs/aot/bin/python -m pytest -m aot tests/aot

# Twenty kills at random moments of one run.
soak: .venv/dev
	$(BIN)/python -m pytest -m soak tests/training/test_soak.py

# What only an NVIDIA GPU can show.
test-gpu: .venv/gpu
	JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false \
	  TF_CPP_MIN_LOG_LEVEL=0 $(BIN)/python -m pytest -m gpu tests/gpu

docs: .venv/dev
	PYTHONPATH=. $(BIN)/python docs/generate.py

# Every route of export, in the tools that read it.
test-export: .venv/run $(TOOLS:%=.venvs/%/made)
	$(BIN)/python tests/routes/run.py

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(MODEL)/config.json: | .venv/run
	$(BIN)/python -m lorapr_jax convert demo:smollm2-135m-instruct $(MODEL)

.venv/run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { rm -rf .venv; exit 1; }
	$(BIN)/python $(INSTALL) -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(BIN)/python $(INSTALL) -r requirements-dev.txt
	touch $@

.venv/gpu: .venv/dev
	$(BIN)/python $(INSTALL) 'jax[cuda12]'
	touch $@

.venv-lowest/dev: requirements.txt requirements-dev.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D) || \
	  { rm -rf $(@D); exit 1; }
	sed -n '/^#/!s/>=/==/p' requirements.txt > $(@D)/lowest.txt
	$(@D)/bin/python $(INSTALL) -r $(@D)/lowest.txt \
	  -r requirements-dev.txt
	touch $@

.venvs/aot/made: tests/aot/requirements.txt requirements.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D) || \
	  { rm -rf $(@D); exit 1; }
	$(@D)/bin/python $(INSTALL) -r $<
	touch $@

# pip's cache does not tell a wheel by the settings it was built with.
.venvs/llama_cpp/made: PIP := --no-cache-dir
.venvs/%/made: tests/routes/requirements/%.txt
	test -x .venvs/$*/bin/python || $(PYTHON) -m venv .venvs/$* || \
	  { rm -rf .venvs/$*; exit 1; }
	.venvs/$*/bin/python $(INSTALL) $(PIP) -r $<
	touch $@

clean:
	rm -rf .venv .venv-lowest .venvs
