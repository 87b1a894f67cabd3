# Every command of the project; `make help` lists them.
#
#   make serve [MODEL=folder] [ARGS="--port 9000"]    set up and start the daemon
#   make test                                         set up and run lint, types and tests
#
# The set-up is kept in .venv; stamp files make a second call instant.

PYTHON ?= python3
MODEL ?=
ARGS ?=
# On Linux, PyPI's torch is the CUDA build (several GB). For the small CPU build:
#   make serve TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

VENV := .venv
FUZZ_KEY := schemathesis
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help serve install dev test lint types unit test-e2e test-slow test-faults test-soak fuzz-http fuzz-frames audit test-kernels test-sanitizers test-wheel test-clients test-schemathesis test-lm-eval eval-builtin bench bench-long bench-gpu bench-peers bench-real-size docs format clean

help: ## list the commands
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

serve: install ## start the daemon: MODEL=folder (default: the built-in model), ARGS="--port 9000"
	@exec $(BIN)/latentd serve $(if $(MODEL),"$(MODEL)") $(ARGS)

install: $(VENV)/.runtime ## set up .venv with what the daemon needs

dev: $(VENV)/.dev ## set up .venv with what the tests need as well

test: lint types unit ## everything CI checks

lint: dev ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: dev ## mypy --strict
	$(BIN)/mypy

unit: dev ## the tests, without those marked slow
	$(BIN)/python -m pytest

test-e2e: dev ## only the tests that drive the real process
	$(BIN)/python -m pytest tests/e2e

test-slow: dev ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-faults: dev ## kill, stop and starve real daemons (minutes); ends with the figures of docs/reliability.md
	$(BIN)/python -m pytest -m faults tests/faults

test-soak: dev ## half an hour of mixed traffic on a daemon whose engine is killed again and again (ARGS="--minutes 5")
	$(BIN)/python -m tests.soak $(ARGS)

fuzz-http: dev ## an hour of bent HTTP requests against a daemon (ARGS="--minutes 5")
	$(BIN)/python -m tests.fuzz.http $(ARGS)

fuzz-frames: dev ## random and mutated frames at both ends of the channel: FRAMES=1000000 SEED=0
	$(BIN)/python -m tests.fuzz.frames --frames $(or $(FRAMES),1000000) --seed $(or $(SEED),0)

audit: $(VENV)/.audit ## a static security linter over the packages, and known vulnerabilities of every pinned version
	$(VENV)/audit/bin/bandit --quiet --configfile pyproject.toml --recursive server scheduler model
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

test-kernels: $(VENV)/.kernels ## the Triton kernels under Triton's interpreter: no GPU needed
	TRITON_INTERPRET=1 $(VENV)/kernels/bin/python -m pytest tests/model/ops/cuda

test-sanitizers: dev ## the CPU kernels under the address, undefined-behaviour and thread sanitizers (needs GCC)
	$(BIN)/python -m tests.sanitizers

test-wheel: dev ## the wheel, installed in an empty environment
	$(BIN)/python -m pytest -m slow tests/test_package.py

test-clients: dev ## OpenAI's, Anthropic's, Vercel's and LangChain's clients against the real process (needs npm)
	npm install --prefix tests/clients --no-audit --no-fund --no-package-lock --silent
	$(BIN)/python -m tests.clients.run --max-open-requests 4 -- node --test tests/clients/clients.test.mjs
	$(BIN)/python -m pytest tests/e2e/test_sdk.py tests/e2e/test_parameters.py tests/e2e/test_tools.py \
		tests/e2e/test_responses.py tests/e2e/test_messages.py

test-schemathesis: $(VENV)/.schemathesis ## every operation of the API document with made-up requests, good and bad
	$(BIN)/python -m tests.clients.run --max-model-len 512 --api-key "$(FUZZ_KEY)" -- \
		$(VENV)/schemathesis/bin/st --config-file tests/clients/schemathesis.toml run {url}/openapi.json \
		--header "Authorization: Bearer $(FUZZ_KEY)" --checks all --mode all \
		--phases examples,coverage,fuzzing --max-examples 100 --max-response-time 30 --request-timeout 60

test-lm-eval: $(VENV)/.lm-eval ## lm-eval's scores of the built-in model against the plain reference
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 PYTHONPATH=. $(BIN)/python -m tests.clients.run -- \
		$(VENV)/lm-eval/bin/python -m tests.clients.lm_eval_scores

eval-builtin: dev ## ask the built-in model all its questions (ARGS="--json model/builtin/eval.json" keeps the result)
	$(BIN)/python -m tools.builtin_model eval --check $(ARGS)

bench: dev ## what scheduling and starting cost, against their targets
	$(BIN)/python -m benchmarks.control_plane --check
	$(BIN)/python -m benchmarks.startup --check

bench-real-size: dev ## 15.7 billion parameters in int4 through the real daemon: MODEL=folder that benchmarks.make_checkpoint wrote
	$(BIN)/python -m benchmarks.real_size "$(MODEL)" --quantization int4 $(ARGS)

bench-long: dev ## a 131,072-token request through the real daemon (minutes)
	$(BIN)/python -m benchmarks.long_context

bench-peers: dev ## latentd beside llama.cpp, vLLM and others, which docs/benchmarks.md says how to build (an hour)
	$(BIN)/python -m benchmarks.peers run all
	$(BIN)/python -m benchmarks.peers table

bench-gpu: dev ## the CUDA worker on this machine's GPU, less than half an hour: OUT=folder
	$(BIN)/python -m benchmarks.gpu_suite --out "$(or $(OUT),bench-out/gpu)"

docs: dev ## write the tables of the documents that follow from the code
	$(BIN)/python -m tools.write_docs

format: dev ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first: by its exact pin, pip takes the build of that version it can see, and what follows finds it there.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "latentd needs Python 3.11 or newer, and '$(PYTHON)' is not that. Try: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt $(TORCH)
	@touch $@

# The install compiles the CPU kernels, where there is a C++ compiler.
$(VENV)/.runtime: $(VENV)/.torch pyproject.toml setup.py model/ops/cpu/build.py $(wildcard model/ops/cpu/kernels/*)
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

# Tools with pins of their own: they get environments of their own. lm-eval finds everything else in ours.
$(VENV)/.schemathesis: $(VENV)/.dev
	$(PYTHON) -m venv $(VENV)/schemathesis
	$(VENV)/schemathesis/bin/pip install --quiet --disable-pip-version-check 'schemathesis==4.32.5'
	@touch $@

$(VENV)/.audit:
	@mkdir -p $(VENV)
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet --disable-pip-version-check 'bandit==1.9.4' 'pip-audit==2.10.1'
	@touch $@

# Triton of torch 2.11, whose interpreter does not run with numpy 2.4. It finds everything else in ours.
$(VENV)/.kernels: $(VENV)/.dev
	$(PYTHON) -m venv $(VENV)/kernels
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$($(VENV)/kernels/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/latentd.pth"
	$(VENV)/kernels/bin/pip install --quiet --disable-pip-version-check 'triton==3.6.0' 'numpy==2.3.5'
	@touch $@

$(VENV)/.lm-eval: $(VENV)/.dev
	$(PYTHON) -m venv $(VENV)/lm-eval
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$($(VENV)/lm-eval/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/latentd.pth"
	$(VENV)/lm-eval/bin/pip install --quiet --disable-pip-version-check 'lm-eval[api]==0.4.13'
	@touch $@
