# Needs only python3 (with venv and pip), make and a C++ compiler. Try: make help
PYTHON ?= python3
VENV ?= .venv
LIB ?= snntorch
ARGS ?=
OUT ?= benchmarks/results/local
THREADS ?= 1 2
SWEEPS ?= density steps batch width
TORCH ?= $(shell sed -n '/^torch==/p' constraints.txt)

BIN := $(VENV)/bin
RUN := $(BIN)/python -m snn_sparse_backend
# One stamp for each wish for torch: another TORCH installs again.
STAMP := $(VENV)/.installed-$(shell printf %s '$(TORCH)' | tr -c 'A-Za-z0-9.+' '-')
REQUIREMENTS := requirements/norse-without-torchvision.txt
PEERS := requirements/peers.txt
PEERS_STAMP := $(STAMP)-peers
# A package as it is installed: the checkout has two of its folders elsewhere, and mypy follows no import hooks.
LAYOUT := build/layout/snn_sparse_backend

.DEFAULT_GOAL := help
.PHONY: help install demo test bench bench-compare gpu-check compat lint build clean

help: ## show this
	@echo 'usage: make TARGET [VARIABLE=value]'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16
	@echo 'variables'
	@echo '  LIB         library of the demo: snntorch (default) or norse'
	@echo '  ARGS        more arguments for bench or for pytest, e.g. make test ARGS="-k build -x"'
	@echo '  TORCH       torch to install, e.g. make test TORCH=torch==2.12.1 (default: $(TORCH))'
	@echo '  PYTHON      the Python that makes the virtual environment (default: python3); for gpu-check the one'
	@echo '              that runs it, with torch, pytest and the rest: nothing is installed then'
	@echo '  OUT         where bench and gpu-check leave their results (default: $(OUT))'
	@echo '  THREADS     numbers of threads that bench takes in turn (default: $(THREADS))'
	@echo '  SWEEPS      sweeps of bench (default: $(SWEEPS))'
	@echo '  OLD, NEW    the files of bench-compare'
	@echo '  VENV        the virtual environment, made if it does not exist (default: .venv)'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt $(REQUIREMENTS) | $(BIN)/python
	rm -f $(VENV)/.installed-*
	{ grep -v '^torch==' constraints.txt; echo '$(TORCH)'; } > $(VENV)/constraints.txt
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt -e '.[test,demo]'
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt --no-deps -r $(REQUIREMENTS)
	touch $@

$(PEERS_STAMP): $(PEERS) $(STAMP)
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt -e '.[bench]'
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt --no-deps -r $(PEERS)
	touch $@

install: $(STAMP) ## make the virtual environment and install into it

build: $(STAMP) ## compile the core, unless it is in the cache already
	$(RUN) build

demo: $(STAMP) ## train a small network with and without the backend and draw both: demo-LIB.png
	$(RUN) demo --library $(LIB) --out demo-$(LIB).png

# Kernels by themselves have no sweeps, and one number of threads.
bench: $(PEERS_STAMP) ## measure beside all peers, and sweeps; ARGS go to the command
ifneq ($(findstring --kernels,$(ARGS)),)
	$(RUN) bench --out $(OUT) $(ARGS)
else
	$(RUN) bench --out $(OUT) --threads $(THREADS) $(ARGS)
	$(RUN) bench --out $(OUT) --threads $(firstword $(THREADS)) --sweep $(SWEEPS) $(ARGS)
endif

bench-compare: $(STAMP) ## compare the ratios of OLD=old.json and NEW=new.json
	$(RUN) bench-compare $(OLD) $(NEW)

# A Python that the caller names has everything already, and there may be no network.
GPU_PYTHON := $(if $(filter file,$(origin PYTHON)),$(BIN)/python,$(PYTHON))
gpu-check: $(if $(filter file,$(origin PYTHON)),$(STAMP)) ## on a GPU: compile, test, measure; ARGS go to the script
	$(GPU_PYTHON) tests/gpu_check.py --out $(OUT) $(ARGS)

compat: ## the equivalence tests with other versions, in fresh environments: docs/versions.md; ARGS go to the script
	$(PYTHON) tests/compat_matrix.py $(ARGS)

# The second run may have nothing to do with the tests that were chosen: pytest's 5.
test: build ## install, compile, run all tests, also on the CUDA kernels, then lint; ARGS go to pytest
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)
	$(BIN)/python -m pytest -n 2 --dist loadfile --kernels cuda-host $(ARGS) || [ $$? -eq 5 ]
	$(MAKE) lint

lint: $(STAMP) ## ruff and mypy
	$(BIN)/python -m ruff check .
	rm -rf $(LAYOUT)
	mkdir -p $(LAYOUT)
	ln -s $(CURDIR)/snn_sparse_backend/* $(wildcard $(CURDIR)/adapters $(CURDIR)/compat) $(LAYOUT)/
	cd $(LAYOUT)/.. && $(abspath $(BIN))/python -m mypy --config-file $(CURDIR)/pyproject.toml -p snn_sparse_backend

clean: ## remove .venv and what building and testing left here; the cache of compiled libraries stays
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-*.png
	find snn_sparse_backend adapters compat tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
