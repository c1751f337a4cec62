#!/usr/bin/env bash
# gpu.sh STAGE: on a machine with a card and its toolkit, without a network:
#   build      the library for this machine's card, the C tests and the timing program
#   ops        every operation on the card against the generic kernels of the CPU
#   sessions   conversations of the tiny model on the card against the CPU, and in company
#   sanitize   the operations, one shape of five, under compute-sanitizer: memory, then races in shared
#              memory
#   model      a folder of the 7B's shapes, random numbers in it (NumPy, 15.8 GB on the disk)
#   large      its greedy stream on the card against the CPU
#   time       what a frame and its parts cost beside the card's read rate, measured in the same run:
#              a table, and gpu.json
#   upstream   our frame and the moshi package's in turn, with the wheels of folder WHEELS if it is set:
#              gpu-upstream.json
#   dry        the program of `time` with the tiny model and few frames, to try it anywhere
# cuBLASLt, which `time` compares with, is looked for in the folder of the wheels, in Python's packages and
# in the toolkit; MOSHI_C_CUBLASLT names another one.
# MOSHI_C_EARLY_KERNELS=1 launches each kernel before the one ahead of it has ended, on cards of compute
# capability 9.0 and later: for `ops`, `sessions` and `time` with it and without it.
# MOSHI_C_CUDA_LIBRARY names another library than the one that was built here, MODEL the folder of
# `model`, OUT the one of the results; both are in build/gpu otherwise.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export MOSHI_C_CUDA_LIBRARY=${MOSHI_C_CUDA_LIBRARY:-$PWD/build/gpu/libmoshi_cuda.so}
MODEL=${MODEL:-build/gpu/model}
OUT=${OUT:-build/gpu}

use_wheels() {
    if [ -n "${WHEELS:-}" ]; then
        python3 -m pip install --quiet --no-index --no-deps --target build/gpu/wheels "$WHEELS"/*.whl
        export PYTHONPATH=$PWD/build/gpu/wheels
    fi
}

# Beside a package that is not installed, the library itself looks in the system alone.
find_cublaslt() {
    local packages path
    packages=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    for path in build/gpu/wheels/nvidia/*/lib/libcublasLt.so.* \
        "$packages"/nvidia/*/lib/libcublasLt.so.*; do
        if [ -z "${MOSHI_C_CUBLASLT:-}" ] && [ -e "$path" ]; then
            export MOSHI_C_CUBLASLT=$path
        fi
    done
}

case ${1:-} in
build)
    python3 scripts/build_cuda.py build/gpu/libmoshi_cuda.so --architectures native \
        --work build/gpu &
    make --no-print-directory -j"$(nproc)" build/gpu/test_kernels build/gpu/cuda/test_cuda \
        build/gpu/gpu
    wait $!
    ;;
ops)
    build/gpu/test_kernels cuda
    ;;
sessions)
    build/gpu/cuda/test_cuda
    ;;
sanitize)
    for tool in memcheck racecheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 1 build/gpu/test_kernels cuda every 5
    done
    ;;
model)
    python3 benchmarks/gpu_models.py "$MODEL"
    ;;
large)
    build/gpu/cuda/test_cuda "$MODEL" greedy
    ;;
time)
    find_cublaslt
    build/gpu/gpu "$MODEL" "$OUT/gpu.json"
    ;;
upstream)
    use_wheels
    python3 benchmarks/gpu_upstream.py "$MODEL" "$OUT/gpu-upstream.json"
    ;;
dry)
    build/gpu/gpu moshi_c/data/moshi-tiny "$OUT/dry.json" dry
    ;;
*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
