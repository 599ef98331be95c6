# Every target does its own set-up: a .venv in this checkout, with the pinned engine.
# The set-up takes minutes once, and a fraction of a second after that.
.DEFAULT_GOAL := help
.PHONY: help setup demo test quick lint format models bench clean

PY := .venv/bin/python

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make or update .venv
	@tools/setup.sh

demo: setup ## the whole way on SmolLM2-135M: inspect, compile, serve, compare, fine-tune, serve
	@$(PY) -m examples.demo

test: lint quick ## lint and the full test suite, real engine included
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow --ignore=tests/engine
	# Alone: the engine's processes are forked from here, and what other modules import comes along.
	$(PY) -m pytest -n 2 --dist loadgroup --no-loadscope-reorder tests/engine

quick: setup ## the tests without the engine, under three minutes on two cores; vLLM cannot be imported in them
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -p tests.no_vllm -m "not engine and not slow" --ignore=tests/engine

lint: setup ## ruff and pyright
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

format: setup ## let ruff fix and format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

REPORTS := .pytest_cache/zoo-models.xml .pytest_cache/zoo-engine.xml

models: setup ## docs/models.md and README's table of models, from the zoo's tests, which run first
	mkdir -p .pytest_cache && rm -f $(REPORTS)
	-OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 tests/models/test_zoo.py --junitxml=$(word 1,$(REPORTS))
	-$(PY) -m pytest -n 2 --dist loadgroup tests/engine/test_zoo.py --junitxml=$(word 2,$(REPORTS))
	$(PY) -m tools.models_page $(REPORTS)

bench: setup ## the benchmarks, side by side with their peers
	$(PY) -m benchmarks.compile
	$(PY) -m benchmarks.serve
	$(PY) -m benchmarks.start
	$(PY) -m benchmarks.push
	$(PY) -m benchmarks.recurrent
	$(PY) -m benchmarks.train
	$(PY) -m benchmarks.optim
	$(PY) -m benchmarks.recurrent_train

clean: ## remove .venv and caches
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
