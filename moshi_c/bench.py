"""What this machine can do and what a model makes of it: limits, the time of a frame by stages, and
how many conversations go on at once."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import _core, hub
from .model import Model, devices
from .session import Session, step_many

STAGES = ("encode", "temporal", "depth", "decode", "other")
SESSIONS = (1, 2, 4, 8)
WARM_UP = 5

#: Bytes and f32 operations of a frame through the published codec with 8 codebooks, both ways.
MIMI_COST = ((173_180_672, 434_257_920), (160_616_448, 431_181_824))
#: Bits of a weight.
BITS = {"bf16": 16.0, "q8": 8.5, "q4": 4.5}


@dataclass(frozen=True)
class Times:
    """Milliseconds of a step."""

    p50: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        ms = 1e3 * np.array(seconds)
        return cls(*(round(float(x), 3) for x in (*np.percentile(ms, [50, 99]), ms.max())))


@dataclass(frozen=True)
class Limits:
    """The best of the machine, by the number of threads: what is read from memory, and f32
    operations, both in thousand millions a second."""

    read_gb_s: dict[int, float]
    gflop_s: dict[int, float]

    @property
    def best_read(self) -> float:
        """Bytes a second."""
        return 1e9 * max(self.read_gb_s.values())

    def least(self, size: float, flops: float) -> float:
        """Seconds below which `size` bytes and `flops` operations can't be done."""
        return max(size / self.best_read, flops / (1e9 * max(self.gflop_s.values())))


def measure_limits(threads: int | None = None, seconds: float = 0.5) -> Limits:
    """Measured for one thread, twice as many, and so on, up to `threads` (None: one per core)."""
    most = threads or _cores()
    counts = sorted({*(1 << n for n in range(most.bit_length()) if 1 << n <= most), most})
    found = {count: _core.measure(count, seconds) for count in counts}
    return Limits(
        {count: round(rates["read_bytes_s"] / 1e9, 2) for count, rates in found.items()},
        {count: round(rates["flops_s"] / 1e9, 1) for count, rates in found.items()},
    )


def _cores() -> int:
    """That this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- a model -----------------------------------------------------------------------------------


def _voice(model: Model, frames: int) -> Iterator[Any]:
    """Frames of noise as loud as speech; what they hold changes no time."""
    rng = np.random.default_rng(0)
    for _ in range(frames):
        yield (0.05 * rng.standard_normal(model.frame_size)).astype(np.float32)


def measure_frames(model: Model, frames: int) -> dict[str, Times]:
    """One session: the times of a whole step, and of each stage."""
    times: dict[str, list[float]] = {name: [] for name in ("frame", *STAGES)}
    with Session(model, seed=1) as session:
        for pcm in _voice(model, WARM_UP + model.max_delay):
            session.step(pcm)
        before = model._core.stats()
        for pcm in _voice(model, frames):
            start = time.perf_counter()
            session.step(pcm)
            times["frame"].append(time.perf_counter() - start)
            after = model._core.stats()
            for stage in STAGES:
                times[stage].append(after[f"{stage}_s"] - before[f"{stage}_s"])
            before = after
    return {name: Times.of(seconds) for name, seconds in times.items()}


def measure_sessions(model: Model, frames: int, shown: Callable[[int], None]) -> dict[int, Times]:
    """Batched steps of more and more sessions, as long as they stay within a frame's time."""
    found: dict[int, Times] = {}
    for count in SESSIONS:
        shown(count)
        seconds = []
        warm_up = WARM_UP + model.max_delay
        with contextlib.ExitStack() as stack:
            sessions = [stack.enter_context(Session(model, seed=seed)) for seed in range(count)]
            for index, pcm in enumerate(_voice(model, warm_up + frames)):
                start = time.perf_counter()
                step_many(sessions, [pcm] * count)
                if index >= warm_up:
                    seconds.append(time.perf_counter() - start)
        found[count] = Times.of(seconds)
        if found[count].p50 > 1e3 / model.frame_rate:
            break
    return found


def floors(model: Model, limits: Limits) -> dict[str, float]:
    """Seconds of each stage at best: its weights must be read, the codec's products be made."""
    info = model._info
    return {
        stage: limits.least(info[f"{stage}_bytes"], info.get(f"{stage}_flops", 0))
        for stage in STAGES[:-1]
    }


# ---- models that are not here ------------------------------------------------------------------


def language_weights(config: dict[str, Any]) -> tuple[int, int]:
    """Weights that a frame reads, and keys and values with the context full, by a config."""
    dim, layers = config["dim"], config["num_layers"]
    hidden = int(2 * config["hidden_scale"] * dim / 3)
    inner, inner_hidden = config["depformer_dim"], config["depformer_dim_feedforward"] * 2 // 3
    step = dim * inner + config["card"] * inner
    step += config["depformer_num_layers"] * (4 * inner * inner + 3 * inner * inner_hidden)
    temporal = layers * (4 * dim * dim + 3 * dim * hidden) + config["text_card"] * dim
    return temporal + config["dep_q"] * step, 2 * layers * dim * config["context"]


def estimates(limits: Limits) -> dict[str, float]:
    """At best, milliseconds of a frame of the published 7B in each format, its context full."""
    weights, remembered = language_weights(hub.BUILT_IN_CONFIG)
    codec = sum(limits.least(*cost) for cost in MIMI_COST)
    seconds = {
        name: codec + limits.least(weights * bits / 8 + 2 * remembered, 0)
        for name, bits in BITS.items()
    }
    return {name: round(1e3 * value, 1) for name, value in seconds.items()}


def verdict(report: dict[str, Any]) -> str:
    """Does this machine hold a conversation, with what."""
    model, budget = report["model"], report["frame_budget_ms"]
    times = {int(count): times for count, times in report["sessions"].items()}
    held = [count for count, t in times.items() if t["p99"] <= budget]
    name, dtype = model["source"], model["dtype"]
    one = f"{times[1]['p99']:.1f} ms of {budget:g} ms (99 of 100 frames)"
    if not held:
        said = f"This machine does not hold a conversation with {name} in {dtype}: {one}"
    else:
        many = "" if max(held) == 1 else f", and {max(held)} at once"
        said = f"This machine holds a conversation with {name} in {dtype}: {one}{many}"
    far = report["estimates"]["moshi_7b_ms"]
    near = [dtype for dtype, ms in far.items() if ms <= budget]
    told = ", ".join(f"{ms:.0f} ms in {dtype}" for dtype, ms in far.items())
    can = f"could at best be held in {' or '.join(near)}" if near else "could not be held"
    return (
        f"{said}. Moshi 7B, estimated from its bytes over the measured read rate, {can} (a frame "
        f"takes at least {told})."
    )


# ---- all of it ---------------------------------------------------------------------------------


def run(model: Model, *, frames: int, threads: int | None, shown: Callable[[str], None]) -> Any:
    """Everything, as what `--json` writes. `shown` is told what goes on."""
    shown("limits of the machine")
    limits = measure_limits(threads)
    shown("a frame")
    times = measure_frames(model, frames)
    lowest = floors(model, limits)
    sessions = measure_sessions(model, frames, lambda n: shown(f"{n} at once"))
    info, memory = model._info, model._core.memory()
    stages: dict[str, Any] = {}
    for name in STAGES:
        entry: dict[str, Any] = asdict(times[name])
        if name in lowest:
            size, seconds = info[f"{name}_bytes"], times[name].p50 / 1e3
            entry |= {"bytes": size, "flops": info.get(f"{name}_flops", 0)}
            if seconds > 0:
                entry["gb_s"] = round(size / seconds / 1e9, 2)
                entry["share_of_floor"] = round(lowest[name] / seconds, 3)
        stages[name] = entry
    here = next(device for device in devices() if device.name == "cpu")
    report: dict[str, Any] = {
        "benchmark": "moshi-c bench",
        "version": _core.__version__,
        "machine": {
            "processor": _processor(),
            "device": here.description,
            "memory": here.memory,
            "system": platform.platform(),
        },
        "limits": {"read_gb_s": limits.read_gb_s, "gflop_s": limits.gflop_s},
        "model": {
            "source": model._source,
            "dtype": model.dtype,
            "threads": info["threads"],
            "parameters": info["parameters"],
            "kv_bytes_with_context_full": memory["kv_bytes"],
        },
        "frames": frames,
        "frame_budget_ms": 1e3 / model.frame_rate,
        "frame": asdict(times["frame"]),
        "stages": stages,
        "sessions": {str(count): asdict(t) for count, t in sessions.items()},
        "estimates": {"moshi_7b_ms": estimates(limits)},
    }
    report["verdict"] = verdict(report)
    return report


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def text(report: dict[str, Any]) -> str:
    """The report as tables."""
    machine, limits, model = report["machine"], report["limits"], report["model"]
    lines = [
        f"{machine['processor']}, {machine['device']}",
        f"{model['source']}, {model['dtype']}, {model['parameters'] / 1e6:.1f} M parameters, "
        f"{model['threads']} threads",
        "",
        f"{'threads':<10}{'reads':>12}{'multiplies':>18}",
    ]
    for count, rate in limits["read_gb_s"].items():
        flops = limits["gflop_s"][count]
        lines.append(f"{count:<10}{rate:>7.1f} GB/s{flops:>11.1f} GFLOP/s")
    columns = ("median", "99 of 100", "slowest", "reads", "rate", "of the limit")
    lines += ["", f"{'a frame':<10}" + "".join(f"{name:>14}" for name in columns)]
    for name, entry in (*report["stages"].items(), ("all", report["frame"])):
        row = "".join(f"{entry[key]:>11.2f} ms" for key in ("p50", "p99", "max"))
        if "gb_s" in entry:
            row += f"{entry['bytes'] / 1e6:>11.1f} MB{entry['gb_s']:>9.1f} GB/s"
            row += f"{100 * entry['share_of_floor']:>12.0f} %"
        lines.append(f"{name:<10}{row}")
    if any(entry.get("share_of_floor", 0) > 1 for entry in report["stages"].values()):
        lines.append("more than 100 %: a cache holds these weights")
    lines += ["", f"{'sessions':<10}" + "".join(f"{name:>14}" for name in columns[:3])]
    for count, entry in report["sessions"].items():
        row = "".join(f"{entry[key]:>11.2f} ms" for key in ("p50", "p99", "max"))
        late = entry["p99"] > report["frame_budget_ms"]
        lines.append(f"{count:<10}{row}" + ("  not in real time" if late else ""))
    return "\n".join([*lines, "", report["verdict"]])


def write(report: dict[str, Any], path: Path) -> None:
    """As JSON."""
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
