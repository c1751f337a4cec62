#!/bin/sh
# Trains moshi-tiny from its codec to its evaluation. Ctrl-C at any moment; the same command goes on.
#
#   ./train.sh RUN [STEPS]
#
# CODEC_MINUTES=150 trains a codec first; without it the one in codec/ is used. SHARDS is the amount
# of timelines (340: 290 hours), PYTHON the interpreter.
set -eu
run=${1:?the folder of the run}
steps=${2:-30000}
python=${PYTHON:-python}
cd "$(dirname "$0")"

# glibc gives memory back to the system after each step and takes it again, which costs time.
export OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 \
    MALLOC_TOP_PAD_=500000000

codec=codec
if [ "${CODEC_MINUTES:-0}" -gt 0 ]; then
    codec=$run/codec
    $python train_codec.py "$codec" --minutes "$CODEC_MINUTES"
    $python export_codec.py "$codec/state.pt" "$codec"
    $python eval_codec.py "$codec" --json "$codec/eval.json"
fi

# Training reads timelines while they are made.
$python timelines.py "$run/data" --codec "$codec" --shards "${SHARDS:-340}" &
timelines=$!
trap 'kill $timelines 2>/dev/null || true' EXIT
trap 'exit 1' INT TERM
$python train_lm.py "$run/lm" "$run/data" --until "$steps" --decay $((steps / 6))

$python export_lm.py "$run/lm/state.pt" "$run/data" "$run/moshi-tiny" --codec "$codec"
$python eval_lm.py "$run/moshi-tiny" --json "$run/eval_greedy.json"
$python eval_lm.py "$run/moshi-tiny" --temperatures 0.3 0.2 --json "$run/eval.json"
