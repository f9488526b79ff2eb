# Each target does all its own set-up: Python 3.11+, pip, git and make are enough. uv is taken from
# the PATH, or fetched into .tools/ (pip's --target needs neither a venv nor a writable system).
UV := $(shell command -v uv 2>/dev/null || echo .tools/bin/uv)
PYTHON ?= python3
RUN = $(UV) run --frozen
# What the demo takes: no torch, its reference is recorded. What is there already stays.
DEMO = $(UV) run --frozen --no-dev --extra cpu --extra report --extra retrieval

# The environment has onnxruntime for CPUs; a GPU takes one of its own: see docs/gpu.md.
GPU_PYTHON ?= $(RUN) python

.PHONY: demo test test-all test-cpus lint format docs bench vectors gpu

demo: $(UV)
	$(DEMO) embedport demo

# All but the cases marked slow: ten minutes on two cores.
test: $(UV)
	$(RUN) pytest -m "not slow" --durations=15

test-all: $(UV)
	EMBEDPORT_FUZZ=400 $(RUN) pytest --durations=40

# On CPUs that are not at hand, under qemu-user: see tests/cpus/run.py.
test-cpus: $(UV)
	$(RUN) python tests/cpus/run.py

lint: $(UV)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) ty check embedport embedport/exporters embedport/quantize embedport/runtimes embedport/validation tests benchmarks

format: $(UV)
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

# The reference of the command line, and the site in site/.
docs: $(UV)
	$(RUN) python -m typer embedport.cli.app utils docs --name embedport --output docs/cli.md
	$(RUN) mkdocs build --strict

bench: $(UV)
	$(RUN) python -m benchmarks

# The demo pair's vectors, which every machine must reproduce: see tests/vectors/record.py.
vectors: $(UV)
	$(RUN) python -m tests.vectors.record

# A Python of one's own needs no uv.
gpu: $(if $(findstring $(UV),$(GPU_PYTHON)),$(UV))
	$(GPU_PYTHON) -m pytest -m gpu
	$(GPU_PYTHON) -m benchmarks packed --products
	$(GPU_PYTHON) -m benchmarks gpu

.tools/bin/uv:
	PYTHONPATH= $(PYTHON) -m pip install --quiet --disable-pip-version-check --target .tools uv
