# Needs nothing but make and Python 3.11 or newer. Everything else goes into .venv, as far as the target needs it.
PYTHON ?= python3
BIN := .venv/bin

# Python keeps the bytecode of torch, even where the environment forbids it. Else each process compiles it anew, in seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all test-cuda lint clean

# The main job on text that every Python ships, in every precision mode, side by side.
demo: .venv/.report
	$(BIN)/python compare.py -- --data python-docs --epochs 2 --log-interval 50 --emsize 64 --nhid 64

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The slowest too, and those of other frameworks.
test-all: lint .venv/.frameworks
	$(BIN)/python -m pytest -n 2 --dist worksteal --slow

# On a machine with a GPU, in the environment of $(PYTHON) as it is. Another torch may warn of other things.
test-cuda:
	$(PYTHON) -m pytest -m cuda -n 4 --dist worksteal -o filterwarnings=default

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# .venv with the extra "report" or "dev". --no-compile: most of torch is never imported.
.venv/.%: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
