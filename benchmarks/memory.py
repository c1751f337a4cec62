"""A 7B-shaped q4 folder: seconds to load, and memory of one session with its context full.

The language model has the published tensors of the 7B, its matrices as panels of random codes; the
codec is at its real size. The context is filled by restoring a snapshot that says 3000 frames were
heard, with keys and values of zeros, instead of stepping them; then the peak is set back and frames
are stepped, which read all weights, keys and values. Then `moshi-c encode` and `decode` over an
hour of sound, with the codec alone. Memory mapped from the file is counted apart from the process's
own: the system may take it back and shares it between processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np

FRAMES = 12  # stepped at full context
CONTEXT = 3000


def status_gb(*names: str) -> list[float]:
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith(" kB")}
    return [round(int(found[name]) * 1024 / 1e9, 3) for name in names]


def memory() -> dict[str, float]:
    names = ("RssAnon", "RssFile", "VmRSS", "VmHWM")
    labels = ("private_gb", "mapped_gb", "resident_gb", "peak_gb")
    return dict(zip(labels, status_gb(*names), strict=True))


def with_full_context(snapshot: bytes, frames: int) -> bytes:
    """The snapshot of a session that has heard so many frames, with keys and values of zeros."""
    import damage

    header, data = damage._split(snapshot)
    metadata = header.pop("__metadata__")
    made: dict[str, Any] = {"__metadata__": metadata}
    parts: list[bytes] = []
    at = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        part = data[begin:end]
        if name == "lm.keys_values":
            entry["shape"][3] = frames
            part = bytes(2 * int(np.prod(entry["shape"], dtype=np.int64)))
        elif name in ("lm.frames", "session.frames"):
            part = np.int64(frames).tobytes()
        elif name in ("lm.offset", "lm.position"):
            part = np.int32(frames).tobytes()
        made[name] = entry | {"data_offsets": [at, at + len(part)]}
        parts.append(part)
        at += len(part)
    return damage._join(json.dumps(made).encode(), b"".join(parts))


def measure(folder: str, codec: str) -> None:
    """In a process of its own; prints JSON."""
    import moshi_c

    start = time.perf_counter()
    model = moshi_c.load(folder, mimi=codec, max_sessions=1, progress=False)
    found: dict[str, Any] = {"load_s": round(time.perf_counter() - start, 3), "loaded": memory()}
    silence = np.zeros(1920, np.float32)
    columns = model.max_delay + 2  # of the ring of tokens, which must be where the count says
    with moshi_c.Session(model, seed=1) as session:
        for _ in range(columns):
            session.step(silence)
        snapshot = session.snapshot()
    assert CONTEXT % columns == 0
    session = moshi_c.Session.from_snapshot(model, with_full_context(snapshot, CONTEXT))
    del snapshot
    found["context_full"] = memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident from now on
    seconds = []
    for _ in range(FRAMES):
        start = time.perf_counter()
        session.step(silence)
        seconds.append(time.perf_counter() - start)
    found |= {
        "stepped": memory(),
        "frame_ms": round(1e3 * float(np.median(seconds)), 1),
        "weights_gb": round(model.memory.weights / 1e9, 3),
        "kv_gb": round(model._core.memory()["kv_bytes"] / 1e9, 3),
        "frames": session.stats.frames,
    }
    session.close()
    model.close()
    print(json.dumps(found))


def fill(path: Path, dtype: str = "q4") -> None:
    """Random weights as large as a trained model's: bf16, or panels of random codes and scales."""
    import damage
    import test_open_large

    rng = np.random.default_rng(0)
    noise = (0.015 * rng.standard_normal(1 << 22)).astype(np.float32)
    halves = (noise.view(np.uint32) >> 16).astype("<u2").tobytes()
    if dtype == "bf16":
        test_open_large.write_sparse(path, test_open_large.published_tensors())
    else:
        test_open_large.write_sparse_panels(path, dtype)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header, _ = damage._split(size.to_bytes(8, "little") + file.read(size))
    panels = max(
        (e["data_offsets"][1] for e in header.values() if e.get("dtype") == "U8"), default=0
    )
    pattern = b""
    if panels:
        most = {"q8": 0.0002, "q4": 0.004}[dtype]
        tiles = rng.integers(0, 256, (1 << 16, test_open_large.TILE_BYTES[dtype]), np.uint8)
        scales = rng.uniform(most / 2, most, (len(tiles), 32)).astype(np.float16)
        tiles[:, :64] = scales.view(np.uint8)
        pattern = tiles.tobytes()
    with path.open("r+b") as file:
        file.seek(8 + size)
        for left in range(panels, 0, -max(len(pattern), 1)):
            file.write(pattern[:left])
        for left in range(path.stat().st_size - file.tell(), 0, -len(halves)):
            file.write(halves[:left])


def forget(path: Path) -> None:
    """Has the system drop a file from its cache, as a start of the machine does: what was read from
    a disk lies in large pages, what was just written in small ones, which are slower to read."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def codec_peak(folder: Path, codec: Path, minutes: int) -> dict[str, Any]:
    """The codec's commands over a long recording: what the process holds at most."""
    import soundfile

    command = """
import json, sys
from moshi_c.cli import main
assert main(sys.argv[1:]) == 0
import memory
print(json.dumps({"peak_gb": memory.memory()["peak_gb"]}))
"""
    second = (3000 * np.random.default_rng(0).standard_normal(24000)).astype(np.int16)
    heard, codes, again = folder / "long.wav", folder / "long.mimi", folder / "again.wav"
    with soundfile.SoundFile(heard, "w", 24000, 1) as file:
        for _ in range(60 * minutes):
            file.write(second)
    found: dict[str, Any] = {"minutes": minutes}
    for name, source, target in (("encode", heard, codes), ("decode", codes, again)):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", command, name, source, target, "--model", codec.parent],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stderr)
        seconds = round(time.perf_counter() - start, 1)
        found[name] = json.loads(done.stdout) | {"seconds": seconds}
    return found


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
        return
    parser = common.arguments(__doc__, "memory")
    parser.set_defaults(blocks=2)
    parser.add_argument("--minutes", type=int, default=60, help="of the long recording")
    options = parser.parse_args()
    import checkpoints

    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        codec = checkpoints.make_mimi(folder / "mimi", "full") / checkpoints.MIMI_NAME
        long = codec_peak(folder, codec, options.minutes)
        lm = folder / "lm"
        lm.mkdir()
        fill(lm / "model.safetensors")
        for _ in range(options.blocks):
            done = subprocess.run(
                [sys.executable, __file__, "--measure", str(lm), str(codec)],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            found.append(json.loads(done.stdout))
    common.report(
        "memory",
        options.out,
        {
            "dtype": "q4",
            "context": CONTEXT,
            "load_s": [one["load_s"] for one in found],
            "peak_gb": max(one["stepped"]["peak_gb"] for one in found),
            "runs": found,
            "long_recording": long,
        },
    )


if __name__ == "__main__":
    main()
