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
BENCH_VENV ?= .venv-bench
BENCH_PY := $(BENCH_VENV)/bin/python
BENCH_STAMP := $(BENCH_VENV)/.fisher-lab-installed
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

#   make bench BENCH=benchmarks/kfac/peers.py ARGS="--workload llama"
BENCH ?= benchmarks/spectra.py
bench: $(BENCH_STAMP)
	$(BENCH_PY) $(BENCH) $(ARGS)

install: $(STAMP)

# Installed anew only when what is installed has changed. The stamp comes last, so that an
# installation that was cut short is done again.
$(STAMP): pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	@touch $@

# The libraries that the benchmarks compare with live in an environment of their own: one of them
# brings a top-level package named "tests", another asks for torchvision, which nothing here uses
# and which does not load beside a CPU build of torch.
$(BENCH_STAMP): pyproject.toml constraints.txt | $(PY)
	@$(PYTHON) -m venv --without-pip $(BENCH_VENV)
	$(PY) -m pip --python $(BENCH_PY) install $(PIP_FLAGS) -c constraints.txt -e ".[bench]"
	$(PY) -m pip --python $(BENCH_PY) uninstall -y torchvision
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
