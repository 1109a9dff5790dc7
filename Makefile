# make run: set up and open the app.  make check: set up, then lint, types and tests (what CI runs).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run check
run: .venv/app
	$(BIN)/python app.py

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/mypy safety app.py
	$(BIN)/python -m pytest

.venv/app: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

.venv/dev: requirements.txt requirements-eval.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@
