"""Our frame and upstream's on one card, in turn: gpu_upstream.py FOLDER OUT.json.

The same weights and eight depth steps, from samples to samples, rings full. Upstream is the `moshi`
package as it is installed, with its own CUDA graphs; its attention reads the whole ring whatever
was said, so that its ring need not be filled. Ours is build/gpu/gpu, a process beside it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from moshi.models import LMGen, loaders

BLOCKS, FRAMES = 10, 50


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    ours = subprocess.Popen(
        [str(Path(__file__).parent.parent / "build/gpu/gpu"), str(folder), "follow"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert ours.stdin
    assert ours.stdout
    mimi = loaders.get_mimi(
        folder / "tokenizer-e351c8d8-checkpoint125.safetensors", device="cuda", num_codebooks=8
    )
    lm = loaders.get_moshi_lm(folder / "model.safetensors", device="cuda", dtype=torch.bfloat16)
    peer = LMGen(lm, temp=0.8, temp_text=0.7)
    torch.manual_seed(0)

    def frame() -> float:
        sound = 0.1 * torch.randn(1, 1, 1920)
        began = time.perf_counter()
        codes = mimi.encode(sound.cuda())
        tokens = peer.step(codes)
        if tokens is not None:
            mimi.decode(tokens[:, 1:]).cpu()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - began)

    mine, theirs = [], []
    with torch.no_grad(), mimi.streaming(1), peer.streaming(1):
        for _ in range(20):
            frame()
        for _ in range(BLOCKS):
            ours.stdin.write("\n")
            mine.append(float(ours.stdout.readline()))
            theirs.append(statistics.median(frame() for _ in range(FRAMES)))
    ours.stdin.close()
    ours.wait(60)
    ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
    found = {
        "ours_ms": statistics.median(mine),
        "upstream_ms": statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
    }
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
