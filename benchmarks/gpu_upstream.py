"""Ours and upstream's on one card, in turn: gpu_upstream.py FOLDER RESULTS.

The same weights and eight depth steps, from samples to samples, rings full. Upstream is the `moshi`
package as it is installed, with its own CUDA graphs; its attention reads the whole ring whatever
was said, so that its ring need not be filled. Ours is the program that GPU names, a process beside
it. 64 sessions of both don't fit on one card: there ours are timed before upstream's and after.
Each part that was measured is a line of RESULTS; one that fails says why, and the others follow.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BLOCKS, FRAMES, WARM = 6, 50, 20
ROOT = Path(__file__).resolve().parent.parent
Timed = Callable[[], float]


class Ours:
    """A process that times some rounds of one thing whenever it is asked to."""

    def __init__(self, folder: Path, what: str, n: int) -> None:
        program = os.environ.get("GPU", str(ROOT / "build/gpu/gpu"))
        self.process = subprocess.Popen(
            [program, str(folder), "follow", what, str(n)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self.read()

    def read(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"our side ended with status {self.process.wait(60)}")
        return line

    def median(self) -> float:
        assert self.process.stdin
        self.process.stdin.write("\n")
        return float(self.read())

    def close(self) -> None:
        self.process.communicate(timeout=60)


def milliseconds(work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)


def record(path: Path, name: str, mine: list[float], theirs: list[float]) -> None:
    ratios = [b / a for a, b in zip(mine, theirs, strict=False)]
    found = {
        "name": f"upstream {name}",
        "ours_ms": statistics.median(mine),
        "upstream_ms": statistics.median(theirs),
        "ratio": statistics.median(theirs) / statistics.median(mine),
        "ratio_range": [min(ratios), max(ratios)],
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
    }
    with path.open("a") as file:
        file.write(json.dumps(found) + "\n")
    print(json.dumps(found))


def in_turn(ours: Ours, theirs: Timed) -> tuple[list[float], list[float]]:
    mine, peer = [], []
    for _ in range(WARM):
        theirs()
    for _ in range(BLOCKS):
        mine.append(ours.median())
        peer.append(statistics.median(theirs() for _ in range(FRAMES)))
    return mine, peer


def frame_of(mimi: Any, peer: Any, n: int) -> Timed:
    """A frame of n sessions, from samples on the host to samples on the host."""

    def work() -> None:
        tokens = peer.step(mimi.encode(sound.cuda()))
        if tokens is not None:
            mimi.decode(tokens[:, 1:]).cpu()

    sound = 0.1 * torch.randn(n, 1, 1920)
    return lambda: milliseconds(work)


def depth_of(peer: Any) -> Timed:
    state = peer._streaming_state
    text = torch.full((1,), 3, device="cuda")
    z = torch.randn(1, 1, peer.lm_model.dim, device="cuda", dtype=torch.bfloat16)
    return lambda: milliseconds(lambda: state.graphed_depth(text, z))


def codec_of(mimi: Any, n: int) -> Timed:
    def work() -> None:
        mimi.decode(mimi.encode(sound.cuda())).cpu()

    sound = 0.1 * torch.randn(n, 1, 1920)
    return lambda: milliseconds(work)


def compiler_works() -> bool:
    """What upstream's package asks of PyTorch when it is imported needs a C compiler and Triton."""
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.ones(8, device="cuda"))
    except Exception as error:
        print(f"upstream runs without torch.compile: {type(error).__name__}")
        return False
    return True


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    if not torch.cuda.is_available():
        sys.exit(f"PyTorch {torch.__version__} finds no card here")
    if not compiler_works():
        os.environ["NO_TORCH_COMPILE"] = "1"
    from moshi.models import LMGen, loaders

    torch.manual_seed(0)
    mimi = loaders.get_mimi(
        folder / "tokenizer-e351c8d8-checkpoint125.safetensors", device="cuda", num_codebooks=8
    )
    lm = loaders.get_moshi_lm(folder / "model.safetensors", device="cuda", dtype=torch.bfloat16)

    def generator() -> Any:
        return LMGen(lm, temp=0.8, temp_text=0.7)

    def beside(name: str, what: str, n: int, make: Callable[[], Timed]) -> None:
        ours = Ours(folder, what, n)
        try:
            record(out, name, *in_turn(ours, make()))
        finally:
            ours.close()

    def one_session() -> None:
        peer = generator()
        with mimi.streaming(1), peer.streaming(1):
            frame = frame_of(mimi, peer, 1)
            beside("frame", "frame", 1, lambda: frame)
            beside("depth", "depth", 1, lambda: depth_of(peer))

    def codec(n: int) -> None:
        with mimi.streaming(n):
            beside(f"codec {n}", "codec", n, lambda: codec_of(mimi, n))

    def many(n: int) -> None:
        mine = []
        ours = Ours(folder, "frame", n)
        mine.append(ours.median())
        ours.close()
        peer = generator()
        with mimi.streaming(n), peer.streaming(n):
            frame = frame_of(mimi, peer, n)
            for _ in range(WARM):
                frame()
            theirs = [statistics.median(frame() for _ in range(20)) for _ in range(2)]
        del peer, frame
        torch.cuda.empty_cache()
        ours = Ours(folder, "frame", n)
        mine.append(ours.median())
        ours.close()
        record(out, f"{n} sessions", mine, theirs)

    failed = 0
    parts: list[Callable[[], None]] = [
        one_session,
        lambda: codec(1),
        lambda: codec(64),
        lambda: many(64),
    ]
    with torch.no_grad():
        for part in parts:
            try:
                part()
            except Exception as error:  # the other parts are to be measured all the same
                failed += 1
                print(f"upstream: {type(error).__name__}: {error}".splitlines()[0])
            torch.cuda.empty_cache()
    sys.exit(failed != 0)


if __name__ == "__main__":
    main()
