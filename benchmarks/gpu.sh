#!/usr/bin/env bash
# gpu.sh STAGE: on a machine with a card and its toolkit, without a network:
#   build      the library for this machine's card, and the C tests
#   ops        every operation on the card against the generic kernels of the CPU
#   sessions   conversations of the tiny model on the card against the CPU, and in company
#   sanitize   the operations under compute-sanitizer: memory, then races in shared memory
# MOSHI_C_CUDA_LIBRARY names another library than the one that was built here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export MOSHI_C_CUDA_LIBRARY=${MOSHI_C_CUDA_LIBRARY:-$PWD/build/gpu/libmoshi_cuda.so}

case ${1:-} in
build)
    python3 scripts/build_cuda.py build/gpu/libmoshi_cuda.so --architectures native \
        --work build/gpu
    make --no-print-directory -j"$(nproc)" build/test/test_kernels build/test/cuda/test_cuda
    ;;
ops)
    build/test/test_kernels cuda
    ;;
sessions)
    build/test/cuda/test_cuda
    ;;
sanitize)
    for tool in memcheck racecheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 1 build/test/test_kernels cuda
    done
    ;;
*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
