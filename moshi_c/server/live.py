"""`/v1/live/sessions`: OpenAI's Live protocol, full duplex, JSON in text messages.

Written after the clients that speak it: Pipecat's OpenAILiveLLMService, LiveKit's GPTLiveModel and
the openai package (`openai.types.live`). The caller sends `session.start` once and hears
`session.started` when there is a slot; from then on sound goes both ways without a pause, base64 in
`session.input_audio.append` and `session.output_audio.delta`: 16 bits at 24 or 16 kHz, or G.711.
What the model says comes as `session.output_transcript.delta`, with its time by the frame clock.
While it is silent its sound is zeros to the last bit, by which clients tell the turns apart.

`session.commentary.append` is said word for word. What the protocol has and Moshi has not is
answered with an `error` event that names it, and the call goes on: instructions, voices, text it
should read, delegation, functions, recordings. Of a caller's own speech there is no transcript.

An `error` event has a "code": "invalid_json", "unknown_event", "missing_parameter",
"invalid_value", "not_started", "already_started" for what the caller got wrong, of which a call
survives a hundred; "unsupported"; and when the call is cut short the word under which the metrics
count it. A place in the line and other news are `info` events.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import WSCloseCode, WSMessage

from ..audio import Pcm
from ..model import Model
from ..say import spoken_tokens
from ..session import Frame, Session
from ..telephony import PHONE_RATE, BytesIn, BytesOut, Encoding
from .call import Ending, Heard, Ignored, Payload, Wire, Words
from .events import part, read_event, read_sound, shown, write_sound

#: What each format of the protocol is, and the rates that it may have; the first is the usual one.
_FORMATS: dict[str, tuple[Encoding, tuple[int, ...]]] = {
    "audio/pcm": ("s16", (24000, 16000)),
    "audio/pcmu": ("pcmu", (PHONE_RATE,)),
    "audio/pcma": ("pcma", (PHONE_RATE,)),
}
#: The name of "no voice in particular", which clients send unasked.
_ANY_VOICE = "marin"
#: Characters of text in one event; the protocol says 500 tokens.
_MOST_TEXT = 2000
#: Frames of text that may wait to be said, five minutes.
_MOST_WORDS = 3750
#: Frames between reports of usage, 4 s.
_USAGE_FRAMES = 50
#: `expires_at` of a call without a limit, seconds from now: a year.
_NEVER = 365 * 86400.0

#: Commands that exist, but not for a model that neither reads, delegates nor calls functions.
_UNSUPPORTED = {
    "session.instructions.append": "this model takes no instructions",
    "session.thinking.append": "this model cannot be told anything but by sound",
    "session.output_audio.fixture.play": "this server plays no recordings",
    "response.item.create": "this model delegates nothing",
    "response.create": "this model delegates nothing",
    "decision.create": "this model delegates nothing",
    "decision.item.create": "this model delegates nothing",
    "decision.item.delete": "this model delegates nothing",
}

Event = dict[str, Any]


class LiveWire(Wire):
    """One caller's `/v1/live/sessions`."""

    name = "/v1/live/sessions"
    live = True

    def __init__(self, model: Model, max_seconds: float) -> None:
        self._model = model
        self._expires_after = max_seconds or _NEVER
        self._events = 0
        self._frames = 0  # stepped so far
        self._muted = False
        self._expires_at: int | None = None  # None before there is a slot
        self._refused: list[tuple[str, str]] = []  # parts of session.start: name, why
        self._start: Event | None = None  # of the caller's session.start, what answers need
        self._session: Event | None = None  # as started: what the caller is told of it
        self._words_until = 0  # the frame by which all has been said

    # ---- in ------------------------------------------------------------------------------------

    def hear(self, message: WSMessage) -> Iterator[Heard]:
        """See Wire."""
        event = self._event(message)
        kind = event["type"]
        if kind == "session.start":
            yield self._take_start(event)
        elif kind == "session.close":
            if self._session is None:
                raise Ending(WSCloseCode.OK, "hung_up", "the caller closed the session")
            yield None
        elif self._start is None:
            raise self._wrong(event, "not_started", "type", f"{kind} came before session.start")
        elif kind == "session.input_audio.append":
            data = self._audio(event)
            if self._session is not None:
                for pcm in self._in.add_by_seconds(data):
                    yield np.zeros_like(pcm) if self._muted else pcm
        elif self._session is None:
            raise self._wrong(event, "not_started", "type", f"{kind} came before session.started")
        elif kind == "session.commentary.append":
            yield from self._commentary(event)
        elif kind in ("session.input_audio.mute", "session.input_audio.unmute"):
            self._muted = kind.endswith(".mute")
            yield self._made(f"{kind}d", client=event)
        elif kind == "session.update":
            yield self._update(event)
        else:
            yield self._error("unsupported", _UNSUPPORTED[kind], "type", event)

    def _event(self, message: WSMessage) -> Event:
        """A message as an event that is known.

        Raises:
            Ignored: it is none.
        """
        try:
            kind, event = read_event(message, "type")
        except Ignored as error:
            raise self._wrong({}, "invalid_json", None, str(error)) from None
        if kind not in _KNOWN:
            what = f"there is no event {shown(kind)}"
            raise self._wrong(event, "unknown_event", "type", what)
        return event

    def _audio(self, event: Event) -> bytes:
        text = self._text(event, "audio")
        try:
            return read_sound(text)
        except Ignored as error:
            raise self._wrong(event, "invalid_value", "audio", str(error)) from None

    def _text(self, event: Event, name: str) -> str:
        text = event.get(name)
        if not isinstance(text, str):
            raise self._wrong(event, "missing_parameter", name, f"{name} is not there as a string")
        return text

    # ---- commands ------------------------------------------------------------------------------

    def _take_start(self, event: Event) -> list[Payload]:
        if self._start is not None:
            raise self._wrong(event, "already_started", "type", "the session has been started")
        session = event.get("session")
        if not isinstance(session, dict):
            raise self._wrong(event, "missing_parameter", "session", "session is not an object")
        if not isinstance(session.get("model"), str):
            name = "session.model"
            raise self._wrong(event, "missing_parameter", name, f"{name} is not a string")
        kind, rate = self._format(event, session)
        encoding = _FORMATS[kind][0]
        self._in = BytesIn(encoding, rate, self._model.sample_rate)
        self._out = BytesOut(encoding, rate, self._model.sample_rate)
        self._about = {
            "id": f"sess_{secrets.token_hex(12)}",
            "status": "active",
            "model": Path(self._model._source).name,
            "audio": {"format": {"type": kind, "rate": rate}},
        }
        self._refused = list(_not_ours(session))
        self._start = {"event_id": _number(event).get("client_event_id")}
        return self._started() if self._expires_at is not None else []

    def _format(self, event: Event, session: Event) -> tuple[str, int]:
        name = "session.audio.format"
        wanted = part(part(session, "audio"), "format")
        kind = wanted.get("type", "audio/pcm")
        if not isinstance(kind, str) or kind not in _FORMATS:
            what = f"{name} is {shown(kind)}; expected {', '.join(_FORMATS)}"
            raise self._wrong(event, "invalid_value", name, what)
        rates = _FORMATS[kind][1]
        rate = wanted.get("rate", rates[0])
        if type(rate) is not int or rate not in rates:
            expected = " or ".join(map(str, rates))
            what = f"the rate of {kind} is {shown(rate)}; expected {expected}"
            raise self._wrong(event, "invalid_value", f"{name}.rate", what)
        return kind, rate

    def _started(self) -> list[Payload]:
        """The caller has asked for a session, and there is a slot."""
        assert self._start is not None
        self._session = {**self._about, "expires_at": self._expires_at}
        made = self._made("session.started", client=self._start, session=self._session)
        for name, why in self._refused:
            made += self._error("unsupported", why, name, self._start)
        return made

    def _commentary(self, event: Event) -> Iterator[Words | list[Payload]]:
        text = self._text(event, "content")
        if len(text) > _MOST_TEXT:
            what = f"content has {len(text)} characters; expected {_MOST_TEXT} at most"
            raise self._wrong(event, "invalid_value", "content", what)
        if event.get("delegation_id") is not None:
            name = "delegation_id"
            raise self._wrong(event, "invalid_value", name, "nothing has been delegated")
        tokenizer = self._model.tokenizer
        if tokenizer is None:
            raise self._wrong(event, "unsupported", "content", "this model has no tokenizer")
        try:
            tokens = spoken_tokens(tokenizer, text, self._model.frame_rate)
        except ValueError as error:
            raise self._wrong(event, "invalid_value", "content", str(error)) from error
        begin = max(self._frames, self._words_until)
        end = begin + len(tokens)
        if end - self._frames > _MOST_WORDS:
            what = "too much waits to be said already; expected five minutes of speech at most"
            raise self._wrong(event, "invalid_value", "content", what)
        self._words_until = end
        yield Words(tokens)
        yield self._made(
            "session.commentary.appended",
            client=event,
            start_ms=self._ms(begin),
            end_ms=self._ms(end),
        )

    def _update(self, event: Event) -> list[Payload]:
        refused = list(_not_ours(part(event, "session")))
        if not refused:
            return self._made("session.updated", client=event, session=self._session)
        return [p for name, why in refused for p in self._error("unsupported", why, name, event)]

    # ---- out -----------------------------------------------------------------------------------

    def ready(self, session: Session) -> list[Payload]:
        """See Wire."""
        self._expires_at = int(time.time() + self._expires_after)
        return self._started() if self._start is not None else []

    def waiting(self, position: int) -> list[Payload]:
        """See Wire."""
        return self.event("waiting", position=position)

    def sound(self, pcm: Pcm, frame: Frame) -> tuple[list[Payload], bool]:
        """See Wire."""
        self._frames = frame.index + 1
        made = self._delta(self._out.add(pcm if frame.speaking else np.zeros_like(pcm)))
        sounds = bool(made)
        if self._frames % _USAGE_FRAMES == 0:
            used = min(1.0, self._frames / self._model._info["context"])
            made += self._made(
                "session.usage.updated",
                usage=self._usage(),
                context_window={"usage_ratio": round(used, 4)},
            )
        return made, sounds

    def _delta(self, data: bytes) -> list[Payload]:
        if not data:
            return []
        return [json.dumps({"type": "session.output_audio.delta", "delta": write_sound(data)})]

    def text(self, text: str, time: float) -> list[Payload]:
        """See Wire."""
        frame = round(time * self._model.frame_rate)
        return self._made(
            "session.output_transcript.delta",
            delta=text,
            start_ms=self._ms(frame),
            end_ms=self._ms(frame + 1),
        )

    def event(self, event: str, **facts: Any) -> list[Payload]:
        """See Wire."""
        message = ", ".join([event, *(f"{name} {value}" for name, value in facts.items())])
        return self._made("info", code=event, message=message)

    def finish(self) -> list[Payload]:
        """See Wire."""
        return [*self._delta(self._out.flush()), *self._closed("close_requested")]

    def error(self, ending: Ending) -> list[Payload]:
        """See Wire."""
        if ending.label == "time_limit" and self._session is not None:
            return self._closed("expired")
        return self._error(ending.label, ending.reason, None, {}, kind="server_error")

    def _closed(self, reason: str) -> list[Payload]:
        return self._made(
            "session.closed", reason=reason, session=self._session, usage=self._usage()
        )

    def _usage(self) -> Event:
        return {"seconds": self._ms(self._frames) / 1000}

    def _ms(self, frames: int) -> int:
        return round(1000 * frames / self._model.frame_rate)

    def _made(self, kind: str, *, client: Event | None = None, **facts: Any) -> list[Payload]:
        """An event, with the number of the caller's that it answers."""
        self._events += 1
        event = {"type": kind, "event_id": f"event_{self._events}", **facts}
        event.update(_number(client or {}))
        return [json.dumps(event)]

    def _error(
        self,
        code: str,
        message: str,
        name: str | None,
        client: Event,
        kind: str = "invalid_request_error",
    ) -> list[Payload]:
        error = {"type": kind, "code": code, "message": message, "param": name}
        return self._made("error", client=client, error={**error, **_number(client)})

    def _wrong(self, event: Event, code: str, name: str | None, what: str) -> Ignored:
        return Ignored(what, self._error(code, what, name, event))


_KNOWN = {
    "session.start",
    "session.update",
    "session.close",
    "session.input_audio.append",
    "session.input_audio.mute",
    "session.input_audio.unmute",
    "session.commentary.append",
    *_UNSUPPORTED,
}


def _number(event: Event) -> Event:
    """Which of the caller's events is meant."""
    number = event.get("event_id")
    return {"client_event_id": number[:200]} if isinstance(number, str) else {}


def _not_ours(session: Event) -> Iterator[tuple[str, str]]:
    """What a session asks for that this model has not: its name, and a sentence."""
    instructions = session.get("instructions")
    if instructions and not (isinstance(instructions, str) and instructions.isspace()):
        yield "session.instructions", "this model takes no instructions; it goes on without"
    voice = part(part(session, "audio"), "output").get("voice")
    if voice not in (None, _ANY_VOICE):
        yield "session.audio.output.voice", "this model has one voice; it goes on with that"
    if session.get("input"):
        yield "session.input", "this model cannot read what was said before; it goes on without"
    if session.get("store"):
        yield "session.store", "this server stores nothing"
    if session.get("triggers"):
        yield "session.triggers", "this server has no triggers"
    if part(part(session, "delegation"), "responses").get("tools"):
        name = "session.delegation.responses.tools"
        yield name, "this model calls no functions; it goes on without"
