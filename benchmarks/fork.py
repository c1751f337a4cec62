"""Forking and snapshots of a 7B-shaped session that has 1,000 frames behind it.

The language model is a sparse file with the published tensors of the 7B and holes for data, the
codec is at its real size. The 1,000 frames are written into a snapshot of a fresh session, with
random keys and values. Then origin and fork step the same frame and must give the same.
"""

from __future__ import annotations

import json
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np

FRAMES = 1000


def long_call(data: bytes, frames: int) -> bytes:
    """A snapshot of a session that has not stepped yet, as if it had stepped `frames` times."""
    size = struct.unpack("<Q", data[:8])[0]
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    body = data[8 + size :]
    rng = np.random.default_rng(0)
    steps = 2 * (frames - 1)  # of the codec, which is cleared after the first frame
    parts: list[bytes] = []
    at = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        part = body[first:last]
        if name in ("lm.frames", "session.frames"):
            part = np.array([frames], "<i8").tobytes()
        elif name in ("lm.offset", "lm.position"):
            part = np.array([frames], "<i4").tobytes()
        elif name == "lm.delay.tokens":
            part = bytes(len(part))
        elif name.startswith("mimi.") and name.endswith(".steps"):
            part = np.array([steps], "<i8").tobytes()
        elif name.startswith("mimi.") and name.endswith(".position"):
            part = np.array([steps], "<i4").tobytes()
        elif name.endswith(".keys_values"):
            entry["shape"][3] = frames if name.startswith("lm.") else min(steps, 251)
            values = rng.standard_normal(entry["shape"], np.float32)
            # A bfloat16 is the upper half of a float32.
            bits = values.view(np.uint32)
            part = (
                (bits >> 16).astype("<u2").tobytes()
                if entry["dtype"] == "BF16"
                else values.tobytes()
            )
        entry["data_offsets"] = [at, at + len(part)]
        at += len(part)
        parts.append(part)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


def main() -> None:
    parser = common.arguments(__doc__, "fork")
    options = parser.parse_args()
    import checkpoints
    import test_open_large

    import moshi_c

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        codec = checkpoints.make_mimi(folder / "mimi", "full") / checkpoints.MIMI_NAME
        lm = folder / "lm"
        lm.mkdir()
        test_open_large.write_sparse(lm / "model.safetensors", test_open_large.published_tensors())
        model = moshi_c.load(lm, mimi=codec, max_sessions=2, progress=False)
        with moshi_c.Session(model, seed=1, text_temperature=0, audio_temperature=0) as fresh:
            data = long_call(fresh.snapshot(), FRAMES)
        start = time.perf_counter()
        session = moshi_c.Session.from_snapshot(model, data)
        restore_s = time.perf_counter() - start
        start = time.perf_counter()
        again = session.snapshot()
        snapshot_s = time.perf_counter() - start
        assert again == data
        del again, data
        used = model._core.memory()["session_used_bytes"]
        forks, grown = [], 0
        for _ in range(options.blocks * 5):
            start = time.perf_counter()
            fork = session.fork()
            forks.append(1e3 * (time.perf_counter() - start))
            grown = max(grown, model._core.memory()["session_used_bytes"] - used)
            fork.close()
        fork = session.fork()
        frame = (0.1 * np.sin(np.arange(1920) / 9)).astype(np.float32)
        mine, other = session.step(frame), fork.step(frame)
        assert mine.pcm is not None and np.array_equal(mine.pcm, other.pcm)
        common.report(
            "fork",
            options.out,
            {
                "frames": FRAMES,
                "keys_and_values_mb": round(used / 2**20, 1),
                "copied_by_a_fork_mb": round(grown / 2**20, 1),
                "forks": len(forks),
                "fork_ms": {
                    "median": round(float(np.median(forks)), 3),
                    "greatest": round(max(forks), 3),
                },
                "snapshot_s": round(snapshot_s, 3),
                "restore_s": round(restore_s, 3),
            },
        )
        for one in (session, fork):
            one.close()
        model.close()


if __name__ == "__main__":
    main()
