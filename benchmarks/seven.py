"""A step of the whole 7B, bf16, q8 and q4: with nothing remembered, and with the context full.

The language model has the published tensors of the 7B, filled with random numbers; codes go in and
come out, the codec has no part. The read rate is probed around every block of steps.
`share_of_floor` is the time that reading a frame's bytes (weights, and keys and values of what is
remembered) takes at that rate, over the time of the step. bf16 needs 15.4 GB on the disk and as
much memory for its map; the file is read anew, as after a start of the machine. `stage_ms` are
means. `reads_from_disk` counts what a step had to fetch from the file because the system had taken
it back: memory's pace is then not all that held it up.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import memory
import numpy as np

FORMATS = ("bf16", "q8", "q4")
STEPS = 3  # of a block


def timed(model: Any, session: Any, size: int, blocks: int) -> dict[str, Any]:
    """size: bytes that a step reads."""
    threads = model._info["threads"]
    rng = np.random.default_rng(1)
    times, shares, rates = [], [], []

    def probe() -> float:
        rates.append(common.read_rate(threads))
        return rates[-1]

    def step() -> float:
        codes = rng.integers(0, 2048, 8).astype(np.int32)
        start = time.perf_counter()
        session.step_codes(codes, decode=False)
        return time.perf_counter() - start

    for _ in range(3):
        step()
    stats = model._core.stats()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    before = probe()
    for _ in range(blocks):
        block = [step() for _ in range(STEPS)]
        after = probe()
        times += block
        shares.append(size / 1e9 / ((before + after) / 2) / float(np.median(block)))
        before = after
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults
    stages = {
        stage: 1e3 * (model._core.stats()[f"{stage}_s"] - stats[f"{stage}_s"]) / len(times)
        for stage in ("temporal", "depth")
    }
    return {
        "p50_ms": round(1e3 * float(np.median(times)), 1),
        "p99_ms": round(1e3 * float(np.percentile(times, 99)), 1),
        "stage_ms": {stage: round(ms, 1) for stage, ms in stages.items()},
        "reads_from_disk": round(faults / len(times), 1),
        "bytes": size,
        "share_of_floor": round(float(np.median(shares)), 3),
        "best_over_best_rate": round(size / 1e9 / max(rates) / min(times), 3),
        "read_rate_gb_s": [round(min(rates), 1), round(max(rates), 1)],
    }


def measure(folder: str, dtype: str, blocks: str) -> None:
    """In a process of its own; prints JSON."""
    import moshi_c

    model = moshi_c.load(folder, dtype=dtype, max_sessions=1, progress=False)
    info = model._info
    weights = info["temporal_bytes"] + info["depth_bytes"]
    remembered = model._core.memory()["kv_bytes"]
    columns = model.max_delay + 2
    session = moshi_c.Session(model, seed=1)
    found = {"empty": timed(model, session, weights, int(blocks))}
    session.reset()
    for _ in range(columns):
        session.step_codes(np.zeros(8, np.int32), decode=False)
    snapshot = session.snapshot()
    session.close()
    session = moshi_c.Session.from_snapshot(
        model, memory.with_full_context(snapshot, memory.CONTEXT)
    )
    found["full"] = timed(model, session, weights + remembered, int(blocks))
    print(json.dumps({"threads": info["threads"], **found}))
    session.close()
    model.close()


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
        return
    parser = common.arguments(__doc__, "seven")
    parser.set_defaults(blocks=5)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    options = parser.parse_args()
    result: dict[str, Any] = {"context": memory.CONTEXT}
    for dtype in options.formats:
        with tempfile.TemporaryDirectory() as name:
            file = Path(name) / "model.safetensors"
            memory.fill(file, dtype)
            memory.forget(file)
            done = subprocess.run(
                [sys.executable, __file__, "--measure", name, dtype, str(options.blocks)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(f"{dtype}: {done.stderr or done.returncode}")
            result[dtype] = json.loads(done.stdout)
    common.report("seven", options.out, result)


if __name__ == "__main__":
    main()
