# make demo · make test: all that a clean clone needs, in a virtual environment of its own. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --disable-pip-version-check --quiet -c constraints.txt
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py

.PHONY: demo test bench lint build wheel sanitize deep gpu clean

demo: $(VENV)/.prepared
	$(RUN) -m fastdiff demo

test: $(VENV)/.demo $(VENV)/.built
	$(RUN) -m pytest -n 2 --dist worksteal

deep: $(VENV)/.demo $(VENV)/.built
	$(RUN) -m pytest tests/test_contract.py --deep

bench: $(VENV)/.demo $(VENV)/.built
	$(RUN) -m fastdiff bench --threads 1,2 --json benchmarks/results/$(shell hostname).json

lint: $(VENV)/.installed
	$(RUN) -m ruff check .

build: $(VENV)/.built

wheel: $(VENV)/.installed
	rm -rf dist
	$(RUN) -m pip wheel --disable-pip-version-check --quiet --no-build-isolation --no-deps -w dist .

# The whole property suite on the CPU library under the address and undefined-behaviour sanitizers. Leaks are not looked for: Python keeps
# memory to its end.
sanitize: $(VENV)/.demo $(VENV)/.built
	$(VENV)/bin/cmake -S . -B build/sanitize -G Ninja -DFASTDIFF_SANITIZE=ON -DFASTDIFF_TORCH=$(shell $(RUN) -c "import torch; print(torch.__path__[0])")
	$(VENV)/bin/cmake --build build/sanitize
	LD_PRELOAD="$(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	FASTDIFF_NATIVE=build/sanitize $(RUN) -m pytest tests/test_contract.py -k "cpu"

# All that needs a GPU, in 20 minutes: benchmarks/gpu.py. With the virtual environment if it is there, else with PYTHON as it stands, since a
# machine with a GPU may have torch and no network.
gpu:
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(if $(wildcard $(VENV)/.built),$(RUN),$(PYTHON)) benchmarks/gpu.py

clean:
	rm -rf $(VENV) build dist fastdiff/_native *.egg-info

$(VENV)/.installed: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) setuptools wheel cmake ninja numpy rich ruff triton pybind11 pytest pytest-xdist hypothesis einops scipy matplotlib
	touch $@

# The public models of the demo and of the tests, each with its own needs named: torchvision has no build beside a CPU torch, and asking for
# any of these with its dependencies would replace torch.
$(VENV)/.demo: $(VENV)/.installed
	$(PIP) --no-deps rin-pytorch perceiver-pytorch torchvision beartype ema-pytorch accelerate pyyaml safetensors packaging tqdm pillow \
	timm torch-dct dctorch denoising-diffusion-pytorch perceiver-ar-pytorch hourglass-transformer-pytorch
	$(PIP) scikit-learn transformers diffusers
	touch $@

# torch.compile's cold start, once: the demo then finds its cache.
$(VENV)/.prepared: $(VENV)/.demo $(VENV)/.built
	$(RUN) -m fastdiff demo --prepare
	touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES) pyproject.toml
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@
