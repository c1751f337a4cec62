"""Mimi at its real size, one thread: encode and decode a frame, ours and upstream's PyTorch.

Both sides stream the same sound through the same random weights, frame by frame in turn. Before the
clock runs, the timed objects encode and decode the same second of sound and must agree.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import common

os.environ["MOSHI_C_THREADS"] = "1"

import checkpoints
import numpy as np
import sound
import torch
import upstream

import moshi_c

FRAME = 1920


def main() -> None:
    parser = common.arguments(__doc__, "mimi")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as name:
        folder = checkpoints.make_mimi(Path(name), "full")
        theirs = upstream.load_mimi(folder)
        ours = moshi_c.load_mimi(
            folder / checkpoints.MIMI_NAME, config=folder / checkpoints.MIMI_CONFIG_NAME
        )
        frames = sound.minute().astype(np.float32)
        frames = frames[: frames.size // FRAME * FRAME].reshape(-1, FRAME)
        stream = ours.stream()
        theirs.streaming_forever(1)

        equal = 0
        worst = 0.0
        for frame in frames[:12]:
            want = theirs.encode(torch.from_numpy(frame)[None, None])
            got = stream.encode(frame)
            equal += bool((want[0, :, 0].numpy() == got).all())
            pcm = theirs.decode(want)[0, 0].numpy()
            worst = max(worst, float(abs(stream.decode(want[0, :, 0].numpy()) - pcm).max()))
        if equal < 11 or worst > 1e-4:
            raise SystemExit(f"the two sides differ: {equal} of 12 frames, sound by {worst:.2e}")

        def our_encode(index: int) -> None:
            stream.encode(frames[index % len(frames)])

        def their_encode(index: int) -> None:
            theirs.encode(torch.from_numpy(frames[index % len(frames)])[None, None])

        codes = np.random.default_rng(0).integers(0, 2048, (64, 8))

        def our_decode(index: int) -> None:
            stream.decode(codes[index % 64])

        def their_decode(index: int) -> None:
            theirs.decode(torch.from_numpy(codes[index % 64])[None, :, None])

        def our_both(index: int) -> None:
            our_encode(index)
            our_decode(index)

        def their_both(index: int) -> None:
            their_encode(index)
            their_decode(index)

        before = common.read_rate(1)
        result = {
            "threads": 1,
            "parity": {"equal_frames_of_12": equal, "worst_sample_difference": worst},
            "encode": common.summary(
                common.interleave({"ours": our_encode, "pytorch": their_encode}, options.blocks, 10)
            ),
            "decode": common.summary(
                common.interleave({"ours": our_decode, "pytorch": their_decode}, options.blocks, 10)
            ),
            "frame": common.summary(
                common.interleave({"ours": our_both, "pytorch": their_both}, options.blocks, 10)
            ),
            "read_rate_gb_s": [round(before, 1), round(common.read_rate(1), 1)],
        }
        common.report("mimi", options.out, result)


if __name__ == "__main__":
    main()
