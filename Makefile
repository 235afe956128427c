# Two commands on a fresh machine with Python 3.11+ and make: `make run` and `make test`.
#
#   make run ARGS="kfac/policy=all"     arguments for python -m fisher_lab
#   make test ARGS="-k signals"         arguments for pytest
#   make PYTHON=python3.12 run          another interpreter for the environment
#   make PIP_FLAGS="..." run            further flags for pip

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PIP_FLAGS ?=
PY := $(VENV)/bin/python
STAMP := $(VENV)/.fisher-lab-installed
BENCH_STAMP := $(VENV)/.fisher-lab-bench-installed
# Two workers with a thread each: the tests are many and small.
WORKERS ?= 2

.PHONY: run test lint bench install clean

run: $(STAMP)
	$(PY) -m fisher_lab $(ARGS)

test: $(STAMP)
	$(PY) -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

bench: $(BENCH_STAMP)
	$(PY) benchmarks/spectra.py $(ARGS)

install: $(STAMP)

# Installed anew only when what is installed has changed. The stamp comes last, so that an
# installation that was cut short is done again.
$(STAMP): pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	@touch $@

$(BENCH_STAMP): $(STAMP)
	$(PY) -m pip install $(PIP_FLAGS) -c constraints.txt -e ".[dev,bench]"
	@touch $@

# Debian's python3 comes without ensurepip: there the environment is made bare and pip is put into
# it by the pip of the interpreter, where that has one.
$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fisher_lab needs Python 3.11 or later; try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || \
	  { rm -rf $(VENV); $(PYTHON) -m venv --without-pip $(VENV); }
	@$(PY) -m pip --version >/dev/null 2>&1 || \
	  $(PYTHON) -m pip --python $(PY) install pip || \
	  { rm -rf $(VENV); echo "$(PYTHON) has neither ensurepip nor pip: install python3-venv" >&2; \
	    exit 1; }

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
