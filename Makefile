# Needs nothing but make and Python 3.11 or newer; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

# The main job on text that every Python ships, under three kinds of precision management.
DEMO := --data python-docs --epochs 2 --log-interval 50 --emsize 100 --nhid 100
demo: .venv/.installed
	$(BIN)/python main.py $(DEMO)
	$(BIN)/python main_fp16_optimizer.py $(DEMO) --fp16 --dynamic-loss-scale
	$(BIN)/python main_amp.py $(DEMO)

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
