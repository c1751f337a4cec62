"""Does anything grow? Hours of use in a few minutes, with resident memory, descriptors and threads.

Five loops over the packaged model: an hour of sound through one session, minute by minute, each
minute's recording dropped before memory is read, so that what a caller keeps is not counted;
sessions opened, stepped twice and closed; forks, stepped in an event loop, saved and restored;
codec streams opened and closed; models loaded and closed. The first fifth of a loop warms up.
After it resident memory may vary by MAX_RANGE_MB, and the line fitted to it may rise by MAX_RISE_MB
from end to end; descriptors and threads may not grow at all. Exits with 1 when something did.
Needs Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np

import moshi_c

MAX_RANGE_MB = 4.0
MAX_RISE_MB = 1.0
SAMPLES = 50  # of memory, in each loop
RATE, FRAME = 24000, 1920


def resident_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("this system does not tell resident memory; soak.py needs Linux")


def entries(folder: str) -> int:
    return sum(1 for _ in Path(folder).iterdir())


def soak(name: str, count: int, once: Callable[[int], None]) -> dict[str, Any]:
    """Calls `once` `count` times and tells what grew."""
    every = max(1, count // SAMPLES)
    memory, descriptors, threads = [], [], []
    start = time.perf_counter()
    for index in range(count):
        once(index)
        if (index + 1) % every == 0:
            gc.collect()
            memory.append(resident_mb())
            descriptors.append(entries("/proc/self/fd"))
            threads.append(entries("/proc/self/task"))
    seconds = time.perf_counter() - start
    warm = len(memory) // 5
    rest = np.array(memory[warm:])
    slope = np.polyfit(np.arange(len(rest)), rest, 1)[0] if len(rest) > 1 else 0.0
    result = {
        "times": count,
        "seconds": round(seconds, 1),
        "resident_mb": {
            "first": round(memory[0], 1),
            "warm": round(float(rest[0]), 1),
            "last": round(float(rest[-1]), 1),
            "range": round(float(np.ptp(rest)), 2),
            "fitted_rise": round(float(slope) * (len(rest) - 1), 2),
        },
        "descriptors": [min(descriptors[warm:]), max(descriptors[warm:])],
        "threads": [min(threads[warm:]), max(threads[warm:])],
    }
    found = result["resident_mb"]
    result["flat"] = (
        found["range"] <= MAX_RANGE_MB
        and found["fitted_rise"] <= MAX_RISE_MB
        and descriptors[-1] <= descriptors[warm]
        and threads[-1] <= threads[warm]
    )
    print(f"{name}: {result}", flush=True)
    return result


def speech(seconds: float, seed: int) -> np.ndarray:
    """Noise that comes and goes as syllables do."""
    t = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).standard_normal(len(t))
    return (0.1 * noise * np.sin(2 * np.pi * 1.5 * t) ** 2).astype(np.float32)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=int, default=60, help="of sound through one session")
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--forks", type=int, default=2000)
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--loads", type=int, default=100)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "soak.json")
    options = parser.parse_args()
    frame = speech(FRAME / RATE, 0)
    result: dict[str, Any] = {}

    with moshi_c.load() as model:
        with moshi_c.Session(model, seed=1) as session:
            minutes = [speech(60, seed) for seed in range(3)]

            def run(index: int) -> None:
                session.run(minutes[index % 3])

            result["hour"] = soak("hour", options.minutes, run)

        def converse(index: int) -> None:
            with moshi_c.Session(model, seed=index) as session:
                session.step(frame)
                session.step(frame)

        result["sessions"] = soak("sessions", options.sessions, converse)

        with moshi_c.Session(model, seed=1) as session:
            session.run(minutes[0][: 20 * FRAME])

            def branch(index: int) -> None:
                with session.fork(seed=index) as fork:
                    asyncio.run(fork.astep(frame))
                    saved = fork.snapshot()
                with moshi_c.Session.from_snapshot(model, saved) as restored:
                    restored.step(frame)

            result["forks"] = soak("forks", options.forks, branch)

    with moshi_c.load_mimi() as mimi:

        def code(index: int) -> None:
            with mimi.stream() as stream:
                stream.decode(stream.encode(frame))

        result["streams"] = soak("streams", options.streams, code)

    def load(index: int) -> None:
        with moshi_c.load() as model, moshi_c.Session(model, seed=index) as session:
            session.step(frame)

    result["loads"] = soak("loads", options.loads, load)

    limits = {"range_mb": MAX_RANGE_MB, "fitted_rise_mb": MAX_RISE_MB}
    common.report("soak", options.out, {"limits": limits, **result})
    grown = [name for name, loop in result.items() if not loop["flat"]]
    if grown:
        print(f"not flat: {', '.join(grown)}")
    return 1 if grown else 0


if __name__ == "__main__":
    raise SystemExit(main())
