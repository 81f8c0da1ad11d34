# Needs nothing but make and Python 3.11 or newer. Everything else goes into .venv, as far as the target needs it.
PYTHON ?= python3
BIN := .venv/bin

# Python keeps the bytecode of torch, even where the environment forbids it. Else each process compiles it anew, in seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all test-cuda lint docs notebook clean

# The main job on a slice of WikiText-2, in every precision mode, side by side.
demo: .venv/.report data/wikitext-2-slice/test.txt
	$(BIN)/python compare.py -- --data data/wikitext-2-slice --epochs 2 --log-interval 50 --emsize 64 --nhid 64

data/wikitext-2-slice/test.txt: data/wikitext-2/test.txt
	mkdir -p data/wikitext-2-slice
	head -n 1200 data/wikitext-2/train.txt > data/wikitext-2-slice/train.txt
	head -n 200 data/wikitext-2/valid.txt > data/wikitext-2-slice/valid.txt
	head -n 200 data/wikitext-2/test.txt > $@

test: lint docs
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The slowest too, and those of other frameworks.
test-all: lint docs .venv/.frameworks
	$(BIN)/python -m pytest -n 2 --dist worksteal --slow

# On a machine with a GPU, in the environment of $(PYTHON) as it is. Another torch may warn of other things.
test-cuda:
	$(PYTHON) -m pytest -m cuda -n 4 --dist worksteal -o filterwarnings=default

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into site/. A broken link, a missing page or a docstring that names no argument stops it.
docs: .venv/.dev
	$(BIN)/python -m lm.options.flag_table > docs/flags.md
	$(BIN)/zensical build --strict --clean

# examples/cnn.py as a notebook.
notebook: .venv/.dev
	$(BIN)/jupytext --update --to ipynb --output examples/cnn.ipynb examples/cnn.py

# .venv with the extra "report" or "dev". --no-compile: most of torch is never imported.
.venv/.%: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv build dist site *.egg-info
