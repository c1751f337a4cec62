"""mimi-tiny by its numbers and files, and moshi_c's codec to use it with.

The language-model stage hears through moshi_c, frame by frame as in a call. It gives upstream's
streaming codes at twice the speed of the same network in PyTorch. Streaming matters: once the ring
of its attention is full, the codes differ from those of a whole signal.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FRAME_SAMPLES = 1920  # 80 ms at 24 kHz
CODEBOOKS = 8
WEIGHTS, CONFIG = "mimi-tiny.safetensors", "mimi_config.json"
CODEC_FOLDER = Path(__file__).parent / "codec"

Codes = NDArray[np.int16]
Pcm = NDArray[np.float32]


class StreamingCodec:
    def __init__(self, folder: Path = CODEC_FOLDER, threads: int = 1) -> None:
        import moshi_c  # only this needs it, and not the codec's own training

        self._mimi = moshi_c.load_mimi(
            folder / WEIGHTS, config=folder / CONFIG, codebooks=CODEBOOKS, threads=threads
        )

    def encode(self, pcm: Pcm) -> Codes:
        """[B, T * 1920] to [B, 8, T], every row from the state of a new call."""
        frames = pcm.reshape(len(pcm), -1, FRAME_SAMPLES)
        codes = np.empty((len(pcm), CODEBOOKS, frames.shape[1]), np.int16)
        with self._mimi.stream(len(pcm)) as stream:
            for time in range(frames.shape[1]):
                codes[:, :, time] = stream.encode(np.ascontiguousarray(frames[:, time]))
        return codes

    def decode(self, codes: Codes) -> Pcm:
        """[B, 8, T] to [B, T * 1920]."""
        with self._mimi.stream(len(codes)) as stream:
            frames = [
                stream.decode(np.ascontiguousarray(codes[:, :, time], np.int32))
                for time in range(codes.shape[2])
            ]
        return np.concatenate(frames, axis=1)

    def through(self, pcm: Pcm) -> Pcm:
        """One signal encoded and decoded, frame by frame."""
        return self.decode(self.encode(pcm[None]))[0]

    @property
    def bits_per_second(self) -> int:
        mimi = self._mimi
        return round(mimi.codebooks * math.log2(mimi.codebook_size) * mimi.frame_rate)

    def silence(self) -> Codes:
        """The codes [8] of lasting digital silence, which the model's own stream rests on."""
        codes = self.encode(np.zeros((1, 120 * FRAME_SAMPLES), np.float32))[0]
        if not (codes[:, 60:] == codes[:, -1:]).all():
            raise RuntimeError("the codec has no steady code for silence")
        return np.ascontiguousarray(codes[:, -1])
