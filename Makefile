# make demo    train a small GPT in bf16 and in low precision (examples/01_train_gpt.py)
# make test    the tests
# make lint    ruff and mypy
# Needs Python 3.11 or later and nothing else: all three make .venv first, which sees an installed
# torch. Say make PYTHON=python3.12 to choose the interpreter.

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell \
	$(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint clean

demo: $(INSTALLED)
	$(BIN)/python examples/01_train_gpt.py

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadgroup

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Without a torch and without an NVIDIA GPU, the CPU's versions; without a torch but with a GPU, the
# GPU's. A torch that is there stays, whatever its version; the test tools are pinned either way.
$(INSTALLED): pyproject.toml constraints-cpu.txt constraints-gpu.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later on PATH: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv --system-site-packages .venv
	set -e; extras=inspect,test; constraints=constraints-cpu.txt; \
	if nvidia-smi -L >/dev/null 2>&1; then constraints=constraints-gpu.txt; \
	elif ! $(BIN)/python -c 'import triton' 2>/dev/null; then extras=$$extras,cpu; fi; \
	if $(BIN)/python -c 'import torch' 2>/dev/null; then \
		sed -E '/^(torch|triton)==/d' $$constraints > .venv/constraints.txt; \
	else cp $$constraints .venv/constraints.txt; fi; \
	$(BIN)/python -m pip install --quiet -e ".[$$extras]" -c .venv/constraints.txt
	touch $@

clean:
	rm -rf .venv
