"""`/twilio/media`: a telephone call by Twilio's Media Streams; `/twilio/answer` leads Twilio there.

A number whose calls are answered by a web page of ours (`/twilio/answer`) gets TwiML that connects
the call to `/twilio/media`, a WebSocket of JSON messages in both directions. Sound is mu-law of
8000 Hz in base64. From Twilio: "connected", "start" (the stream's id and format), "media", "mark"
(what we sent before ours of that name has been played), "dtmf", "stop". To Twilio: "media", a
frame each, and every second a "mark" that says how much was sent. When a mark comes back much later
than it should, sound waits on the way to the telephone; "clear" throws it away, so that the
conversation is in the present. Being talked over needs no message: the model hears it.

Twilio cannot send a token of ours. It signs each request with the secret of the account instead:
HMAC-SHA1 over the URL it was told, and over the fields of a form. The URL is the one that others
see, in front of whatever proxy or tunnel stands before us.
"""

from __future__ import annotations

import base64
import hmac
import json
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any
from urllib.parse import urlsplit
from xml.sax.saxutils import quoteattr

from aiohttp import WSCloseCode, WSMessage

from ..audio import Pcm
from ..session import Frame
from ..telephony import PHONE_RATE, BytesIn, BytesOut
from .call import BAD_AUDIO, Answer, Ending, Ignored, Payload, Wire
from .events import part, read_event, read_sound, shown, write_sound
from .guard import Refused

#: Samples from mark to mark; samples that may wait to be played.
_MARK_EVERY, _MOST_UNPLAYED = PHONE_RATE, PHONE_RATE
_FORMAT = {"encoding": "audio/x-mulaw", "sampleRate": PHONE_RATE, "channels": 1}
_MOST_NAME = 100
#: Where there are defaults a URL may name the port or not, and is signed as it was given.
_PORTS = {"https": 443, "wss": 443, "http": 80, "ws": 80}


def signature(secret: str, url: str, fields: Iterable[tuple[str, str]] = ()) -> str:
    """Of a request to a URL with these fields of a form, by the secret of the account."""
    text = url + "".join(name + value for name, value in sorted(set(fields)))
    digest = hmac.digest(secret.encode(), text.encode("utf-8", "replace"), "sha1")
    return base64.b64encode(digest).decode()


def check_signature(
    given: str, secret: str, url: str, fields: Iterable[tuple[str, str]] = ()
) -> None:
    """Refuses what is not signed with the secret of the account, over the URL that others see."""
    fields = list(fields)
    for spelled in _spellings(url):
        expected = signature(secret, spelled, fields)
        if hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode()):
            return
    raise Refused(
        403,
        "signature",
        f"X-Twilio-Signature is not that of {url}; expected one by the account's auth token",
    )


def _spellings(url: str) -> list[str]:
    """With and without the port that goes without saying."""
    parts = urlsplit(url)
    port = f":{_PORTS[parts.scheme]}"
    host = parts.netloc.removesuffix(port)
    return [parts._replace(netloc=netloc).geturl() for netloc in (host, host + port)]


def connect_to(url: str) -> str:
    """TwiML that connects a call to a WebSocket."""
    return _twiml(f"<Connect><Stream url={quoteattr(url)}/></Connect>")


def busy() -> str:
    """TwiML that lets a caller hear that all lines are taken."""
    return _twiml('<Reject reason="busy"/>')


def _twiml(verb: str) -> str:
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<Response>{verb}</Response>\n'


class TwilioWire(Wire):
    """One caller's `/twilio/media`."""

    name = "/twilio/media"
    live = True

    def __init__(self, *, rate: int) -> None:
        self._in = BytesIn("pcmu", PHONE_RATE, rate)
        self._out = BytesOut("pcmu", PHONE_RATE, rate)
        self._stream: str | None = None
        self._sent = self._marked = self._cleared = 0  # samples

    def hear(self, message: WSMessage) -> Iterator[Pcm | Answer | None]:
        """See Wire."""
        kind, event = read_event(message, "event")
        if kind == "start":
            self._start(event)
        elif kind == "media":
            yield from self._media(part(event, "media"))
        elif kind == "mark":
            yield partial(self._played, part(event, "mark").get("name"))
        elif kind == "stop":
            raise Ending(WSCloseCode.OK, "hung_up", "the caller hung up")
        elif kind not in ("connected", "dtmf"):
            raise Ignored(f"there is no event {kind[:40]!r}")

    def _start(self, event: dict[str, Any]) -> None:
        if self._stream is not None:
            raise Ignored("the stream has started before")
        start = part(event, "start")
        stream = start.get("streamSid")
        if not isinstance(stream, str) or len(stream) > _MOST_NAME:
            raise Ignored('"start" has no "streamSid"')
        form = part(start, "mediaFormat")
        for name, expected in _FORMAT.items():
            if form.get(name, expected) != expected:
                raise Ending(
                    BAD_AUDIO,
                    "bad_audio",
                    f"{name} of the stream is {shown(form[name])}; expected {expected}",
                )
        self._stream = stream

    def _media(self, media: dict[str, Any]) -> Iterator[Pcm]:
        if self._stream is None:
            raise Ignored('"media" before "start"')
        if media.get("track", "inbound") != "inbound":
            return  # what we said
        yield from self._in.add_by_seconds(read_sound(media.get("payload")))

    def _played(self, name: Any) -> list[Payload]:
        """A mark has come back: all that was sent before it has been played, or cleared."""
        if not isinstance(name, str) or not name.isdecimal() or len(name) > 15:
            return []
        if int(name) <= self._cleared or self._sent - int(name) <= _MOST_UNPLAYED:
            return []
        self._cleared = self._sent
        return [self._event("clear")]

    def _event(self, event: str, **facts: Any) -> str:
        return json.dumps({"event": event, "streamSid": self._stream, **facts})

    def sound(self, pcm: Pcm, frame: Frame) -> tuple[list[Payload], bool]:
        """See Wire."""
        data = self._out.add(pcm)
        if not data:
            return [], False
        self._sent += len(data)
        said: list[Payload] = [self._event("media", media={"payload": write_sound(data)})]
        if self._sent - self._marked >= _MARK_EVERY:
            self._marked = self._sent
            said.append(self._event("mark", mark={"name": str(self._sent)}))
        return said, True

    def error(self, ending: Ending) -> list[Payload]:
        """Nothing: Twilio knows no such message; the close frame has the reason."""
        return []
