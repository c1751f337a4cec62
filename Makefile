# moshi-c. Every target does its own set-up; nothing is installed outside .venv but Debian packages
# that are missing (scripts/setup_debian.sh).

PYTHON ?= python3
export PYTHON
JOBS ?= $(shell nproc)
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
# For what is more than a few packages: uv, several times as quick.
INSTALL := $(BIN)/python scripts/install.py

CORE := $(wildcard csrc/*.c csrc/cpu/*.c)
BINDING := $(wildcard csrc/py/*.c)
HEADERS := $(wildcard csrc/*.h csrc/cpu/*.h csrc/py/*.h csrc/cpu/*.inc)
CUDA := $(wildcard cuda/*.cu)
CUDA_HEADERS := $(wildcard cuda/*.h) csrc/cuda.h csrc/backend.h csrc/quant.h csrc/config.h csrc/moshi.h
C_TESTS := $(wildcard tests/c/test_*.c)
CUDA_TESTS := $(patsubst tests/cuda/%.c,%,$(wildcard tests/cuda/test_*.c))
FUZZ := $(patsubst tests/fuzz/fuzz_%.c,%,$(wildcard tests/fuzz/fuzz_*.c))
FORMATTED := $(CORE) $(BINDING) $(HEADERS) $(CUDA) $(wildcard cuda/*.h cuda/*.cpp tests/c/*.[ch] \
    tests/cuda/*.[ch] tests/fuzz/*.[ch] examples/*.c benchmarks/*.[ch])
PYTHON_SOURCES := moshi_c tests scripts benchmarks examples setup.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SECONDARY:
.SUFFIXES:

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

# ---- Python environment ----------------------------------------------------------------------

$(VENV)/.made: scripts/setup_debian.sh
	scripts/setup_debian.sh build
	$(PYTHON) -m venv $(VENV)
	$(PIP) "pip>=24" "setuptools>=80" wheel "numpy>=2.0"
	touch $@

$(VENV)/.core: $(VENV)/.made $(CORE) $(BINDING) $(HEADERS) setup.py pyproject.toml
	PYTHONWARNINGS=ignore $(PIP) --no-build-isolation --editable .
	touch $@

$(VENV)/.uv: $(VENV)/.made
	$(PIP) "uv>=0.11"
	touch $@

$(VENV)/.dev: $(VENV)/.core $(VENV)/.uv
	$(INSTALL) -r pyproject.toml --extra dev
	touch $@

# Of upstream's package only the code is taken: its upper limits exclude current versions.
$(VENV)/.test: $(VENV)/.core $(VENV)/.uv
	scripts/setup_debian.sh sound browser
	$(INSTALL) -r pyproject.toml --extra test --extra parity
	$(INSTALL) --no-deps moshi==0.2.13
	touch $@

.PHONY: build
build: $(VENV)/.core ## the package in .venv, editable

.PHONY: demo
demo: build ## a spoken question; the answer in demo/answer.wav, both sides in demo/conversation.png
	@scripts/setup_debian.sh sound
	$(PIP) "moshi_c[plot]"
	$(BIN)/python examples/hello.py --out demo

.PHONY: serve
serve: build ## a page to talk to the small model, at http://localhost:8998; Ctrl-C ends it
	$(PIP) "moshi_c[server]"
	$(BIN)/moshi-c serve

# Each agent framework, and OpenAI's package, in an environment of its own: together they would hold
# each other's versions back. moshi_c itself is a link to the sources, with the core that is there.
FRAMEWORKS := livekit pipecat fastrtc openai
BESIDE_pipecat := --extra server
BESIDE_livekit := --extra clients
.venv-%/.made: pyproject.toml $(VENV)/.uv | $(VENV)/.core
	scripts/setup_debian.sh sound
	$(PYTHON) -m venv --clear --without-pip $(@D)
	$(INSTALL) --python $(@D)/bin/python -r pyproject.toml --extra $* --extra integrations $(BESIDE_$*)
	ln -s "$(CURDIR)/moshi_c" $(@D)/lib/python3.*/site-packages/
	touch $@

# Two at a time, the longest first: most of their tests hear and speak in real time.
.PHONY: integrations $(FRAMEWORKS:%=integrations-%)
integrations: $(VENV)/.core $(VENV)/.uv ## moshi_c in Pipecat, LiveKit and FastRTC; their clients and OpenAI's at its server
	@scripts/setup_debian.sh sound
	@$(MAKE) --no-print-directory -j2 -Otarget $(FRAMEWORKS:%=integrations-%)

$(FRAMEWORKS:%=integrations-%): integrations-%: .venv-%/.made
	.venv-$*/bin/pytest -q -p no:cacheprovider tests/integrations/test_$**.py

.PHONY: resolve
resolve: $(VENV)/.core ## do the extras for agents install beside current transformers and NumPy? nothing is installed
	$(BIN)/python scripts/resolve.py

# ---- C: one library per variant --------------------------------------------------------------

C_FLAGS := -std=gnu11 -ffp-contract=off -fPIC -fvisibility=hidden -pthread -Wall -Wextra -Wshadow \
    -Icsrc -DMOSHI_VERSION='"$(VERSION)"'
LINK := -lopus -logg -pthread -lm -ldl
SANITIZE := -O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all

CC_release := cc
FLAGS_release := -O3 -DNDEBUG
CC_test := cc
FLAGS_test := -O2 -g
CC_asan := gcc
FLAGS_asan := $(SANITIZE) -fsanitize=address,undefined
CC_tsan := gcc
FLAGS_tsan := $(SANITIZE) -fsanitize=thread
CC_gcc := gcc
FLAGS_gcc := $(FLAGS_release) -Werror
CC_clang := clang
FLAGS_clang := -O1 -DNDEBUG -Werror
CC_fuzz := clang
FLAGS_fuzz := $(SANITIZE) -fsanitize=address,undefined,fuzzer-no-link
# Sanitized, the unrolled kernels take this compiler minutes; the readers are what is fuzzed.
build/fuzz/csrc/cpu/%.o: FLAGS_fuzz := -O1 -g

# What drives a fuzz target: libFuzzer, or a replay of its corpus where only gcc is needed.
DRIVER_fuzz := -fsanitize=fuzzer
DRIVER_asan := build/asan/tests/fuzz/replay.o

# The interpreter's headers, for the strict builds of the binding.
PY_FLAGS = $(shell $(BIN)/python -c "import numpy, sysconfig; print('-DPy_LIMITED_API=0x030b0000', \
    '-isystem', sysconfig.get_path('include'), '-isystem', numpy.get_include())")

define variant
build/$(1)/csrc/py/%.o: csrc/py/%.c
	@mkdir -p $$(@D)
	@echo "  $(1) $$<"
	@$$(CC_$(1)) $$(C_FLAGS) $$(FLAGS_$(1)) $$(PY_FLAGS) -MMD -MP -c $$< -o $$@

build/$(1)/%.o: %.c
	@mkdir -p $$(@D)
	@echo "  $(1) $$<"
	@$$(CC_$(1)) $$(C_FLAGS) $$(FLAGS_$(1)) -MMD -MP -c $$< -o $$@

build/$(1)/libmoshi.a: $$(patsubst %.c,build/$(1)/%.o,$$(filter-out $$(LEFT_OUT_$(1)),$$(CORE)))
	@rm -f $$@
	@ar rcs $$@ $$^

build/$(1)/cuda/test_%: build/$(1)/tests/cuda/test_%.o build/$(1)/libmoshi.a
	@mkdir -p $$(@D)
	@$$(CC_$(1)) $$(FLAGS_$(1)) $$^ -o $$@ $$(LINK)

build/$(1)/gpu: build/$(1)/benchmarks/gpu.o build/$(1)/benchmarks/gpu_common.o build/$(1)/libmoshi.a
	@$$(CC_$(1)) $$(FLAGS_$(1)) $$^ -o $$@ $$(LINK)

build/$(1)/test_%: build/$(1)/tests/c/test_%.o build/$(1)/libmoshi.a
	@$$(CC_$(1)) $$(FLAGS_$(1)) $$^ -o $$@ $$(LINK)

run-$(1)/test_%: build/$(1)/test_% FORCE
	@echo "$$<"; $$(RUN_$(1)) $$< $$(SHAPES_$(1)_$$*)

build/$(1)/fuzz_%: build/$(1)/tests/fuzz/fuzz_%.o build/$(1)/libmoshi.a $$(filter %.o,$$(DRIVER_$(1)))
	@$$(CC_$(1)) $$(FLAGS_$(1)) $$(filter -%,$$(DRIVER_$(1))) $$(filter %.o,$$^) $$(filter %.a,$$^) -o $$@ $$(LINK)

-include $$(wildcard $$(patsubst %,build/$(1)/%/*.d,csrc csrc/* tests/* benchmarks))
endef
$(foreach v,release test asan tsan gcc clang fuzz,$(eval $(call variant,$(v))))

# The CUDA backend by a C++ compiler, its kernels run by the host shim.
CUDA_HOST := -x c++ -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Wshadow -Werror \
    -Wno-unknown-pragmas

define cuda_host
build/$(1)/cuda/%.o: cuda/% $$(CUDA_HEADERS)
	@mkdir -p $$(@D)
	@echo "  $(1) $$<"
	@g++ $$(CUDA_HOST) $$(FLAGS_$(1)) -c $$< -o $$@

build/$(1)/cuda/libfake_cublaslt.so: build/$(1)/tests/cuda/fake_cublaslt.o
	@mkdir -p $$(@D)
	@$$(CC_$(1)) -shared $$(FLAGS_$(1)) $$^ -o $$@

build/$(1)/cuda/test_cuda: | build/$(1)/cuda/libfake_cublaslt.so

build/$(1)/cuda/libmoshi_cuda.so: $$(patsubst cuda/%,build/$(1)/cuda/%.o,$$(CUDA) cuda/host_shim.cpp)
	@g++ -shared $$(FLAGS_$(1)) $$^ -o $$@

run-$(1)/cuda/% run-$(1)/gpu run-$(1)/order-%: export MOSHI_C_CUDA_LIBRARY = build/$(1)/cuda/libmoshi_cuda.so
run-$(1)/cuda/%: build/$(1)/cuda/% build/$(1)/cuda/libmoshi_cuda.so FORCE
	@echo "$$<"; SHIM_ORDER=7 $$<
run-$(1)/order-descending: export SHIM_SHARED_KIB = 99
run-$(1)/order-3: export SHIM_PROCESSORS = 4
run-$(1)/order-%: build/$(1)/test_kernels build/$(1)/cuda/libmoshi_cuda.so FORCE
	@echo "$$< cuda, threads $$*"; SHIM_ORDER=$$* $$< cuda $$(SHAPES_$(1)_cuda)
run-$(1)/gpu: build/$(1)/gpu build/$(1)/cuda/libmoshi_cuda.so $(VENV)/.core FORCE
	@echo "$$<, the stages dry"; OUT=build/$(1)/gpu-dry GPU=$$< PYTHON=$(BIN)/python benchmarks/gpu.sh dry
endef
$(foreach v,test asan,$(eval $(call cuda_host,$(v))))

# $(call run,VARIANT,TESTS AND OTHERS): tests in C, as many at a time as there are cores, the longest
# first; the lines of each stay together.
LONGEST := tests/c/test_kernels.c
define run
	@$(MAKE) --no-print-directory -j$(JOBS) -Otarget $(patsubst tests/c/%.c,run-$(1)/%, \
	    $(filter $(LONGEST),$(2)) $(filter-out $(LONGEST),$(2)))
endef

.PHONY: FORCE
FORCE:

.PHONY: libmoshi
libmoshi: ## build/libmoshi.a, build/libmoshi.so and the C example build/session
	@scripts/setup_debian.sh build
	@$(MAKE) --no-print-directory -j$(JOBS) build/libmoshi.a build/libmoshi.so build/session

build/libmoshi.a: build/release/libmoshi.a
	cp $< $@

build/libmoshi.so: $(CORE:%.c=build/release/%.o)
	@cc -shared -Wl,-soname,libmoshi.so.0 $^ -o $@ $(LINK)
	@ln -sf libmoshi.so build/libmoshi.so.0

build/session: build/release/examples/session.o build/libmoshi.a
	cc $^ -o $@ $(LINK)

# ---- aarch64: cross-compiled, run by an emulator ---------------------------------------------

CC_aarch64 := aarch64-linux-gnu-gcc
FLAGS_aarch64 := -O3 -Werror
QEMU := qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu
RUN_aarch64 := $(QEMU) max
# All kinds, row counts and sizes of every operation, but not each with each.
SHAPES_aarch64_kernels := every 5
# Processors without and with the dot product, and with i8mm, and the kernels that they should have.
KERNELS_aarch64 := cortex-a53=neon cortex-a76=neon_dot max=neon_i8mm
# Debian has its libraries for one processor at a time; nothing else of the core uses these two.
LEFT_OUT_aarch64 := csrc/ogg_opus.c
build/aarch64/%: LINK := -pthread -lm -ldl
$(eval $(call variant,aarch64))

# For a machine with a card that may have no Opus: benchmarks/gpu.sh.
CC_gpu := cc
FLAGS_gpu := -O3
LEFT_OUT_gpu := csrc/ogg_opus.c
build/gpu/%: LINK := -pthread -lm -ldl
$(eval $(call variant,gpu))

build/aarch64/session: build/aarch64/examples/session.o build/aarch64/libmoshi.a
	@$(CC_aarch64) $(FLAGS_aarch64) $^ -o $@ $(LINK)

.PHONY: aarch64 aarch64-session aarch64-kernels
aarch64: aarch64-session ## the C tests and a conversation as on ARM, compared with this machine's
	$(call run,aarch64,$(C_TESTS))

aarch64-kernels: ## some shapes of every kernel for ARM, and which kernels a processor gets
	@scripts/setup_debian.sh aarch64
	@$(MAKE) --no-print-directory -j$(JOBS) build/aarch64/test_kernels
	@set -e; for pair in $(KERNELS_aarch64); do \
	    echo "$$pair"; $(QEMU) $${pair%=*} build/aarch64/test_kernels best $${pair#*=}; done
	$(RUN_aarch64) build/aarch64/test_kernels every 19

aarch64-session: $(VENV)/.core libmoshi aarch64-kernels
	@scripts/setup_debian.sh aarch64 sound
	@$(MAKE) --no-print-directory -j$(JOBS) build/aarch64/session
	$(BIN)/python scripts/same_conversation.py build/session $(RUN_aarch64) build/aarch64/session

# ---- tests -----------------------------------------------------------------------------------

.PHONY: test-c
test-c: ## the C tests
	@scripts/setup_debian.sh build
	$(call run,test,$(C_TESTS))

# All architectures: make cuda. One: make cuda CUDA_ARCHITECTURES=90a.
CUDA_ARCHITECTURES ?= 80 86 89 90a 100 120
.PHONY: cuda
cuda: ## libmoshi_cuda.so beside the package, with nvcc; CUDA_ARCHITECTURES="90a" builds for some cards
	$(PYTHON) scripts/build_cuda.py moshi_c/lib/libmoshi_cuda.so --architectures "$(CUDA_ARCHITECTURES)"

.PHONY: cuda-host
cuda-host: ## the CUDA backend without a card: operations, conversations and faults on the host shim
	@scripts/setup_debian.sh build
	$(call run,test,$(CUDA_TESTS:%=run-test/cuda/%) run-test/gpu $(addprefix run-test/order-,ascending descending 3))

.PHONY: cuda-sessions
cuda-sessions: ## of cuda-host the conversations and faults
	@scripts/setup_debian.sh build
	$(call run,test,$(CUDA_TESTS:%=run-test/cuda/%))

# A file's tests stay in one process, which keeps their models and servers. Many of them wait for
# sound in real time while others compute. LONG=--long holds the conversation with upstream's server
# for a minute.
PYTEST := $(BIN)/pytest -q -n 2 --dist loadfile
.PHONY: test
test: $(VENV)/.test test-c ## the C tests, then pytest with parity against upstream
	$(PYTEST) $(LONG)

.PHONY: check check-python check-types check-format check-c check-layers
check: check-python check-types check-format check-c check-layers ## linters, types, warnings, layers

check-python: $(VENV)/.dev
	$(BIN)/ruff check $(PYTHON_SOURCES)
	$(BIN)/ruff format --check $(PYTHON_SOURCES)

check-types: $(VENV)/.dev
	$(BIN)/mypy --strict moshi_c
	$(BIN)/python -m mypy.stubtest --mypy-config-file pyproject.toml \
	    --allowlist scripts/stubtest_allowed.txt moshi_c._core

check-format: $(VENV)/.dev
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
	$(BIN)/codespell

check-c: $(VENV)/.made
	@$(MAKE) --no-print-directory -j$(JOBS) strict-gcc
	@if command -v clang >/dev/null; then $(MAKE) --no-print-directory -j$(JOBS) strict-clang; \
	else echo "clang is not here: its warnings were not checked"; fi

check-layers: $(VENV)/.dev
	$(BIN)/pytest -q tests/test_layers.py

.PHONY: strict-gcc strict-clang
strict-gcc: $(patsubst %.c,build/gcc/%.o,$(CORE) $(BINDING))
strict-clang: $(patsubst %.c,build/clang/%.o,$(CORE) $(BINDING))

# The interpreter is not built with the sanitizers, so they are loaded before it; espeak-ng, which
# some tests call, hangs when they are loaded into it.
PRELOAD = $(shell gcc -print-file-name=libasan.so) $(shell gcc -print-file-name=libstdc++.so.6)
WITH_ASAN = LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    PYTHONPATH="$(CURDIR)/build/asan-py/lib" PYTHONSAFEPATH=1 PATH="$(CURDIR)/build/asan-py/bin:$$PATH"

build/asan-py/bin/espeak-ng: $(VENV)/.test
	@mkdir -p $(@D)
	printf '#!/bin/sh\nunset LD_PRELOAD\nexec %s "$$@"\n' "$$(command -v espeak-ng)" > $@
	chmod +x $@

# Which tests run under the sanitizers; what is slow has models of published sizes. Shapes as on ARM:
# make test and make cuda-host take them all.
ASAN_TESTS ?= not slow
ASAN_CUDA ?= $(CUDA_TESTS)
ASAN_ORDERS ?= descending 3
SHAPES_asan_kernels := every 3
SHAPES_asan_cuda := every 9
.PHONY: asan
asan: $(VENV)/.test build/asan-py/bin/espeak-ng fuzz-corpus ## C tests and pytest under the sanitizers of addresses and undefined behaviour
	$(call run,asan,$(C_TESTS) $(ASAN_CUDA:%=run-asan/cuda/%) $(ASAN_ORDERS:%=run-asan/order-%))
	MOSHI_C_SANITIZE=address,undefined MOSHI_C_CORE=build/asan/libmoshi.a \
	    $(BIN)/python setup.py --quiet build \
	    --build-temp build/asan-py/temp --build-lib build/asan-py/lib
	cd build && $(WITH_ASAN) $(CURDIR)/$(BIN)/python -c \
	    "import moshi_c._core as core; assert 'asan-py' in core.__file__, core.__file__"
	$(WITH_ASAN) $(PYTEST) -p no:cacheprovider -m "$(ASAN_TESTS)"

# Fixed addresses, where the system lets us ask for them: the sanitizer has its own map of memory.
RUN_tsan = $(shell setarch -R true 2>/dev/null && echo setarch -R)
THREADED := $(wildcard $(patsubst %,tests/c/test_%*.c,pool engine session threads))
.PHONY: tsan
tsan: ## the threaded C tests under the thread sanitizer
	@scripts/setup_debian.sh build
	$(call run,tsan,$(THREADED))

# Inputs that a run finds useful stay in build/fuzz/corpus for the next one. One that breaks a promise
# is kept as build/fuzz/found-*; with its defect repaired it moves to tests/fuzz/corpus.
FUZZ_SECONDS ?= 60
.PHONY: fuzz
fuzz: $(VENV)/.core ## every reader of files on damaged ones, FUZZ_SECONDS=60 each; needs clang
	@scripts/setup_debian.sh build fuzzer
	@$(MAKE) --no-print-directory -j$(JOBS) $(FUZZ:%=build/fuzz/fuzz_%)
	@set -e; for target in $(FUZZ); do \
	    echo "fuzz_$$target"; mkdir -p build/fuzz/corpus/$$target; \
	    build/fuzz/fuzz_$$target -max_total_time=$(FUZZ_SECONDS) -timeout=10 -max_len=16384 \
	        -malloc_limit_mb=64 -rss_limit_mb=2048 -verbosity=0 -print_final_stats=1 \
	        -artifact_prefix=build/fuzz/found-$$target- \
	        build/fuzz/corpus/$$target tests/fuzz/corpus/$$target; done
	$(BIN)/python tests/fuzz/fuzz_python.py --seconds $(FUZZ_SECONDS)

.PHONY: fuzz-corpus
fuzz-corpus: ## the inputs that are kept, through the readers in C, under the sanitizers
	@scripts/setup_debian.sh build
	@$(MAKE) --no-print-directory -j$(JOBS) $(FUZZ:%=build/asan/fuzz_%)
	@set -e; for target in $(FUZZ); do echo "build/asan/fuzz_$$target"; \
	    ASAN_OPTIONS=max_allocation_size_mb=64 \
	        build/asan/fuzz_$$target tests/fuzz/corpus/$$target; done

.PHONY: soak
soak: build ## an hour of sound, 10,000 sessions and streams, 100 models: does memory grow?
	$(BIN)/python benchmarks/soak.py

$(VENV)/.bench: $(VENV)/.test
	$(INSTALL) -r pyproject.toml --extra bench
	touch $@

.PHONY: bench
bench: $(VENV)/.bench ## ours and its peers, in turn; JSON to benchmarks/results
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/mimi.py
	$(BIN)/python benchmarks/opus.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/open.py
	$(BIN)/python benchmarks/fork.py
	$(BIN)/python benchmarks/compare.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/seven.py

$(VENV)/.docs: $(VENV)/.core $(VENV)/.uv
	@scripts/setup_debian.sh sound
	$(INSTALL) -r pyproject.toml --extra docs
	touch $@

.PHONY: docs
docs: $(VENV)/.docs ## the documentation's site in build/site, made and read without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

.PHONY: fresh
fresh: $(VENV)/.core ## the README's two commands on a bare Debian, with time and disk; needs root
	@scripts/setup_debian.sh fresh
	$(BIN)/python scripts/fresh.py

.PHONY: full
full: $(VENV)/.core ## everything but fresh, one after the other; JSON to benchmarks/results
	$(BIN)/python scripts/full.py

# ---- housekeeping ----------------------------------------------------------------------------

.PHONY: format
format: $(VENV)/.dev ## rewrites the sources as check wants them
	$(BIN)/ruff check --fix $(PYTHON_SOURCES)
	$(BIN)/ruff format $(PYTHON_SOURCES)
	$(BIN)/clang-format -i $(FORMATTED)

.PHONY: clean
clean: ## removes what was built; .venv too
	rm -rf $(VENV) $(FRAMEWORKS:%=.venv-%) build demo dist *.egg-info moshi_c/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
