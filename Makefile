# Every target sets up what it needs in .venv, once; a second call goes straight to work, and needs no network.
# PYTHON=… chooses the interpreter, JOBS=… the test processes, ARGS=… adds to the command: make test ARGS="-k packing"

PY := .venv/bin/python
JOBS ?= 2
# Python keeps what it compiled, whatever the caller's environment says: without it every process compiles the package anew.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal

# What was installed is known by a stamp with the checksum of all that pip reads: where the project lies, and its dependencies.
KEY := $(shell { pwd; sed '/^\[tool/,$$d' pyproject.toml; } | cksum | cut -d' ' -f1)
RUNTIME := .venv/.runtime-$(KEY)
DEV := .venv/.dev-$(KEY)

.PHONY: help demo test test-gpu check bench docs clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(RUNTIME)  ## fine-tune a small Llama, see before and after, merge, ask the merged model
	@sh scripts/demo.sh

test: $(DEV)  ## all tests
	$(PYTEST) $(ARGS)

test-gpu: $(DEV)  ## the tests that need a CUDA device
	$(PY) -m pytest -m gpu $(ARGS)

check: $(DEV)  ## format, lint, types and the fast tests: before every commit
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PYTEST) -q -m "not slow and not gpu" $(ARGS)

bench: $(RUNTIME)  ## speed and memory beside other tools, in one run, and its table in docs/; QUICK=1 for a short one
	$(PY) benchmarks/run.py $(if $(QUICK),--quick) $(ARGS)
	$(PY) benchmarks/tables.py

docs: $(DEV)  ## write docs/reference.md and docs/benchmarks.md anew, and run the code in all pages
	$(PY) scripts/write_reference.py
	$(PY) benchmarks/tables.py
	$(PYTEST) tests/docs $(ARGS)

clean:  ## remove the environment and all caches; runs/ stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist

$(RUNTIME):
	@sh scripts/environment.sh
	@touch $@

$(DEV):
	@sh scripts/environment.sh dev
	@touch $@ $(RUNTIME)
