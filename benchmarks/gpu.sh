#!/usr/bin/env bash
# gpu.sh STAGE...: on a machine with a card and its toolkit, without a network:
#   build      the library for this machine's card, the C tests and the timing program
#   ops        every operation on the card against the generic kernels of the CPU; again with
#              MOSHI_C_EARLY_KERNELS=1
#   sessions   conversations of the tiny model on the card against the CPU, and in company; again with
#              each of the switches
#   sanitize   the operations, one shape of five, under compute-sanitizer: memory, then races in shared
#              memory
#   model      folders of the 7B's and of STT-1B's shapes, random numbers in them (NumPy, 18 GB)
#   large      the 7B's greedy stream on the card against the CPU
#   products   G5    large products of one row, beside cuBLASLt's
#   codec      G6    Mimi, 1 and 64 signals
#   frames     G1-4  one session: frames, temporal and depth passes, of bf16, int8 and q4
#   prefill    G9    500 given frames at once, and one by one
#   many       G7    64 sessions in bf16, 128 in int8; G10: the 64 for 60 s at 12.5 Hz, and for 15 s
#              from their beginnings
#   streams    G8    how many sessions of STT-1B keep up
#   upstream   G1,4,6,7  beside the moshi package's, in turn
#   profile    which kernels a frame's time goes to (ncu)
#   time       products codec frames prefill many streams
#   dry        the stages of `time` with narrow models and few frames, to try them anywhere
# Stages follow each other; one that fails says why in its last line, keeps what it has measured, and
# does not keep the next one from beginning. Afterwards a table says which of the targets were reached.
#
# All of it in half an hour, by calls of ten minutes at most (seconds of each stage on an H200 with 16
# cores; estimated, not measured):
#   1. gpu.sh build sessions model products codec frames       90 + 80 + 20 + 35 + 20 + 140 = 385
#   2. gpu.sh prefill streams profile                          35 + 240 + 40 = 315
#   3. gpu.sh many upstream                                    135 + 220 = 355
#   4. gpu.sh ops                                              240
# The machine has to keep its files between the calls; where it does not, build and model come first in
# each of them. For another time: sanitize (300), large (30).
#
# What is taken from the environment:
#   OUT        the folder of the results: log.txt, results.jsonl (each thing as it was measured) and
#              gpu.json (those, the table, machine, date, commit); build/gpu/out otherwise
#   COMMIT     names the sources, where they lie without their history
#   MODEL      the folder of `model`; otherwise in /dev/shm, if there is room, or build/gpu
#   VARIANTS   switches that are timed in turn with what is the case without them: words of
#              NAME=VALUE[,NAME=VALUE], otherwise those below. What the library does not know is
#              left out
#   WHEELS     a folder with the wheel of moshi (the others it needs are PyTorch, einops, safetensors,
#              sentencepiece and huggingface_hub), and of whatever else Python lacks
#   MOSHI_C_CUDA_LIBRARY  another library than the one that `build` makes, which then makes none
#   MOSHI_C_CUBLASLT      cuBLASLt; otherwise looked for among the wheels, Python's packages and the
#              toolkit
#   LIMIT      seconds after which a stage is ended: 480
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
SELF=$PWD/benchmarks/gpu.sh

PYTHON=${PYTHON:-python3}
if [ "${1:-}" = dry ]; then
    OUT=${OUT:-build/gpu/dry}
    export GPU_DRY=1
fi
export OUT=${OUT:-build/gpu/out} GPU=${GPU:-build/gpu/gpu}
RESULTS=$OUT/results.jsonl
OUR_LIBRARY=$PWD/build/gpu/libmoshi_cuda.so
export MOSHI_C_CUDA_LIBRARY=${MOSHI_C_CUDA_LIBRARY:-$OUR_LIBRARY}
# One word for each variant: of one session, of many rows.
read -ra FEW <<<"${VARIANTS-MOSHI_C_EARLY_KERNELS=1 MOSHI_C_DEPTH_KERNEL=1}"
read -ra MANY <<<"${VARIANTS-MOSHI_C_WARPGROUPS=1}"
ROOM_KB=20000000 # for both models

# fail SENTENCE: why a stage can't go on.
fail() {
    echo "$*"
    exit 1
}

needs() {
    command -v "$1" >/dev/null || fail "$1 is not on the PATH: $2"
}

# Of RAM if there is enough of it, so that nothing waits for a disk.
choose_model() {
    local room memory
    if [ -z "${MODEL:-}" ]; then
        room=$(df --output=avail /dev/shm 2>/dev/null | tail -n 1)
        memory=$(sed -n 's/^MemAvailable: *\([0-9]*\) kB/\1/p' /proc/meminfo)
        if [ -e /dev/shm/moshi-7b/config.json ] ||
            { [ "${room:-0}" -gt "$ROOM_KB" ] && [ "${memory:-0}" -gt $((3 * ROOM_KB)) ]; }; then
            MODEL=/dev/shm/moshi-7b
        else
            MODEL=build/gpu/moshi-7b
        fi
    fi
    STT=${MODEL%7b}stt
    [ "$STT" != "$MODEL" ] || STT=$MODEL-stt
    export MODEL STT
}

# config.json comes last.
need_models() {
    [ -e "$MODEL/config.json" ] || fail "there is no model at $MODEL: the stage \`model\` makes it"
    [ -x "$GPU" ] || fail "$GPU was not built: the stage \`build\` makes it"
}

use_wheels() {
    local site=build/gpu/wheels
    if [ -n "${WHEELS:-}" ]; then
        "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target "$site" \
            "$WHEELS"/*.whl || fail "the wheels of $WHEELS could not be installed"
        export PYTHONPATH=$PWD/$site${PYTHONPATH:+:$PYTHONPATH}
    fi
}

# Beside a package that is not installed, the library itself looks in the system alone.
find_cublaslt() {
    local packages path
    packages=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    for path in build/gpu/wheels/nvidia/*/lib/libcublasLt.so.* \
        "$packages"/nvidia/*/lib/libcublasLt.so.* /usr/local/cuda*/lib64/libcublasLt.so.*; do
        if [ -z "${MOSHI_C_CUBLASLT:-}" ] && [ -e "$path" ]; then
            export MOSHI_C_CUBLASLT=$path
        fi
    done
}

# known_variants WORD...: leaves out those with a switch that neither the library nor the program has.
known_variants() {
    local word each found=""
    for word in "$@"; do
        for each in ${word//,/ }; do
            if ! grep -qs "${each%%=*}" "$GPU" "$MOSHI_C_CUDA_LIBRARY"; then
                echo "no switch ${each%%=*} is known: $word is not timed"
                continue 2
            fi
        done
        found="$found $word"
    done
    export VARIANTS=${found# }
}

# wgmma needs the architecture with an "a", which "native" is not.
architecture() {
    local found
    found=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
    case $found in
    9.0) echo 90a ;;
    [0-9]*.[0-9]) echo "${found/./}" ;;
    *) echo native ;;
    esac
}

# part ARGUMENTS...: of a stage, by the timing program. The next ones follow if it fails.
part() {
    "$GPU" "$@" || troubles=$((troubles + 1))
}

# part_with SWITCH COMMAND...: of a stage, with NAME=VALUE or "" in the environment.
part_with() {
    echo "---- ${1:-no switch}: ${*:2}"
    env ${1:+"$1"} "${@:2}" || troubles=$((troubles + 1))
}

stage() {
    local troubles=0 tool name switch
    case $1 in
    build)
        needs make "it builds the programs"
        mkdir -p build/gpu
        if [ "$MOSHI_C_CUDA_LIBRARY" = "$OUR_LIBRARY" ]; then
            needs nvcc "the CUDA toolkit is needed, or a library that MOSHI_C_CUDA_LIBRARY names"
            rm -f "$OUR_LIBRARY"
            "$PYTHON" scripts/build_cuda.py "$OUR_LIBRARY" \
                --architectures "$(architecture)" --work build/gpu &
        else
            true &
        fi
        make --no-print-directory -j"$(nproc)" build/gpu/test_kernels build/gpu/cuda/test_cuda \
            build/gpu/gpu || troubles=1
        wait $! || troubles=$((troubles + 1))
        [ -e "$MOSHI_C_CUDA_LIBRARY" ] || fail "the kernels were not compiled"
        ;;
    ops)
        part_with "" build/gpu/test_kernels cuda
        part_with MOSHI_C_EARLY_KERNELS=1 build/gpu/test_kernels cuda
        ;;
    sessions)
        part_with "" build/gpu/cuda/test_cuda
        for switch in MOSHI_C_EARLY_KERNELS=1 MOSHI_C_WARPGROUPS=1 MOSHI_C_DEPTH_KERNEL=1; do
            part_with "$switch" build/gpu/cuda/test_cuda
        done
        ;;
    sanitize)
        needs compute-sanitizer "it comes with the CUDA toolkit"
        for tool in memcheck racecheck; do
            compute-sanitizer --tool "$tool" --error-exitcode 1 build/gpu/test_kernels cuda every 5 ||
                troubles=$((troubles + 1))
        done
        ;;
    model)
        "$PYTHON" -c 'import numpy' || fail "$PYTHON has no NumPy, which makes the models"
        "$PYTHON" benchmarks/gpu_models.py "$MODEL" 7b || troubles=1
        "$PYTHON" benchmarks/gpu_models.py "$STT" stt || troubles=1
        ;;
    large) build/gpu/cuda/test_cuda "$MODEL" greedy ;;
    products)
        find_cublaslt
        part - "$RESULTS" products
        ;;
    codec)
        need_models
        part "$MODEL" "$RESULTS" codec 1
        part "$MODEL" "$RESULTS" codec 64
        ;;
    frames)
        need_models
        known_variants "${FEW[@]}"
        part "$MODEL" "$RESULTS" frames bf16
        part "$MODEL" "$RESULTS" frames int8
        part "$MODEL" "$RESULTS" frames q4
        ;;
    prefill)
        need_models
        known_variants "${MANY[@]}"
        part "$MODEL" "$RESULTS" prefill
        ;;
    many) # without variants: warpgroups multiply bf16 of more than 64 rows, and neither has those
        need_models
        export VARIANTS=""
        part "$MODEL" "$RESULTS" many bf16 64 60
        part "$MODEL" "$RESULTS" many int8 128
        ;;
    streams)
        need_models
        known_variants "${MANY[@]}"
        part "$STT" "$RESULTS" streams bf16
        VARIANTS="" part "$STT" "$RESULTS" streams int8
        ;;
    upstream)
        need_models
        use_wheels
        "$PYTHON" -c 'import torch' || fail "$PYTHON has no PyTorch: upstream was not measured"
        "$PYTHON" -c 'import moshi.models.lm' ||
            fail "$PYTHON has no moshi, or not what it needs: WHEELS names a folder with its wheel"
        "$PYTHON" benchmarks/gpu_upstream.py "$MODEL" "$RESULTS"
        ;;
    profile)
        need_models
        needs ncu "Nsight Compute comes with the CUDA toolkit"
        "$PYTHON" benchmarks/gpu_profile.py "$MODEL" "$RESULTS"
        ;;
    dry)
        "$PYTHON" benchmarks/gpu_models.py "$OUT/7b" 7b dry || troubles=1
        "$PYTHON" benchmarks/gpu_models.py "$OUT/stt" stt dry || troubles=1
        part - "$RESULTS" products
        part "$OUT/7b" "$RESULTS" codec 2
        VARIANTS=MOSHI_C_EARLY_KERNELS=1 part "$OUT/7b" "$RESULTS" frames q4
        VARIANTS=MOSHI_C_EARLY_KERNELS=1 part "$OUT/7b" "$RESULTS" prefill
        part "$OUT/7b" "$RESULTS" many bf16 2 1
        part "$OUT/stt" "$RESULTS" streams int8
        echo | part "$OUT/7b" follow frame 1
        echo | part "$OUT/7b" follow depth 1
        echo | part "$OUT/7b" follow codec 1
        for name in memory product codec frame temporal depth prefill sessions beginning paced spread \
            streams; do
            grep -q "^{\"name\": \"[^\"]*$name" "$RESULTS" && continue
            echo "nothing was measured of: $name"
            troubles=$((troubles + 1))
        done
        ;;
    *) fail "there is no stage $1: gpu.sh without a word lists them" ;;
    esac || return 1
    [ "$troubles" = 0 ] || fail "$troubles of the parts of $1 failed, as said above"
}

# A stage in a process of its own, which is ended when it takes too long.
run() {
    local began=$SECONDS status trouble=""
    echo "==== $1"
    timeout --kill-after 10 "${LIMIT:-480}" bash "$SELF" only "$1" 2>&1 |
        tee -a "$OUT/log.txt"
    status=${PIPESTATUS[0]}
    if [ "$status" = 124 ] || [ "$status" = 137 ]; then
        trouble="ended after ${LIMIT:-480} s"
    elif [ "$status" != 0 ]; then
        trouble=$(grep -v '^ *$' "$OUT/log.txt" | tail -n 1)
        trouble=${trouble:-it failed with status $status}
    fi
    [ -z "$trouble" ] || failures=$((failures + 1))
    "$PYTHON" benchmarks/gpu_report.py "$OUT" stage "$1" $((SECONDS - began)) "$trouble"
}

main() {
    local word each failures=0
    if [ $# = 0 ]; then
        sed -n '2,/^set/s/^# \{0,1\}//p' "$SELF"
        exit 2
    fi
    choose_model
    if [ "$1" = only ]; then
        stage "$2"
        exit
    fi
    [ "$1" != dry ] || rm -rf "$OUT" # what it measures means nothing beside anything else
    mkdir -p "$OUT"
    "$PYTHON" benchmarks/gpu_report.py "$OUT" begin || exit 1
    for word in "$@"; do
        if [ "$word" = time ]; then
            for each in products codec frames prefill many streams; do run "$each"; done
        else
            run "$word"
        fi
    done
    "$PYTHON" benchmarks/gpu_report.py "$OUT"
    [ "$failures" = 0 ]
}

main "$@"
exit
