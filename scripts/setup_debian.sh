#!/bin/sh
# setup_debian.sh WHAT...: installs with apt-get what is missing for building, sound, clang,
# the browser of the page's tests, the other processor, the bare machine.
# Where that cannot be done it says in one sentence what is missing, and fails.
set -eu

python=${PYTHON:-python3}
missing=

# need PACKAGE COMMAND...: the package is missing unless the command succeeds.
need() {
    package=$1
    shift
    "$@" >/dev/null 2>&1 || missing="$missing $package"
}

has_header() {
    echo "#include <$1>" | cc -E - >/dev/null
}

has_fuzzer() {
    echo 'int LLVMFuzzerTestOneInput(const char *a, long n) { return !a + !n; }' |
        clang -fsanitize=fuzzer -x c - -o /dev/null
}

has_python_header() {
    test -f "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h"
}

for what in "$@"; do
    case $what in
    build)
        need gcc command -v cc
        need libc6-dev has_header stdio.h
        need libopus-dev has_header opus/opus.h
        need libogg-dev has_header ogg/ogg.h
        need python3 command -v "$python"
        need python3-venv "$python" -c 'import ensurepip, venv'
        need python3-dev has_python_header
        ;;
    sound)
        need espeak-ng command -v espeak-ng
        need libsndfile1 .venv/bin/python -c 'import soundfile'
        ;;
    fuzzer)
        need clang command -v clang
        need libclang-rt-dev has_fuzzer
        ;;
    clang) need clang command -v clang ;;
    browser) need chromium command -v chromium ;;
    aarch64)
        need gcc-aarch64-linux-gnu command -v aarch64-linux-gnu-gcc
        need libc6-dev-arm64-cross test -f /usr/aarch64-linux-gnu/include/stdio.h
        need qemu-user command -v qemu-aarch64
        ;;
    fresh)
        need debootstrap env PATH="$PATH:/usr/sbin" debootstrap --version
        need git command -v git
        ;;
    *)
        echo "setup_debian.sh: unknown '$what'; expected build, sound, clang, fuzzer, browser, aarch64, fresh" >&2
        exit 2
        ;;
    esac
done

if [ -n "$missing" ]; then
    if ! command -v apt-get >/dev/null; then
        echo "These are missing, and there is no apt-get here to install them:$missing" >&2
        exit 1
    elif [ "$(id -u)" != 0 ]; then
        echo "These are missing; install them with: sudo apt-get install$missing" >&2
        exit 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # shellcheck disable=SC2086
    apt-get install -y -qq --no-install-recommends $missing
fi

if ! command -v "$python" >/dev/null; then
    echo "There is no $python here; expected Python 3.10 or later (make PYTHON=python3.x)" >&2
    exit 1
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "$python is $("$python" -V 2>&1); expected 3.10 or later (make PYTHON=python3.x)" >&2
    exit 1
fi
