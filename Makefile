# Needs nothing but make and Python 3.11 or newer; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint clean

# The main job on text that every Python ships, in every precision mode, side by side.
demo: .venv/.installed
	$(BIN)/python compare.py -- --data python-docs --epochs 2 --log-interval 50 --emsize 64 --nhid 64

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The slowest too.
test-all: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal --slow

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Compiled when imported: most of torch never is.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
