"""Mimi at its real size, frames and whole files: ours in each weight format, upstream's PyTorch.

All sides take the same sound through the same random weights, in turn, with as many threads. Before
the clock runs, the timed objects encode and decode the same second of sound: float32 has to agree
with upstream, and the narrow formats to sound as float32 does. Whole files are also given as a
share of the rate of multiply-adds: what the published sizes need, over what the same threads do
when they do nothing else, probed around every call.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common  # it finds the tests' modules

# isort: split
import checkpoints
import numpy as np
import sound
import torch
import upstream
from numpy.typing import NDArray

import moshi_c

FRAME = 1920
WHOLE = 100  # frames of a whole file
FORMATS = ("f32", "bf16", "int8")
LEAST_SNR = {"bf16": 43.0, "int8": 36.0}
# Multiply-adds of a frame, encoder with eight codebooks and decoder.
MACS = {"encode": 221.3e6, "decode": 219.7e6}


def check(
    ours: dict[str, moshi_c.Mimi], theirs: Any, frames: NDArray[np.float32]
) -> dict[str, Any]:
    """How the formats agree; the process ends when they do not. Leaves `theirs` streaming."""
    exact = ours["f32"].stream()
    streams = {name: mimi.stream() for name, mimi in ours.items() if name != "f32"}
    equal, worst = 0, 0.0
    same = dict.fromkeys(streams, 0.0)
    noise, power = dict.fromkeys(streams, 0.0), 0.0
    for frame in frames:
        want = theirs.encode(torch.from_numpy(frame)[None, None])
        codes = want[0, :, 0].numpy()
        equal += bool((codes == exact.encode(frame)).all())
        said = exact.decode(codes)
        worst = max(worst, float(abs(said - theirs.decode(want)[0, 0].numpy()).max()))
        power += float((said**2).sum())
        for name, stream in streams.items():
            same[name] += float((stream.encode(frame) == codes).mean())
            noise[name] += float(((stream.decode(codes) - said) ** 2).sum())
    snr = {name: 10 * float(np.log10(power / noise[name])) for name in streams}
    if equal < len(frames) - 1 or worst > 1e-4:
        raise SystemExit(f"the two sides differ: {equal} frames of {len(frames)}, by {worst:.2e}")
    if any(snr[name] < LEAST_SNR[name] for name in streams):
        raise SystemExit(f"narrow weights do not sound like float32: {snr} dB")
    result: dict[str, Any] = {"frames": len(frames), "equal_frames": equal, "worst_sample": worst}
    for name in streams:
        result[name] = {
            "equal_codes": round(same[name] / len(frames), 3),
            "snr_db": round(snr[name], 1),
        }
    return result


def shares(
    calls: dict[str, Callable[[int], None]], threads: int, macs: float, blocks: int
) -> dict[str, Any]:
    """Milliseconds a frame and share of the rate of multiply-adds probed around each call."""
    seen: list[float] = []

    def probe() -> float:
        seen.append(common.multiply_rate(threads))
        return seen[-1]

    for call in calls.values():
        call(0)
    times: dict[str, list[float]] = {name: [] for name in calls}
    rates: dict[str, list[float]] = {name: [] for name in calls}
    before = probe()
    for block in range(blocks):
        for name, call in calls.items():
            start = time.perf_counter()
            call(block)
            times[name].append((time.perf_counter() - start) / WHOLE)
            after = probe()
            rates[name].append(2e-9 * macs / times[name][-1] / ((before + after) / 2))
            before = after
    result: dict[str, Any] = {}
    for name in calls:
        result[name] = {
            "p50_ms_a_frame": round(1e3 * float(np.median(times[name])), 3),
            "best_ms_a_frame": round(1e3 * min(times[name]), 3),
            "share_of_fma_rate": round(float(np.median(rates[name])), 3),
            "best_over_best_rate": round(2e-9 * macs / min(times[name]) / max(seen), 3),
        }
    result["fma_rate_gflop_s"] = [round(min(seen), 1), round(max(seen), 1)]
    return result


def measure(folder: Path, threads: int, blocks: int, whole_blocks: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    theirs, whole = upstream.load_mimi(folder), upstream.load_mimi(folder)
    ours = {
        name: moshi_c.load_mimi(
            folder / checkpoints.MIMI_NAME,
            config=folder / checkpoints.MIMI_CONFIG_NAME,
            dtype=name,
            threads=threads,
        )
        for name in FORMATS
    }
    pcm = sound.minute().astype(np.float32)
    frames = pcm[: pcm.size // FRAME * FRAME].reshape(-1, FRAME)
    codes = np.random.default_rng(0).integers(0, 2048, (64, 8))
    theirs.streaming_forever(1)
    result: dict[str, Any] = {"parity": check(ours, theirs, frames[:12])}

    def our_frame(stream: moshi_c.MimiStream) -> Callable[[int], None]:
        def both(index: int) -> None:
            stream.encode(frames[index % len(frames)])
            stream.decode(codes[index % 64])

        return both

    def their_frame(index: int) -> None:
        theirs.encode(torch.from_numpy(frames[index % len(frames)])[None, None])
        theirs.decode(torch.from_numpy(codes[index % 64])[None, :, None])

    sides = {name: our_frame(mimi.stream()) for name, mimi in ours.items()}
    before = common.read_rate(threads)
    result["frame"] = common.summary(
        common.interleave({**sides, "pytorch": their_frame}, blocks, 10)
    )
    result["read_rate_gb_s"] = [round(before, 1), round(common.read_rate(threads), 1)]

    some = np.ascontiguousarray(pcm[: WHOLE * FRAME])
    said = np.random.default_rng(1).integers(0, 2048, (8, WHOLE)).astype(np.int32)

    def their_file(_: int) -> None:
        upstream.encode(whole, some)

    encoders: dict[str, Callable[[int], None]] = {
        name: lambda _, mimi=mimi: mimi.encode(some) for name, mimi in ours.items()
    }
    decoders: dict[str, Callable[[int], None]] = {
        name: lambda _, mimi=mimi: mimi.decode(said) for name, mimi in ours.items()
    }
    result["whole_encode"] = shares(
        {**encoders, "pytorch": their_file}, threads, MACS["encode"], whole_blocks
    )
    result["whole_decode"] = shares(decoders, threads, MACS["decode"], whole_blocks)
    return result


def main() -> None:
    parser = common.arguments(__doc__, "mimi")
    parser.add_argument("--whole-blocks", type=int, default=6, help="turns of whole files")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = checkpoints.make_mimi(Path(name), "full")
        result = {
            f"threads_{threads}": measure(folder, threads, options.blocks, options.whole_blocks)
            for threads in sorted({1, min(2, cores), cores})
        }
    common.report("mimi", options.out, result)


if __name__ == "__main__":
    main()
