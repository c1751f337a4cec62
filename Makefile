# moshi-c. Every target does its own set-up; nothing is installed outside .venv but Debian packages
# that are missing (scripts/setup_debian.sh).

PYTHON ?= python3
export PYTHON
JOBS ?= $(shell nproc)
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

CORE := $(wildcard csrc/*.c csrc/cpu/*.c)
BINDING := $(wildcard csrc/py/*.c)
HEADERS := $(wildcard csrc/*.h csrc/cpu/*.h csrc/py/*.h csrc/cpu/*.inc)
C_TESTS := $(wildcard tests/c/test_*.c)
FORMATTED := $(CORE) $(BINDING) $(HEADERS) $(wildcard tests/c/*.[ch] examples/*.c)
PYTHON_SOURCES := moshi_c tests scripts benchmarks examples setup.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SECONDARY:
.SUFFIXES:

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

# ---- Python environment ----------------------------------------------------------------------

$(VENV)/.made:
	scripts/setup_debian.sh build
	$(PYTHON) -m venv $(VENV)
	$(PIP) "pip>=24" "setuptools>=80" wheel "numpy>=2.0"
	touch $@

$(VENV)/.core: $(VENV)/.made $(CORE) $(BINDING) $(HEADERS) setup.py pyproject.toml
	PYTHONWARNINGS=ignore $(PIP) --no-build-isolation --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) "moshi_c[dev]"
	touch $@

# Of upstream's package only the code is taken: its upper limits exclude current versions.
$(VENV)/.test: $(VENV)/.core
	scripts/setup_debian.sh sound
	$(PIP) "moshi_c[test,parity]"
	$(PIP) --no-deps moshi==0.2.13
	touch $@

.PHONY: build
build: $(VENV)/.core ## the package in .venv, editable

.PHONY: demo
demo: build ## a spoken question, the answer in demo/answer.wav
	@scripts/setup_debian.sh sound
	@mkdir -p demo
	$(BIN)/python scripts/question.py demo/question.wav
	$(BIN)/python -m moshi_c run demo/question.wav demo/answer.wav --text

# ---- C: one library per variant --------------------------------------------------------------

C_FLAGS := -std=gnu11 -ffp-contract=off -fPIC -fvisibility=hidden -pthread -Wall -Wextra -Wshadow \
    -Icsrc -DMOSHI_VERSION='"$(VERSION)"'
LINK := -pthread -lm
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

build/$(1)/libmoshi.a: $$(CORE:%.c=build/$(1)/%.o)
	@rm -f $$@
	@ar rcs $$@ $$^

build/$(1)/test_%: build/$(1)/tests/c/test_%.o build/$(1)/libmoshi.a
	@$$(CC_$(1)) $$(FLAGS_$(1)) $$^ -o $$@ $$(LINK)

-include $$(wildcard build/$(1)/csrc/*.d build/$(1)/csrc/*/*.d build/$(1)/tests/c/*.d)
endef
$(foreach v,release test asan tsan gcc clang,$(eval $(call variant,$(v))))

# $(call run_c_tests,VARIANT,TESTS,PREFIX)
define run_c_tests
	@$(MAKE) --no-print-directory -j$(JOBS) $(2:tests/c/%.c=build/$(1)/%)
	@set -e; for test in $(2:tests/c/%.c=build/$(1)/%); do echo "$$test"; $(3) $$test; done
endef

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
QEMU_aarch64 := qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu
$(eval $(call variant,aarch64))

build/aarch64/session: build/aarch64/examples/session.o build/aarch64/libmoshi.a
	@$(CC_aarch64) $(FLAGS_aarch64) $^ -o $@ $(LINK)

.PHONY: aarch64 aarch64-session
aarch64: aarch64-session ## the C tests and a conversation as on ARM, compared with this machine's
	$(call run_c_tests,aarch64,$(C_TESTS),$(QEMU_aarch64))

aarch64-session: $(VENV)/.core libmoshi
	@scripts/setup_debian.sh aarch64 sound
	@$(MAKE) --no-print-directory -j$(JOBS) build/aarch64/session $(C_TESTS:tests/c/%.c=build/aarch64/%)
	$(BIN)/python scripts/same_conversation.py build/session $(QEMU_aarch64) build/aarch64/session

# ---- tests -----------------------------------------------------------------------------------

.PHONY: test-c
test-c: ## the C tests
	@scripts/setup_debian.sh build
	$(call run_c_tests,test,$(C_TESTS))

.PHONY: test
test: $(VENV)/.test test-c ## the C tests, then pytest with parity against upstream
	$(BIN)/pytest -q

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

.PHONY: asan
asan: $(VENV)/.test build/asan-py/bin/espeak-ng ## C tests and pytest under the sanitizers of addresses and undefined behaviour
	$(call run_c_tests,asan,$(C_TESTS))
	MOSHI_C_SANITIZE=address,undefined $(BIN)/python setup.py --quiet build \
	    --build-temp build/asan-py/temp --build-lib build/asan-py/lib
	cd build && $(WITH_ASAN) $(CURDIR)/$(BIN)/python -c \
	    "import moshi_c._core as core; assert 'asan-py' in core.__file__, core.__file__"
	$(WITH_ASAN) $(BIN)/pytest -q -p no:cacheprovider -m "not slow and not parity"

# Fixed addresses, where the system lets us ask for them: the sanitizer has its own map of memory.
THREADED := $(wildcard $(patsubst %,tests/c/test_%*.c,pool engine session threads))
.PHONY: tsan
tsan: ## the threaded C tests under the thread sanitizer
	@scripts/setup_debian.sh build
	$(call run_c_tests,tsan,$(THREADED),$$(setarch -R true 2>/dev/null && echo setarch -R))

.PHONY: bench
bench: $(VENV)/.test ## ours and upstream's, in turn; JSON to benchmarks/results
	$(BIN)/python benchmarks/mimi.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/open.py

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
	rm -rf $(VENV) build demo dist *.egg-info moshi_c/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
