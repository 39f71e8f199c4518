# make demo | test | lint | slow | benchmark. Each brings .venv up to date first; nothing is installed outside it
# except, for the tests and as root, the system packages in scripts/system_packages.sh.

VENV ?= .venv
PYTHON ?=
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
WORKERS ?= 2
PEERS ?= .venv-peers
export VENV PYTHON TORCH TORCH_INDEX

PY := $(VENV)/bin/python
INPUTS := pyproject.toml setup.py constraints.txt scripts/venv.sh
PACKAGES := med_gradcam napari_plugin

# Stamps do not see a .venv whose Python is gone or that was copied from another folder: then start over.
ifneq ($(shell $(PY) -c 'print(open("$(VENV)/.made-for").read().strip())' 2>/dev/null),$(CURDIR))
$(shell rm -f $(VENV)/.core $(VENV)/.dev)
endif

.PHONY: help demo setup test slow lint format benchmark clean
help:
	@sed -n '1,2s/^# //p' Makefile

$(VENV)/.core: $(INPUTS)
	scripts/venv.sh
	@touch $@

$(VENV)/.dev: $(INPUTS) scripts/system_packages.sh
	scripts/system_packages.sh
	scripts/venv.sh dev
	@touch $(VENV)/.core $@

setup: $(VENV)/.dev

# Only the core: no Qt, no test tools.
demo: $(VENV)/.core
	$(VENV)/bin/med-gradcam demo -o demo_output --overwrite

# One thread per worker, or the workers fight for the cores; one worker per file, so that its fixtures are made once.
# Each worker has its own virtual display. (xdist 3.8 cannot group by marker under pytest 9.2.)
test: export OMP_NUM_THREADS = 1
test: $(VENV)/.dev
	$(PY) -m pytest -n $(WORKERS) --dist loadfile -m "not slow" $(ARGS)

slow: $(VENV)/.dev
	$(PY) -m pytest -m slow --timeout 1800 $(ARGS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(PY) scripts/sizes.py $(PACKAGES)

format: $(VENV)/.dev
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# The other tools have an environment of their own that borrows from .venv.
$(PEERS)/.made: benchmarks/peers/setup.sh benchmarks/peers/requirements.txt benchmarks/peers/support.txt | $(VENV)/.dev
	MAIN=$(VENV) benchmarks/peers/setup.sh $(PEERS)
	@touch $@

benchmark: $(VENV)/.dev $(PEERS)/.made
	set -e; for script in $(filter-out benchmarks/bench_peers.py benchmarks/bench_explain.py,$(wildcard benchmarks/bench_*.py)); do echo "== $$script"; $(PY) $$script; done
	$(PY) -m benchmarks.bench_explain
	$(PEERS)/bin/python -m benchmarks.bench_peers $(ARGS)
	$(PEERS)/bin/python -m benchmarks.traps

clean:
	rm -rf $(VENV) $(PEERS) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache demo_output
