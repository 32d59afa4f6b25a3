PYTHON  ?= python3
PROFILE ?= default
MODEL   ?= resnet18
BIN     := .venv/bin
COMMA   := ,

.PHONY: help export test check weights bench latency quantization pipeline forms mutation gpu clean

help:     ## show this
	@grep -hE '^[a-z]+: +.*##' $(MAKEFILE_LIST) | sed 's/:.*## */\t/' | expand -t 10

export: .venv/ready-$(PROFILE)    ## MODEL into build/, in every precision of PROFILE
	$(BIN)/resnet-export --model $(MODEL) --profile $(PROFILE) --out build

test: .venv/ready-dev    ## everything this machine can run; what it cannot is skipped with the reason
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

check: .venv/ready-dev    ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

weights: .venv/ready-default    ## train the built-in network again, from its fixed seed
	$(BIN)/resnet-export train exporter/models/$(MODEL).safetensors --model $(MODEL)

bench: .venv/ready-dev    ## the three below, one dated report in benchmarks/results/; BENCH=--quick tries them
	$(BIN)/python benchmarks/suite.py $(BENCH)

latency: .venv/ready-dev    ## what this makes and what its peers make, timed in one run; see its --help
	$(BIN)/python benchmarks/latency.py $(BENCH)

quantization: .venv/ready-dev    ## INT8 against the real peers, installed beside; see its --help
	PYTHONPATH=benchmarks $(BIN)/python -m quantization $(BENCH)

pipeline: .venv/ready-dev    ## the time of a whole export against the peers' steps; see its --help
	$(BIN)/python benchmarks/pipeline.py $(BENCH)

forms: .venv/ready-default    ## measure the forms that a BatchNorm can take where it leaves something
	$(BIN)/python benchmarks/stem_forms.py
	$(BIN)/python benchmarks/padding_forms.py

mutation: .venv/ready-default    ## seed conversion bugs, and count those that the fidelity gate catches
	PYTHONPATH=benchmarks OMP_NUM_THREADS=1 $(BIN)/python -m mutation

gpu:      ## all that needs an NVIDIA GPU, in under 10 minutes; what the machine lacks is skipped, by name
	@test ! -e /dev/nvidiactl || $(BIN)/python $(HAS_TORCH) || $(PYTHON) $(HAS_TORCH) || $(MAKE) .venv/ready-gpu || true
	@python=$(PYTHON); ! $(BIN)/python $(HAS_TORCH) || python=$(BIN)/python; PYTHONPATH=.:benchmarks:$$PYTHONPATH $$python -m gpu $(GPU)

clean:    ## remove what the targets above made
	rm -rf .venv build

# A machine with a GPU may have no network, and a PyTorch of its own: what is there is used.
HAS_TORCH = -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' 2>/dev/null

# The extras are named like the runtimes, so a profile says which ones it needs. torch is pinned with
# everything else, since an open range would pull several GB of CUDA packages.
RUNTIMES = $(shell sed -n 's/^\[runtime\.\([a-z-]*\)\].*/\1/p' profiles/$(PROFILE).toml | paste -sd, -)
INSTALL  = $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/ready-%: .venv/bin/python pyproject.toml constraints.txt
	@echo 'installing the pinned dependencies into .venv, once: $(RUNTIMES) $(if $(filter dev gpu,$*),and what the tests need)'
	$(INSTALL) --editable '.[$(RUNTIMES)$(if $(filter dev gpu,$*),$(COMMA)dev)$(if $(filter gpu,$*),$(COMMA)ort-cuda$(COMMA)tensorrt-rtx)]'
	@touch $@
