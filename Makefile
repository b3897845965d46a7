# make train and make test set up what they need in .venv; nothing else is expected of the machine.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: train test bench record clean

train: $(VENV)/.train  ## embedded default: about four minutes on two cores
	$(RUN) examples/grpo_train.py

# Interpreted and compiled kernels need processes of their own: Triton decides at import. They run
# side by side, a thread each.
test: $(VENV)/.test  ## the whole suite, without a GPU
	@log=$$(mktemp); failed=; export OMP_NUM_THREADS=1; \
	TRITON_INTERPRET=1 $(RUN) -m pytest -W ignore tests/kernels tests/test_linear_logps.py \
	    tests/test_grpo_loss.py tests/test_gpu_route.py tests/test_sparse_backends.py \
	    > $$log 2>&1 & interpreter=$$!; \
	$(RUN) -m pytest tests || failed=1; \
	wait $$interpreter || failed=1; \
	echo "TRITON_INTERPRET=1:"; cat $$log; rm $$log; test -z "$$failed"
	$(RUN) -m pytest benchmarks --benchmark-only

bench: $(VENV)/.test  ## compare with the peers that are installed
	$(RUN) -m pytest benchmarks --benchmark-only

record: $(VENV)/.test  ## write benchmarks/results/<device>-<date>.json
	$(RUN) -m benchmarks.record

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip

$(VENV)/.train: $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@ $(VENV)/.train

clean:
	rm -rf $(VENV) build *.egg-info
