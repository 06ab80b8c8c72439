# make demo | test | test-all | check | clean. Each installs what it needs into .venv, once.

SHELL := /bin/bash
VENV  := .venv
PY    := $(VENV)/bin/python
# The tests compare with a second version of transformers, in a small environment of its own; it may lie elsewhere.
XLSCALE_VENV_456 ?= .venv-4.56
export XLSCALE_VENV_456

# Build environments too: a source package that asks for torch must get the pinned one. The second name is what
# newer versions of pip read for them.
export PIP_CONSTRAINT       := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
# What deepspeed compiles, if anything (on a CPU it is kept from it): the project's own folder, so that nobody else's
# stale build lock can stop a start.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions
export PYTHONUNBUFFERED     := 1
ifeq ($(shell command -v nvidia-smi),)
export DS_ACCELERATOR := cpu
endif

# Unit tests first, then those that start processes; what fails fast is seen first.
TESTS := $(sort $(wildcard tests/test_*.py)) $(wildcard tests/conformance tests/distributed)

.PHONY: demo test test-all check clean

demo: $(VENV)/.demo
	$(PY) launch/demo.py

test: $(VENV)/.test $(XLSCALE_VENV_456)/.made
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow and not gpu" --durations=15 $(TESTS)

test-all: $(VENV)/.test $(XLSCALE_VENV_456)/.made
	OMP_NUM_THREADS=1 $(PY) -m pytest --durations=30 $(TESTS) $(wildcard tests/benchmarks)

check: $(VENV)/.test
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy xlscale data_pipelines

# The runs are kept: they are results.
clean:
	rm -rf $(VENV) .venv-4.56 .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp per set of packages: installed again only when what is wanted changes. The test set holds the demo's.
$(VENV)/.test: $(VENV)/.base
	@echo "installing xlscale[test] into $(VENV): a minute or two, once"
	$(PY) -m pip install -e '.[test]'
	@touch $(VENV)/.demo $@

$(VENV)/.demo: $(VENV)/.base
	@echo "installing xlscale[demo] into $(VENV): a minute or two, once"
	$(PY) -m pip install -e '.[demo]'
	@touch $@

# Nothing of ours is installed there: tests/conformance talks to it through a pipe.
$(XLSCALE_VENV_456)/.made: $(VENV)/.base constraints-4.56.txt
	@echo "installing transformers 4.56.2 into $(XLSCALE_VENV_456): a minute or two, once"
	test -x $(XLSCALE_VENV_456)/bin/python || $(PY) -m venv $(XLSCALE_VENV_456)
	env -u PIP_CONSTRAINT -u PIP_BUILD_CONSTRAINT $(XLSCALE_VENV_456)/bin/python -m pip install -r constraints-4.56.txt
	@touch $@

# An old environment is brought up to date in place, not thrown away.
$(VENV)/.base: pyproject.toml constraints.txt
	@set -euo pipefail; \
	found=; \
	for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	need() { echo "make: $$1" >&2; exit 1; }; \
	test -n "$$found" || need "Python 3.11 or newer is needed and no python3 on the PATH is; on Debian: apt-get install python3"; \
	$$found -c 'import ensurepip, venv' 2>/dev/null \
	  || need "$$found has no venv module; on Debian: apt-get install python3-venv"; \
	command -v g++ >/dev/null || need "g++ is needed (a package without a wheel for this Python is compiled); on Debian: apt-get install g++"; \
	$$found -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
	  || need "the headers of $$found are needed to compile; on Debian: apt-get install python3-dev"; \
	test -x $(PY) || $$found -m venv $(VENV)
	@touch $@
