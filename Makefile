# Everything runs in .venv, made under constraints.txt (the tested versions). PYTHON may name another interpreter >= 3.10.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUTCOMES ?= runs/gpu.jsonl
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test test-slow test-gpu test-oldest test-newest lint format clean

help:
	@echo "make setup      create .venv and install spear_hf with its tested dependencies"
	@echo "make demo       real audio to a pre-trained SPEAR, on the bundled audio: runs/demo/report.json"
	@echo "make test       lint, then the fast tests"
	@echo "make test-slow  the tests marked slow"
	@echo "make test-gpu   the tests that need a GPU, with PYTHON and its packages; OUTCOMES: $(OUTCOMES)"
	@echo "make test-oldest the fast tests with the oldest packages that pyproject.toml allows"
	@echo "make test-newest the fast tests with the newest packages, as pip install . brings them"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff rewrite what it can"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,onnx]"
	@touch $(STAMP)

demo: setup
	$(BIN)/python examples/demo.py --output runs/demo

test: setup lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

# Without setup: machines that are lent may have their own packages, and no network.
test-gpu:
	$(PYTHON) -m pytest -m gpu -n 0 -v -p no:cacheprovider --continue-on-collection-errors --outcomes $(OUTCOMES)

test-oldest:
	$(PYTHON) -m venv --clear .oldest
	.oldest/bin/python -m pip install --quiet uv
	.oldest/bin/uv pip install --quiet --python .oldest/bin/python --resolution lowest-direct -e ".[dev,onnx]"
	.oldest/bin/python -m pytest -n 2 --dist loadfile

test-newest:
	$(PYTHON) -m venv --clear .newest
	.newest/bin/python -m pip install --quiet -e ".[dev,onnx]"
	.newest/bin/python -m pytest -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .oldest .newest runs build *.egg-info
