"""`/api/chat`: the protocol of Moshi's published servers and clients, and of PersonaPlex's.

Binary messages; the first byte is the kind. From us: 0 handshake (the byte alone), once, when the
caller has a slot; 1 a piece of one Ogg Opus stream, whose header pages come with the first sound;
2 a piece of text in UTF-8, whole characters; 5 why the call is cut short; 6 a ping when nothing
else was sent for a while. To us: 1; the other kinds of the protocol are taken and mean nothing.

Who waits for a slot gets pings that say the place in the line, as JSON behind the kind:
`{"position": 1}`. Every published client ignores what stands there. What is said before
there is a slot is decoded, so that the stream's header is not lost, and dropped: nobody listens
yet.

`events`: the events of `/ws/pcm`, such as `{"type": "overrun", "late": 3}`, come behind the kind
of a ping as well. Only for who asks: upstream's client prints a line for each ping.

`dtx`: while the model has been silent for half a second, nothing but pings is sent. LiveKit's
client takes a pause in the sound for the end of a turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from aiohttp import WSMessage, WSMsgType

from ..audio import Pcm
from ..errors import AudioError
from ..ogg_opus import OggOpusReader, OggOpusWriter
from ..session import Frame, Session
from .call import BAD_AUDIO, Ending, Ignored, Payload, Wire

HANDSHAKE, SOUND, TEXT, CONTROL, METADATA, ERROR, PING, COLORED_TEXT = range(8)

#: Bytes of Opus that are decoded at a time, and seconds of sound that they may hold: whoever sends
#: more lets others be heard in between.
_SLICE, _SLICE_SECONDS = 4096, 10.0
#: Of a frame of the model's voice that counts as silence, dBFS.
_SILENCE_LEVEL = -45.0
#: Frames of silence that are sent, half a second.
_SILENCE_FRAMES = 6


class ChatWire(Wire):
    """One caller's `/api/chat`."""

    name = "/api/chat"
    live = True

    def __init__(self, *, dtx: bool, rate: int, events: bool = False) -> None:
        self._reader = OggOpusReader(rate, max_seconds=_SLICE_SECONDS)
        self._writer = OggOpusWriter(rate)
        self._dtx, self._events = dtx, events
        self._silent = _SILENCE_FRAMES
        self._position = 0

    def hear(self, message: WSMessage) -> Iterator[Pcm | None]:
        """See Wire."""
        if message.type != WSMsgType.BINARY:
            raise Ignored("messages are binary here")
        data = message.data
        if not data:
            raise Ignored("an empty message")
        if data[0] == SOUND:
            for start in range(1, len(data), _SLICE):
                try:
                    yield self._reader.append(data[start : start + _SLICE])
                except AudioError as error:
                    raise Ending(BAD_AUDIO, "bad_audio", str(error)) from error
        elif data[0] > COLORED_TEXT:
            raise Ignored(f"there is no kind {data[0]}")

    def ready(self, session: Session) -> list[Payload]:
        """See Wire."""
        self._position = 0
        return [bytes([HANDSHAKE])]

    def waiting(self, position: int) -> list[Payload]:
        """See Wire."""
        self._position = position
        return self.keep_alive()

    def sound(self, pcm: Pcm, frame: Frame) -> tuple[list[Payload], bool]:
        """See Wire."""
        if self._dtx and self._is_silence(pcm):
            return [], False
        pages = self._writer.append(pcm)
        return ([bytes([SOUND]) + pages], True) if pages else ([], False)

    def _is_silence(self, pcm: Pcm) -> bool:
        power = float(np.dot(pcm, pcm)) / len(pcm)
        quiet = power < 10 ** (_SILENCE_LEVEL / 10)
        self._silent = self._silent + 1 if quiet else 0
        return self._silent > _SILENCE_FRAMES

    def text(self, text: str, time: float) -> list[Payload]:
        """See Wire."""
        return [bytes([TEXT]) + text.encode()]

    def event(self, event: str, **facts: Any) -> list[Payload]:
        """See Wire."""
        if not self._events:
            return []
        return [bytes([PING]) + json.dumps({"type": event, **facts}).encode()]

    def keep_alive(self) -> list[Payload]:
        """See Wire."""
        place = json.dumps({"position": self._position}).encode() if self._position else b""
        return [bytes([PING]) + place]

    def error(self, ending: Ending) -> list[Payload]:
        """See Wire."""
        return [bytes([ERROR]) + ending.reason.encode()]
