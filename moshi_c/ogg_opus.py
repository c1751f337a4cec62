"""Opus in Ogg as a stream, as voice protocols send it: libopus and libogg through the core.

    writer, reader = moshi_c.OggOpusWriter(), moshi_c.OggOpusReader()
    data = writer.append(frame.pcm)      # the pages of this frame, two of 40 ms
    pcm = reader.append(data)            # float32[1920]

No model is needed. A reader or writer is used by one thread at a time.
"""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core


class OggOpusReader:
    """Samples out of the bytes of an Ogg Opus stream.

    Every packet gives all of its samples as soon as it is whole. Nothing is dropped in front: a
    frame of 80 ms would otherwise end inside a packet, and wait for the next one. Who wants a
    recording sample for sample drops the first `pre_skip` samples; the end is cut as the last page
    says.

    Damage costs the part it is in: bytes that are no whole page are skipped, what cannot be decoded
    and pages that never came (up to a second of them) are concealed. A stream that is joined in the
    middle is heard from its next packet on, streams may follow each other, stereo is mixed to one
    channel, and what is louder than full scale is clipped.
    """

    def __init__(self, rate: int = 24000, *, max_seconds: float | None = None) -> None:
        """A reader that gives samples at `rate` Hz: 8000, 12000, 16000, 24000 or 48000.

        Args:
            rate: of the samples given, whatever the stream was made from.
            max_seconds: refuse a piece of the stream that holds more sound; three bytes can hold
                120 ms. `None` is for files.

        Raises:
            AudioError: Opus does not have that rate.
        """
        self.rate = rate
        self._core = _core.OggOpusReader(rate, np.inf if max_seconds is None else max_seconds)

    def append(self, data: bytes | bytearray | memoryview) -> NDArray[np.float32]:
        """The next bytes of the stream, however cut -> float32[n], what is ready by now.

        Raises:
            AudioError: no good packet for 128 KiB or 50 packets in a row, more than two channels,
                or more than `max_seconds`. The stream is over then.
            SessionError: in use by another thread.
        """
        return self._core.append(data)

    @property
    def pre_skip(self) -> int:
        """Samples that the encoder's delay put in front of the stream; 0 before its first page."""
        return self._core.pre_skip

    @property
    def packets(self) -> int:
        """Packets decoded so far."""
        return self._core.counts["packets"]

    @property
    def lost(self) -> int:
        """Pages that never came, by the numbers of those that did."""
        return self._core.counts["lost"]

    @property
    def damaged(self) -> int:
        """Packets that could not be decoded, and stretches of bytes that were no page."""
        return self._core.counts["damaged"]


class OggOpusWriter:
    """An Ogg Opus stream out of samples: mono, packets of 40 ms, 48 kbit/s, low delay."""

    def __init__(self, rate: int = 24000, *, serial: int | None = None) -> None:
        """A writer that takes samples at `rate` Hz: 8000, 12000, 16000, 24000 or 48000.

        Args:
            rate: of the samples taken.
            serial: the number of the Ogg stream, 0 to 2**32 - 1; `None` draws one.

        Raises:
            AudioError: Opus does not have that rate.
        """
        self.rate = rate
        self._core = _core.OggOpusWriter(rate, secrets.randbits(32) if serial is None else serial)

    def append(self, pcm: Any, dtype: str | None = None) -> bytes:
        """Any number of samples, float32 or int16 as `Session.step` takes them -> the pages that
        are ready. What does not fill 40 ms waits. The first call gives the header pages before all
        else, without samples too.

        Raises:
            AudioError: another type or shape, NaN, infinity, or values far beyond -1..1.
            SessionError: after `close`, or in use by another thread.
        """
        return self._core.append(pcm, dtype)

    def close(self) -> bytes:
        """The end of the stream: what waits, filled up with silence, on a last page that says where
        the sound ends. A second call gives nothing."""
        return self._core.close()
