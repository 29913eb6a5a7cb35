# The two commands to know are "make demo" and "make test"; "make help" lists the rest.

PYTHON ?= python3
VENV ?= .venv
# What pip installs as torch, with options if need be; for a CPU build on Linux for example
# TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch
CHECKPOINT ?=
DEMO_DIR ?= demo-data
SIZE ?= 3GB
FUZZ_SECONDS ?= 600
BENCH_DIR ?= bench-results
BENCH_WORK_DIR ?= bench-data

PIP := "$(VENV)/bin/python" -m pip --disable-pip-version-check -qq install
BIN := $(VENV)/bin

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help venv demo lint test test-slow test-portable test-long fuzz bench bench-full clean torch-wanted

help:
	@echo "make demo       open and quantize a 3 GB checkpoint in a third of its size of memory"
	@echo "make test       lint, check the types, run the default tests"
	@echo "make test-slow  run the tests that take a while"
	@echo "make test-portable  run the default tests without Linux's own calls, as on macOS"
	@echo "make test-long  crash and fail at every step: an hour or so; DISKOFFLOAD_TESTS=full for more"
	@echo "make fuzz       feed made-up files to the readers for FUZZ_SECONDS=$(FUZZ_SECONDS), guided by atheris"
	@echo "make bench      measure beside peers and the raw disk, in under 15 minutes, to $(BENCH_DIR)"
	@echo "make bench-full the same with larger models and more rounds: an hour or more"
	@echo "make venv       only make the virtual environment, without the package"
	@echo "make clean      remove the virtual environment and caches (not $(DEMO_DIR))"
	@echo
	@echo "Variables: PYTHON=$(PYTHON)  VENV=$(VENV)  TORCH=\"$(TORCH)\""
	@echo "of the benchmarks: BENCH_DIR=$(BENCH_DIR)  BENCH_WORK_DIR=$(BENCH_WORK_DIR), on the disk to measure"
	@echo "of the demo: CHECKPOINT=/path/to/your/own  DEMO_DIR=$(DEMO_DIR)  SIZE=$(SIZE)"

venv: $(VENV)/.made

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit("$(PYTHON) is Python %d.%d and 3.10 or later is needed: make PYTHON=... names another" % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	@echo "Making the virtual environment $(VENV) ..."
	@$(PYTHON) -m venv "$(VENV)"
	@touch "$@"

# Holds the TORCH that was asked for last, and is younger only when that has changed.
$(VENV)/.torch: $(VENV)/.made torch-wanted
	@echo '$(TORCH)' | cmp -s - "$@" || echo '$(TORCH)' > "$@"

# torch goes first: the package's own range then finds it there and leaves it alone.
$(VENV)/.installed-%: pyproject.toml $(VENV)/.torch
	@echo "Installing $(TORCH) and diskoffload[$*] into $(VENV) (some minutes the first time) ..."
	@$(PIP) $(TORCH)
	@$(PIP) --editable ".[$*]"
	@touch "$@"

.PRECIOUS: $(VENV)/.made $(VENV)/.torch $(VENV)/.installed-%

demo: $(VENV)/.installed-quantize
	@"$(BIN)/python" tools/demo.py --data "$(DEMO_DIR)" --size "$(SIZE)" $(if $(CHECKPOINT),--checkpoint "$(CHECKPOINT)")

lint: $(VENV)/.installed-test
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy" --strict diskoffload tools

test: lint
	"$(BIN)/python" -m pytest

# Status 5 means that no test is marked slow.
test-slow: $(VENV)/.installed-test
	"$(BIN)/python" -m pytest -m slow || [ $$? -eq 5 ]

# What portable paths lack is left out, with a reason.
test-portable: $(VENV)/.installed-test
	DISKOFFLOAD_PORTABLE=1 "$(BIN)/python" -m pytest

fuzz: $(VENV)/.installed-fuzz
	"$(BIN)/python" tools/fuzz.py --seconds "$(FUZZ_SECONDS)"

bench: $(VENV)/.installed-bench
	"$(BIN)/python" -m tools.benchmarks --short --out "$(BENCH_DIR)" --work-dir "$(BENCH_WORK_DIR)"

bench-full: $(VENV)/.installed-bench
	"$(BIN)/python" -m tools.benchmarks --full --out "$(BENCH_DIR)" --work-dir "$(BENCH_WORK_DIR)"

test-long: $(VENV)/.installed-test
	"$(BIN)/python" -m pytest -m long

clean:
	@if [ -e "$(VENV)/pyvenv.cfg" ]; then rm -rf "$(VENV)"; fi
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find diskoffload tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
	@if [ -e "$(DEMO_DIR)" ]; then echo "kept $(DEMO_DIR), which make demo wrote"; fi
