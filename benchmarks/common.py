"""What every benchmark shares: the machine's facts, its read rate, interleaved timing, the JSON.

A comparison runs both sides in one process, block by block in turn (A B A B ...), so that a machine
that speeds up or slows down does so for both. Denominators are measured in the same run, around the
blocks: a read rate is never a data sheet's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "tests"))


def processor() -> str:
    """The processor's name as the system tells it, with what its vector units can do."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    fields = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in text.splitlines())
        if key.strip() in ("model name", "model", "flags")
    }
    flags = [f for f in ("avx2", "avx512_bf16", "avx512_vnni", "amx_bf16") if f in fields["flags"]]
    return f"{fields['model name']} model {fields['model']} ({' '.join(flags)})"


def machine() -> dict[str, Any]:
    import os

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": processor(), "cores": cores, "system": platform.platform()}


def commit() -> str:
    """The commit the sources are at, "-dirty" when they differ from it; results don't count."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno", "--", ".", ":(exclude)benchmarks/results")
        return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read_rate(threads: int, seconds: float = 0.25) -> float:
    """GB/s of reading memory that no cache holds, `threads` threads at once."""
    from moshi_c import _core

    return _core.measure(threads, seconds)["read_bytes_s"] / 1e9


def multiply_rate(threads: int) -> float:
    """GFLOP/s of `threads` threads that do nothing but multiply-adds, of the kernels' width."""
    from moshi_c import _core

    return _core.measure(threads, 0)["flops_s"] / 1e9


def interleave(
    sides: dict[str, Callable[[int], None]], blocks: int, calls: int, warm_up: int = 3
) -> dict[str, list[list[float]]]:
    """Seconds of each call, by side and block. A side is called with the number of the call, which
    both sides see in the same order."""
    for index in range(warm_up):
        for side in sides.values():
            side(index)
    times: dict[str, list[list[float]]] = {name: [] for name in sides}
    index = warm_up
    for _ in range(blocks):
        for name, side in sides.items():
            block = []
            for call in range(calls):
                start = time.perf_counter()
                side(index + call)
                block.append(time.perf_counter() - start)
            times[name].append(block)
        index += calls
    return times


def summary(times: dict[str, list[list[float]]]) -> dict[str, Any]:
    """p50, p99 and max in ms of each side; how often the first is faster, block by block."""
    result: dict[str, Any] = {}
    medians = {}
    for name, blocks in times.items():
        every = np.concatenate([np.array(block) for block in blocks]) * 1e3
        medians[name] = np.array([np.median(block) for block in blocks])
        result[name] = {
            "p50_ms": round(float(np.percentile(every, 50)), 3),
            "p99_ms": round(float(np.percentile(every, 99)), 3),
            "max_ms": round(float(every.max()), 3),
            "calls": int(every.size),
        }
    first, *others = medians
    for name in others:
        ratios = medians[name] / medians[first]
        result[f"{name}_over_{first}"] = {
            "median": round(float(np.median(ratios)), 3),
            "least": round(float(ratios.min()), 3),
            "greatest": round(float(ratios.max()), 3),
        }
    return result


def arguments(description: str, name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=8, help="turns each side gets")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    return parser


def report(name: str, out: Path, result: dict[str, Any]) -> None:
    """Prints the result and writes it beside machine, date, commit and command."""
    document = {
        "benchmark": name,
        "command": "python " + " ".join(sys.argv),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        **result,
    }
    text = json.dumps(document, indent=1)
    print(text)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n")
