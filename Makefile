# Everything a user types. Each target sets .venv up first; the second time that costs nothing.
#   make quickstart NPROC=2                train on two processes
#   make setup PYTHON=python3.12           build .venv from another interpreter
#   make soak ROUNDS=3                     three rounds of the randomised tests; 0: until one fails or it is interrupted

PYTHON ?= python3
ifeq ($(strip $(PYTHON)),)
$(error PYTHON= names no interpreter; for example: make setup PYTHON=python3.12)
endif
NPROC ?= 1
ROUNDS ?= 0
BIN := .venv/bin
RUN := runs/quickstart
RECIPE := recipes/quickstart.toml
PYTEST := $(BIN)/python -m pytest -q

.PHONY: help setup quickstart test test-full soak check lint clean accept-mi300x

help:
	@echo "make quickstart   set up, train a tiny ZAYA1 on real text on this machine, plot, sample, export"
	@echo "make test         set up, run the tests; those that need a GPU are skipped without one"
	@echo "make check        lint, then test"
	@echo "make accept-mi300x  on a node of 8 MI300X: checks, tests/gpu, layouts over RCCL, benchmarks, one report"
	@echo "make test-full    test, with the slow ones"
	@echo "make soak         the randomised tests (kills, damage, fuzzed manifests, layouts) with new seeds each round, until one fails; ROUNDS=n for n rounds"
	@echo "make lint         ruff and mypy"
	@echo "make setup        build .venv only"
	@echo "make clean        remove caches and build leftovers; .venv, runs/ and corpora/ stay"

# The stamp lies inside .venv, so deleting .venv is all it takes to start over.
# A PYTHON that is named must be the one that .venv was built from.
setup: .venv/.ready
ifeq ($(origin PYTHON),command line)
	@command -v $(PYTHON) >/dev/null && [ "$$($(PYTHON) -VV 2>/dev/null)" = "$$($(BIN)/python -VV)" ] || \
	    { echo "setup: .venv is of $$($(BIN)/python -V), not of $(PYTHON); delete .venv to build it anew" >&2; exit 2; }
endif
.venv/.ready: setup.py tools/setup_env.py
	@command -v $(PYTHON) >/dev/null || { echo "setup: there is no $(PYTHON); sudo apt-get install python3 python3-venv, or name one: make setup PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -m tools.setup_env
	@touch $@

quickstart: setup
	$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) -m zaya.train $(RECIPE)
	$(BIN)/python -m tools.bigram_baseline $(RECIPE) --json > $(RUN)/bigram.json
	$(BIN)/python -m tools.plot_run $(RUN)
	$(BIN)/python -m tools.export_hf $(RUN) $(RUN)/hf --overwrite
	$(BIN)/python -m tools.generate $(RUN) --prompt "def "
	$(BIN)/python -m tools.quickstart_report $(RUN) --bigram $(RUN)/bigram.json

accept-mi300x: setup
	$(BIN)/python -m tools.accept_mi300x $(ARGS)

test: setup
	$(PYTEST) tests/cpu tests/dist tests/gpu

test-full: setup
	$(PYTEST) -m "slow or not slow" tests/cpu tests/dist tests/gpu

# A round's seed is the time. How to run a failure again: DEBUGGING.md.
soak: setup
	@case "$(ROUNDS)" in ''|*[!0-9]*) echo "make soak: ROUNDS=$(ROUNDS) is not a whole number" >&2; exit 2;; esac; \
	round=0; while [ $(ROUNDS) -eq 0 ] || [ $$round -lt $(ROUNDS) ]; do \
	    round=$$((round + 1)); export ZAYA_SOAK=$$(date +%s); echo "soak: round $$round, ZAYA_SOAK=$$ZAYA_SOAK"; \
	    $(PYTEST) -x -m "soak or hypothesis" tests/cpu tests/dist || exit 1; \
	done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

clean:
	rm -rf build dist *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache
	find zaya tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
