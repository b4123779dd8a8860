# make demo   see a pocket Stable Diffusion become a video model   (ARGS="key=value ..." changes settings)
# make test   lint, types and tests
# Each sets up its own virtual environment in VENV on the first call.

VENV ?= .venv
PYTHON ?= python3
ARGS ?=
WORKERS ?= 2

# Where no NVIDIA card is found, torch is held at the version tested on CPUs.
CONSTRAINTS := $(shell nvidia-smi >/dev/null 2>&1 || echo -c constraints-cpu.txt)
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)

.DEFAULT_GOAL := help
.PHONY: help demo test lint format clean

help:
	@sed -n 's/^# //p' Makefile | head -3

demo: $(VENV)/.installed
	$(VENV)/bin/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $(CORES) recipes/svd_finetune.py $(ARGS)

test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints-cpu.txt | $(VENV)/bin/python
	@echo "installing into $(VENV); this takes some minutes the first time"
	$(VENV)/bin/python -m pip install --quiet $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints-cpu.txt | $(VENV)/bin/python
	@echo "installing into $(VENV); this takes some minutes the first time"
	$(VENV)/bin/python -m pip install --quiet $(CONSTRAINTS) -e '.[dev]'
	@touch $@ $(VENV)/.installed
