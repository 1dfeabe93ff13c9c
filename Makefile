# Two commands for a fresh machine with Python 3.12: `make demo` and `make test`. Both set up .venv first.
.DEFAULT_GOAL := help
# Start-up time is mostly reading Python files: let their compiled form be kept.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= $(or $(shell command -v python3.12),python3)
UV := .venv/bin/python -m uv
READY := .venv/.ready
MINUTES ?= 15
# Files of tests at once, where there are two cores and the memory: what one starts (at most four ranks) takes 4 GiB. The default tests
# compute; the slow ones wait for processes that start and end, and a third file keeps the cores busy.
FILES_IN = $(shell [ "$$(nproc)" -ge 2 ] && awk '/^MemAvailable/ {exit $$2 < $(1)}' /proc/meminfo && printf '%s' '-n $(2) --dist loadfile')
AT_ONCE := $(call FILES_IN,9e6,2)
SLOW_AT_ONCE := $(or $(call FILES_IN,14e6,3),$(AT_ONCE))

.PHONY: help setup demo test test-slow test-bf16 mutants lint lock clean

help: ## show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## make .venv with everything locked in requirements/

$(READY): requirements/lock.txt requirements/no-deps.txt pyproject.toml
	@$(PYTHON) -c "" 2>/dev/null || { echo "error: Python 3.12 is needed, and $(PYTHON) does not run: install it, or name" \
		"it with make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PYTHON) requirements/setup.py
	@touch $@

demo: $(READY) ## SmolLM2-135M to a student of 60 % of its size, on this machine's CPUs, in 15 minutes or MINUTES=
	.venv/bin/python launch/demo.py output=outputs/demo minutes=$(MINUTES)

test: $(READY) ## the tests, under 10 minutes
	.venv/bin/python -m pytest $(AT_ONCE) -m "not slow and not gpu"

test-slow: $(READY) ## the slow tests: whole commands under torchrun, larger models
	.venv/bin/python -m pytest $(SLOW_AT_ONCE) --no-loadscope-reorder -m "slow and not gpu"

test-bf16: $(READY) ## tests that compute in bfloat16, slow ones too; ONEDNN_MAX_CPU_ISA=AVX2 makes them those of older processors
	.venv/bin/python -m pytest $(AT_ONCE) -m "bf16 and not gpu"

mutants: $(READY) ## which small bugs the tests would notice: hours; MUTANTS="room=prune slow=true" (docs/development.md)
	.venv/bin/python -m tests.mutants $(MUTANTS)

lint: $(READY) ## ruff: rules and format
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

lock: $(READY) ## resolve pyproject.toml anew into requirements/lock.txt
	$(UV) pip compile --quiet --python-version 3.12 --extra dev --no-header --upgrade pyproject.toml -o requirements/lock.txt

clean: ## remove .venv and outputs
	rm -rf .venv outputs
