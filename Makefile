# make train and make test set up what they need in .venv; nothing else is expected of the machine.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: train test bench record clean

train: $(VENV)/.train  ## embedded default: about four minutes on two cores
	$(RUN) examples/grpo_train.py

# Interpreted and compiled kernels need processes of their own: Triton decides at import.
test: $(VENV)/.test  ## the whole suite, without a GPU
	$(RUN) -m pytest tests
	TRITON_INTERPRET=1 $(RUN) -m pytest tests/kernels tests/test_linear_logps.py \
	    tests/test_grpo_loss.py tests/test_gpu_route.py
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
