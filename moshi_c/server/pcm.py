"""`/ws/pcm`: samples both ways in binary messages, JSON in text messages.

`?format=f32|s16` (little endian), `?rate=24000` for both directions, `?seed=` and the sampling
options. Messages have any length; a sample may be cut in two. Ours are one frame each. `?live=0` is
a file: no clock, as fast as it goes, read no faster than it is stepped; what comes back is what
`Session.run` gives, bit for bit. So it is with `live=1` for who sends in real time.

From the client, JSON: `{"type": "end"}` ends the input; the partial frame and the answer to the
last ones follow, then `{"type": "end"}` and the close.

To the client, JSON with a "type": "waiting" (position), "ready" (sample_rate, frame_size, format,
seed), "text" (text, time), "lagging" (dropped: frames of input so far), "overrun" (late: answers so
far that went out more than 80 ms after their frame had come; every 2 s at most), "end", "error"
(reason), and the events of a Frame by their own names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from aiohttp import WSMessage, WSMsgType

from ..audio import MAX_SAMPLE, Pcm, StreamResampler
from ..session import Frame, Session
from ..telephony import decode, encode
from .call import Ending, Ignored, Payload, Wire
from .events import read_event, shown

FORMATS: dict[str, np.dtype[Any]] = {"f32": np.dtype("<f4"), "s16": np.dtype("<i2")}


class PcmWire(Wire):
    """One caller's `/ws/pcm`."""

    name = "/ws/pcm"

    def __init__(self, *, format: str, rate: int, model_rate: int, live: bool) -> None:
        self.live = live
        self._format, self._rate = format, rate
        self._dtype = FORMATS[format]
        self._in = StreamResampler(rate, model_rate)
        self._out = StreamResampler(model_rate, rate)
        self._cut = b""  # the first bytes of a sample

    def hear(self, message: WSMessage) -> Iterator[Pcm | None]:
        """See Wire."""
        if message.type == WSMsgType.BINARY:
            data = self._cut + message.data
            whole = len(data) - len(data) % self._dtype.itemsize
            self._cut = data[whole:]
            second = self._rate * self._dtype.itemsize  # at a time: others get a turn in between
            for start in range(0, whole, second):
                piece = data[start : min(start + second, whole)]
                if self._format == "s16":
                    pcm = decode(piece, "s16")
                else:
                    pcm = np.frombuffer(piece, self._dtype).astype(np.float32, copy=False)
                yield self._resampled(pcm)
            return
        kind, _ = read_event(message, "type")
        if kind != "end":
            raise Ignored(f"the type {shown(kind)} is not known here")
        yield self._in.flush()
        yield None

    def _resampled(self, samples: Pcm) -> Pcm:
        if self._in.rate_in == self._in.rate_out:
            return samples
        # a filter would spread what is not finite
        good = np.where(np.isfinite(samples), samples, np.float32(0))
        return self._in.process(np.clip(good, -MAX_SAMPLE, MAX_SAMPLE))

    def ready(self, session: Session) -> list[Payload]:
        """See Wire."""
        size = session.model.frame_size * self._rate // session.model.sample_rate
        return self.event(
            "ready",
            sample_rate=self._rate,
            frame_size=size,
            format=self._format,
            seed=session.seed,
        )

    def waiting(self, position: int) -> list[Payload]:
        """See Wire."""
        return self.event("waiting", position=position)

    def sound(self, pcm: Pcm, frame: Frame) -> tuple[list[Payload], bool]:
        """See Wire."""
        said = self._bytes(self._out.process(pcm))
        return said, bool(said)

    def _bytes(self, pcm: Pcm) -> list[Payload]:
        if not len(pcm):
            return []
        if self._format == "s16":
            return [encode(pcm, "s16")]
        return [pcm.astype(self._dtype, copy=False).tobytes()]

    def text(self, text: str, time: float) -> list[Payload]:
        """See Wire."""
        return self.event("text", text=text, time=round(time, 3))

    def event(self, event: str, **facts: Any) -> list[Payload]:
        """See Wire."""
        return [json.dumps({"type": event, **facts})]

    def finish(self) -> list[Payload]:
        """See Wire."""
        return [*self._bytes(self._out.flush()), *self.event("end")]

    def error(self, ending: Ending) -> list[Payload]:
        """See Wire."""
        return self.event("error", reason=ending.reason)
