"""Sound as protocols carry it: 16-bit samples or G.711, at any rate, in pieces of any length.

G.711 is what telephones speak, 8000 Hz and one byte a sample: mu-law ("pcmu") in North America and
Japan, A-law ("pcma") elsewhere. A byte is a sign, a segment of 3 bits and a step of 4 bits within
it; each segment's steps are twice as wide as those of the one below. A sample is sent as the
nearest of the values that a byte can stand for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .audio import Pcm, StreamResampler, to_int16

#: "s16" is little endian.
Encoding = Literal["s16", "pcmu", "pcma"]

#: Of G.711, Hz.
PHONE_RATE = 8000


class BytesIn:
    """What comes, as samples at the rate of the model. A sample may be cut in two."""

    def __init__(self, encoding: Encoding, rate: int, model_rate: int) -> None:
        self.encoding: Encoding = encoding
        self.rate = rate
        self._resampler = StreamResampler(rate, model_rate)
        self._cut = b""  # the first byte of a sample

    def add(self, data: bytes) -> Pcm:
        """The samples that are whole by now; a filter that changes the rate holds some back."""
        data = self._cut + data
        whole = len(data) - len(data) % sample_bytes(self.encoding)
        self._cut = data[whole:]
        return self._resampler.process(decode(data[:whole], self.encoding))

    def add_by_seconds(self, data: bytes) -> Iterator[Pcm]:
        """As `add`, a second of it at a time, so that others get a turn in between."""
        second = self.rate * sample_bytes(self.encoding)
        for start in range(0, len(data), second):
            yield self.add(data[start : start + second])

    def flush(self) -> Pcm:
        """The rest, at the end of the sound."""
        self._cut = b""
        return self._resampler.flush()


class BytesOut:
    """Samples at the rate of the model, as what is sent."""

    def __init__(self, encoding: Encoding, rate: int, model_rate: int) -> None:
        self._encoding: Encoding = encoding
        self._resampler = StreamResampler(model_rate, rate)

    def add(self, pcm: Pcm) -> bytes:
        """What is ready by now, maybe nothing."""
        return encode(self._resampler.process(pcm), self._encoding)

    def flush(self) -> bytes:
        """The rest, at the end of the sound."""
        return encode(self._resampler.flush(), self._encoding)


def sample_bytes(encoding: Encoding) -> int:
    """How many a sample takes."""
    return 2 if encoding == "s16" else 1


def decode(data: bytes, encoding: Encoding) -> Pcm:
    """Bytes of whole samples as float32."""
    samples: NDArray[np.int16]
    if encoding == "s16":
        samples = np.frombuffer(data, "<i2")
    else:
        samples = _values(encoding)[np.frombuffer(data, np.uint8)]
    pcm: Pcm = samples / np.float32(32768)
    return pcm


def encode(pcm: Pcm, encoding: Encoding) -> bytes:
    """Samples as bytes; what is louder than full scale is clipped."""
    samples = to_int16(pcm)
    if encoding == "s16":
        return bytes(samples.astype("<i2", copy=False))
    return bytes(_nearest(encoding)[samples.astype(np.int32) + 32768])


@functools.cache
def _values(encoding: Encoding) -> NDArray[np.int16]:
    """What each of the 256 bytes stands for, on the scale of 16 bits."""
    code = np.arange(256)
    if encoding == "pcmu":  # all bits are sent inverted
        code = ~code & 0xFF
        size = (((code & 15) << 3) + 132 << (code >> 4 & 7)) - 132
        negative = code & 0x80 != 0
    else:  # every other bit is; the lowest two segments have steps of one width
        code = code ^ 0x55
        segment = code >> 4 & 7
        step = (code & 15) << 4
        size = np.where(segment == 0, step + 8, step + 264 << np.maximum(segment - 1, 0))
        negative = code & 0x80 == 0
    return np.where(negative, -size, size).astype(np.int16)


@functools.cache
def _nearest(encoding: Encoding) -> NDArray[np.uint8]:
    """The byte for each of the 65536 samples."""
    values, codes = _values(encoding).astype(np.int32), np.arange(256)
    if encoding == "pcmu":  # has two bytes for 0; the positive one is sent
        values, codes = np.delete(values, 0x7F), np.delete(codes, 0x7F)
    order = np.argsort(values)
    values, codes = values[order], codes[order]
    between = (values[1:] + values[:-1]) / 2
    # "right": A-law has no 0, and silence is its smallest positive value
    return codes[np.searchsorted(between, np.arange(-32768, 32768), "right")].astype(np.uint8)
