# Two commands do everything on a fresh machine: `make extend` and `make test`. Both make their own virtual environment first.
PYTHON ?= python3
TAG := $(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])')
VENV := .venv$(TAG)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TRANSFORMERS4 := $(VENV)/transformers4
NEMO_VENV := .venvnemo
ARGS ?=
GPU_PYTHON ?= python3

.DEFAULT_GOAL := help
.PHONY: help venv venv-test venv-nemo extend doctor test test-all test-nemo test-fast lint bench gpu model clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo 'PYTHON=python3.12 chooses the interpreter (megatron-core 0.19 instead of 0.16), ARGS="key=value ..." goes to recipes/extend.py,'
	@echo 'TESTS="tests/unit -k rope" to pytest.'

venv: $(READY) ## make the virtual environment

# the images of docker/ are installed by the same script
$(READY): pyproject.toml constraints.txt docker/install.sh
	PIP_NO_COMPILE=1 docker/install.sh --venv $(VENV) --python $(PYTHON) --extras dev,eval # a third of the packages is never imported
	touch $@

extend: $(READY) ## the main job on the embedded default: SmolLM2-135M, 8K -> 16K, on a CPU
	$(BIN)/python -W ignore recipes/extend.py $(ARGS)

doctor: $(READY) ## what this machine can run, and what to do about what it cannot
	$(BIN)/python tools/doctor.py $(ARGS)

# an older transformers beside the installed one: exports must open in both
$(TRANSFORMERS4)/.ready: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(TRANSFORMERS4) \
		transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2
	touch $@

# whole files go to a worker, in the order of the tree: the long ones of distributed/ and integration/ come first and nobody waits for them
PYTEST := TRANSFORMERS4=$(TRANSFORMERS4) OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

venv-test: $(READY) $(TRANSFORMERS4)/.ready ## the environment of make test

test: venv-test ## the tests that this machine can run
	$(PYTEST) $(TESTS)

test-all: test ## and those that repeat them for every layout, method and moment (CONTRIBUTING.md)
	$(PYTEST) -m 'repeated and not network'

$(NEMO_VENV)/.ready: pyproject.toml constraints-nemo.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "constraints-nemo.txt is for Python 3.11; try make test-nemo PYTHON=python3.11")'
	$(PYTHON) -m venv $(NEMO_VENV)
	$(NEMO_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints-nemo.txt \
		--editable '.[nemo]' pytest hypothesis
	rm -rf $(NEMO_VENV)/lib/python3.11/site-packages/tests # nemo-toolkit installs its own as a package of that name, which hides ours
	touch $@

venv-nemo: $(NEMO_VENV)/.ready ## the environment of make test-nemo (2.2 GB)

test-nemo: venv-nemo ## the adapter for NeMo, in an environment of its own
	OMP_NUM_THREADS=1 $(NEMO_VENV)/bin/python -m pytest tests/nemo

test-fast: $(READY) ## unit tests alone
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit tests/conf

lint: $(READY) ## ruff's rules and format, and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) ## a training step against contiguous positions and against transformers
	$(BIN)/python tools/fetch_smollm2.py --destination models/smollm2_135m
	$(BIN)/python -W ignore tools/bench.py step

gpu: ## tests and measurements that need a GPU (ten minutes); GPU_PYTHON=... names a Python with Transformer Engine
	@status=0; $(GPU_PYTHON) -W ignore -m pytest -s --confcutdir=tests/gpu tests/gpu || status=$$?; \
	$(GPU_PYTHON) -W ignore tools/bench.py gpu --page outputs/gpu/stack.md --overwrite || status=$$?; exit $$status

clean: ## remove environments and caches; outputs, models and datasets stay
	rm -rf .venv3* $(NEMO_VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
