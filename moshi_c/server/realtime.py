"""`/v1/realtime`: OpenAI's Realtime protocol (the names of its general release), for clients that
think in turns.

Written after the clients that speak it: the openai package, Pipecat's OpenAIRealtimeLLMService and
LiveKit's RealtimeModel. JSON in text messages; sound in base64, 16 bits at 24 kHz or G.711, from
the caller in `input_audio_buffer.append`, to the caller in `response.output_audio.delta`.

It is a lossy view of a model that listens and speaks at once:

- The model hears everything as it comes. `commit` and `clear` are acknowledged and change nothing.
- A response is what the model says without a pause of a second; the silence between is not sent.
  `response.create` opens one that has the model's next words, and ends empty when none come.
- The user speaks while the sound is loud. Unless `turn_detection` is null or its
  `interrupt_response` false, that ends a response, and the rest of what the model was saying is not
  sent. So does `response.cancel`. The model itself is not stopped: it hears, and may give way.
- Instructions, voices, functions, and text or pictures in items are nothing to the model.
  `session.updated` tells what is in force; items are kept by name only.

An `error` event has one of OpenAI's codes where clients go by them, else "invalid_value",
"unknown_event" or "invalid_json".
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from aiohttp import WSMessage

from ..audio import Pcm
from ..model import Model
from ..session import Frame, Session
from ..telephony import PHONE_RATE, BytesIn, BytesOut, Encoding
from ..turns import Moment, Reply, Turns
from .call import Answer, Ending, Ignored, Payload, Wire
from .events import part, read_event, read_sound, shown, write_sound

_RATE = 24000
_FORMATS: dict[str, tuple[Encoding, int]] = {
    "audio/pcm": ("s16", _RATE),
    "audio/pcmu": ("pcmu", PHONE_RATE),
    "audio/pcma": ("pcma", PHONE_RATE),
}
#: Seconds for which an empty response waits for the model to speak.
_PATIENCE = 8.0
#: Items whose names are kept; answers that wait for a slot; characters of a name, of an item.
_MOST_ITEMS, _MOST_EARLY, _MOST_NAME, _MOST_TEXT = 500, 64, 200, 1 << 16
#: What is said back of an item's content.
_TEXTS = ("type", "text", "transcript")
_VAD = {
    "type": "server_vad",
    "threshold": 0.5,
    "prefix_padding_ms": 0,
    "silence_duration_ms": 640,
    "create_response": True,
    "interrupt_response": True,
}

Event = dict[str, Any]
Handler = Callable[..., Iterator[Payload]]


class _Wrong(Exception):
    """What the caller asked for cannot be done."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


class _Response:
    """One that is open. Its item begins with the first sound or word."""

    def __init__(self, opened: float, metadata: Any = None) -> None:
        self.id, self.item = _name("resp"), _name("item")
        self.opened, self.metadata = opened, metadata
        self.begun = False
        self.after: str | None = None  # an item
        self.text = ""
        self.reply: Reply | None = None


class RealtimeWire(Wire):
    """One caller's `/v1/realtime`."""

    name = "/v1/realtime"
    live = True

    def __init__(self, model: Model) -> None:
        self._rate = model.sample_rate
        self._model = Path(model._source).name
        self._id = _name("sess")
        self._formats = {"input": "audio/pcm", "output": "audio/pcm"}
        self._detection: Event | None = dict(_VAD)
        self._in, self._out = BytesIn("s16", _RATE, self._rate), BytesOut("s16", _RATE, self._rate)
        self._ready = False
        self._early: list[Payload] = []
        self._items: list[str] = []  # in the order of the conversation
        self._uncommitted = 0  # bytes
        self._turns = Turns()
        self._time = 0.0  # of the last frame
        self._user_item: str | None = None  # of the speech that goes on
        self._response: _Response | None = None
        self._reply: Reply | None = None  # what the model is saying
        self._muted = False  # the rest of that is not sent

    # ---- in ------------------------------------------------------------------------------------

    def hear(self, message: WSMessage) -> Iterator[Pcm | Answer | None]:
        """See Wire."""
        try:
            kind, event = read_event(message, "type")
        except Ignored as error:
            raise self._ignored("invalid_json", str(error), {}) from None
        if kind == "input_audio_buffer.append":
            yield from self._heard(event)
            return
        handle = self._handlers.get(kind)
        if handle is None:
            raise self._ignored("unknown_event", f"there is no event {kind[:40]!r}", event)
        if not self._ready and len(self._early) > _MOST_EARLY:
            raise Ignored("the session has not begun, and too much has been asked of it")
        if kind == "session.update":
            try:
                self._set_input(event)  # before the sound that follows
            except _Wrong as wrong:
                handle = partial(_raise, wrong)
        yield partial(self._answer, handle, event)

    def _ignored(self, code: str, message: str, event: Event) -> Ignored:
        return Ignored(message, self._error(_Wrong(code, message), event))

    def _heard(self, event: Event) -> Iterator[Pcm]:
        try:
            data = read_sound(event.get("audio"))
        except Ignored as error:
            raise self._ignored("invalid_value", str(error), event) from None
        self._uncommitted += len(data)
        yield from self._in.add_by_seconds(data)

    def _answer(self, handle: Handler, event: Event) -> list[Payload]:
        try:
            said = list(handle(self, event))
        except _Wrong as wrong:
            said = self._error(wrong, event)
        if self._ready:
            return said
        self._early += said
        return []

    # ---- what the caller asks for --------------------------------------------------------------

    def _set_input(self, event: Event) -> None:
        session = event.get("session")
        if not isinstance(session, dict):
            raise _Wrong("invalid_value", "session.update has no session", "session")
        for way in ("input", "output"):
            _format(session, way)
        _detection(session)
        kind = _format(session, "input")
        if kind is not None and kind != self._formats["input"]:
            self._formats["input"] = kind
            self._in = BytesIn(*_FORMATS[kind], self._rate)

    def _update(self, event: Event) -> Iterator[Payload]:
        session = event["session"]
        kind = _format(session, "output")
        if kind is not None and kind != self._formats["output"]:
            self._formats["output"] = kind
            self._out = BytesOut(*_FORMATS[kind], self._rate)
        given, detection = _detection(session)
        if given:
            self._detection = detection
        yield self._event("session.updated", session=self._session())

    def _commit(self, event: Event) -> Iterator[Payload]:
        if not self._uncommitted:
            raise _Wrong("input_audio_buffer_commit_empty", "no sound came since the last commit")
        yield from self._committed(_name("item"))

    def _committed(self, item: str) -> Iterator[Payload]:
        self._uncommitted = 0
        before = self._last_item()
        yield self._event("input_audio_buffer.committed", previous_item_id=before, item_id=item)
        content = [{"type": "input_audio", "transcript": None}]
        yield from self._add_item(_message(item, "user", content, "completed"))

    def _clear(self, event: Event) -> Iterator[Payload]:
        self._uncommitted = 0
        yield self._event("input_audio_buffer.cleared")

    def _create_item(self, event: Event) -> Iterator[Payload]:
        item = _clean_item(event.get("item"))
        if item["id"] in self._items:
            raise _Wrong("item_create_duplicate_item_id", "an item of this id is there", "item.id")
        after = event.get("previous_item_id")
        if after is None:
            place = len(self._items)
        elif after == "root":
            place = 0
        elif after in self._items:
            place = self._items.index(after) + 1
        else:
            raise _Wrong("item_create_invalid_item_id", "there is no such previous_item_id")
        yield from self._add_item(item, place)

    def _add_item(self, item: Event, place: int | None = None) -> Iterator[Payload]:
        """Into the conversation, whole."""
        before = self._place_item(item, place)
        yield self._event("conversation.item.added", previous_item_id=before, item=item)
        yield self._event("conversation.item.done", previous_item_id=before, item=item)

    def _place_item(self, item: Event, place: int | None = None) -> str | None:
        """Puts an item's name among the others, at the end if not said; returns the one before."""
        place = len(self._items) if place is None else place
        before = self._items[place - 1] if place else None
        self._items.insert(place, item["id"])
        del self._items[:-_MOST_ITEMS]
        return before

    def _last_item(self) -> str | None:
        return self._items[-1] if self._items else None

    def _truncate_item(self, event: Event) -> Iterator[Payload]:
        item = self._known_item(event, "truncate")
        end = event.get("audio_end_ms")
        if type(end) is not int or not 0 <= end < 1 << 53:
            what = f"audio_end_ms is {shown(end)}; expected milliseconds"
            raise _Wrong("invalid_value", what, "audio_end_ms")
        yield self._event(
            "conversation.item.truncated", item_id=item, content_index=0, audio_end_ms=end
        )

    def _delete_item(self, event: Event) -> Iterator[Payload]:
        item = self._known_item(event, "delete")
        self._items.remove(item)
        yield self._event("conversation.item.deleted", item_id=item)

    def _retrieve_item(self, event: Event) -> Iterator[Payload]:
        raise _Wrong("item_retrieve_invalid_item_id", "this server keeps no items", "item_id")

    def _known_item(self, event: Event, verb: str) -> str:
        item = event.get("item_id")
        if not isinstance(item, str) or item not in self._items:
            raise _Wrong(f"item_{verb}_invalid_item_id", "there is no such item", "item_id")
        return item

    def _create_response(self, event: Event) -> Iterator[Payload]:
        if self._response is not None:
            raise _Wrong("conversation_already_has_active_response", "a response is going on")
        metadata = part(event, "response").get("metadata")
        if metadata is not None and not _are_facts(metadata):
            what = "response.metadata is not an object of 16 short texts at most"
            raise _Wrong("invalid_value", what, "response.metadata")
        yield from self._open(metadata)

    def _cancel_response(self, event: Event) -> Iterator[Payload]:
        response, wanted = self._response, event.get("response_id")
        if response is None or wanted not in (None, response.id):
            # LiveKit's client knows the first two words
            raise _Wrong("response_cancel_not_active", "Cancellation failed: no such response")
        yield from self._cut_off("client_cancelled")

    _handlers: ClassVar[dict[str, Handler]] = {
        "session.update": _update,
        "input_audio_buffer.commit": _commit,
        "input_audio_buffer.clear": _clear,
        "conversation.item.create": _create_item,
        "conversation.item.truncate": _truncate_item,
        "conversation.item.delete": _delete_item,
        "conversation.item.retrieve": _retrieve_item,
        "response.create": _create_response,
        "response.cancel": _cancel_response,
    }

    # ---- out -----------------------------------------------------------------------------------

    def ready(self, session: Session) -> list[Payload]:
        """See Wire."""
        self._ready = True
        early, self._early = self._early, []
        return [self._event("session.created", session=self._session()), *early]

    def sound(self, pcm: Pcm, frame: Frame) -> tuple[list[Payload], bool]:
        """See Wire."""
        moment = self._turns.add(frame)
        self._time = frame.time
        said = list(self._listen(moment))
        data = self._out.add(pcm)  # silence too, for the filter
        sounds = bool(data) and moment.reply is not None and not self._muted
        return [*said, *self._speak(data, moment)], sounds

    def _listen(self, moment: Moment) -> Iterator[Payload]:
        """What the user does."""
        ms = round(1000 * moment.frame.time)
        if moment.user is True and self._detection is not None:
            self._user_item = _name("item")
            yield self._event(
                "input_audio_buffer.speech_started", audio_start_ms=ms, item_id=self._user_item
            )
            if self._response is not None and self._detection["interrupt_response"]:
                yield from self._cut_off("turn_detected")
        elif moment.user is False and self._user_item is not None:
            item, self._user_item = self._user_item, None
            yield self._event("input_audio_buffer.speech_stopped", audio_end_ms=ms, item_id=item)
            yield from self._committed(item)

    def _speak(self, data: bytes, moment: Moment) -> Iterator[Payload]:
        """What the model does."""
        self._reply = None if moment.ended else moment.reply
        if moment.reply is not None and not self._muted:
            yield from self._begin(moment.reply)
            if data:
                yield self._delta("response.output_audio", delta=write_sound(data))
        if moment.ended:
            self._muted = False
        response = self._response
        if response is None:
            return
        waited = moment.frame.time - response.opened
        if (moment.ended and response.begun) or (not response.begun and waited > _PATIENCE):
            yield from self._close("completed")

    def text(self, text: str, time: float) -> list[Payload]:
        """See Wire."""
        if self._muted:
            return []
        said = [*self._begin(self._reply)]
        assert self._response is not None
        delta = text if self._response.text else text.lstrip()
        self._response.text += delta
        return [*said, self._delta("response.output_audio_transcript", delta=delta)]

    def _open(self, metadata: Any = None) -> Iterator[Payload]:
        self._response = _Response(self._time, metadata)
        yield self._event("response.created", response=self._about("in_progress"))

    def _begin(self, reply: Reply | None) -> Iterator[Payload]:
        """The response and its item, if they have not begun."""
        if self._response is None:
            yield from self._open()
        response = self._response
        assert response is not None
        if response.begun:
            return
        response.begun, response.reply = True, reply
        item = _message(response.item, "assistant", [], "in_progress")
        yield self._event(
            "response.output_item.added", response_id=response.id, output_index=0, item=item
        )
        response.after = self._place_item(item)
        yield self._event("conversation.item.added", previous_item_id=response.after, item=item)
        yield self._part_event("added", "")

    def _close(self, status: str, reason: str | None = None) -> Iterator[Payload]:
        response = self._response
        assert response is not None
        if response.begun:
            yield self._delta("response.output_audio", "done")
            yield self._delta("response.output_audio_transcript", "done", transcript=response.text)
            yield self._part_event("done", response.text)
            item = self._item()
            yield self._event(
                "response.output_item.done", response_id=response.id, output_index=0, item=item
            )
            yield self._event("conversation.item.done", previous_item_id=response.after, item=item)
        yield self._event("response.done", response=self._about(status, reason))
        self._response = None

    def _cut_off(self, reason: str) -> Iterator[Payload]:
        """Ends the response; what the model goes on to say of it is not sent."""
        self._muted = self._reply is not None
        yield from self._close("cancelled", reason)

    def error(self, ending: Ending) -> list[Payload]:
        """See Wire."""
        return self._error(_Wrong(ending.label, ending.reason), {}, "server_error")

    # ---- the shapes of events ------------------------------------------------------------------

    def _event(self, kind: str, **facts: Any) -> str:
        return json.dumps({"type": kind, "event_id": _name("event"), **facts})

    def _error(
        self, wrong: _Wrong, event: Event, kind: str = "invalid_request_error"
    ) -> list[Payload]:
        number = event.get("event_id")
        error = {
            "type": kind,
            "code": wrong.code,
            "message": str(wrong),
            "param": wrong.param,
            "event_id": number[:_MOST_NAME] if isinstance(number, str) else None,
        }
        return [self._event("error", error=error)]

    def _delta(self, what: str, verb: str = "delta", **facts: Any) -> str:
        response = self._response
        assert response is not None
        return self._event(
            f"{what}.{verb}",
            response_id=response.id,
            item_id=response.item,
            output_index=0,
            content_index=0,
            **facts,
        )

    def _part_event(self, verb: str, text: str) -> str:
        part = {"type": "audio", "transcript": text}
        return self._delta("response.content_part", verb, part=part)

    def _item(self) -> Event:
        assert self._response is not None
        content = [{"type": "output_audio", "transcript": self._response.text}]
        return _message(self._response.item, "assistant", content, "completed")

    def _about(self, status: str, reason: str | None = None) -> Event:
        response = self._response
        assert response is not None
        details = None if reason is None else {"type": status, "reason": reason}
        return {
            "object": "realtime.response",
            "id": response.id,
            "status": status,
            "status_details": details,
            "output": [self._item()] if response.begun and status != "in_progress" else [],
            "output_modalities": ["audio"],
            "metadata": response.metadata,
            "usage": _usage(response.reply) if status != "in_progress" else None,
        }

    def _session(self) -> Event:
        """What is in force."""
        formats = {way: self._format(kind) for way, kind in self._formats.items()}
        return {
            "type": "realtime",
            "object": "realtime.session",
            "id": self._id,
            "model": self._model,
            "output_modalities": ["audio"],
            "instructions": "",
            "tools": [],
            "tool_choice": "none",
            "max_output_tokens": "inf",
            "audio": {
                "input": {
                    "format": formats["input"],
                    "transcription": None,
                    "noise_reduction": None,
                    "turn_detection": self._detection,
                },
                "output": {"format": formats["output"], "voice": None, "speed": 1.0},
            },
        }

    @staticmethod
    def _format(kind: str) -> Event:
        return {"type": kind, "rate": _RATE} if kind == "audio/pcm" else {"type": kind}


def _name(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(10)}"


def _message(name: str, role: str, content: list[Event], status: str) -> Event:
    return {
        "id": name,
        "object": "realtime.item",
        "type": "message",
        "status": status,
        "role": role,
        "content": content,
    }


def _format(session: Event, way: str) -> str | None:
    """The format that a session asks for, None if it does not say."""
    param = f"session.audio.{way}.format"
    audio = part(part(session, "audio"), way)
    if audio.get("format") is None:
        return None
    wanted = part(audio, "format")
    kind = wanted.get("type")
    if not isinstance(kind, str) or kind not in _FORMATS:
        what = f"the type of {param} is {shown(kind)}; expected {', '.join(_FORMATS)}"
        raise _Wrong("invalid_value", what, param)
    rate = wanted.get("rate")
    if rate not in (None, _FORMATS[kind][1]):
        what = f"the rate of {kind} is {shown(rate)}; expected {_FORMATS[kind][1]}"
        raise _Wrong("invalid_value", what, f"{param}.rate")
    return kind


def _detection(session: Event) -> tuple[bool, Event | None]:
    """Whether a session says when the user's turns begin and end, and how; None is never."""
    found = part(part(session, "audio"), "input")
    if "turn_detection" not in found:
        return False, None
    wanted = found["turn_detection"]
    if wanted is None:
        return True, None
    param = "session.audio.input.turn_detection"
    kind = part(found, "turn_detection").get("type")
    if kind not in ("server_vad", "semantic_vad"):
        what = f"the type of {param} is {shown(kind)}; expected server_vad, semantic_vad or null"
        raise _Wrong("invalid_value", what, param)
    return True, {**_VAD, "interrupt_response": wanted.get("interrupt_response") is not False}


def _are_facts(metadata: Any) -> bool:
    return (
        isinstance(metadata, dict)
        and len(metadata) <= 16
        and all(len(key) <= 64 for key in metadata)
        and all(isinstance(each, str) and len(each) <= 512 for each in metadata.values())
    )


def _usage(reply: Reply | None) -> Event:
    """Tokens of audio in and out while the model spoke, and one of text for each frame."""
    heard, said, frames = (
        (0, 0, 0) if reply is None else (reply.input_codes, reply.output_codes, reply.frames)
    )
    return {
        "total_tokens": heard + said + frames,
        "input_tokens": heard,
        "output_tokens": said + frames,
        "input_token_details": {"audio_tokens": heard, "text_tokens": 0, "cached_tokens": 0},
        "output_token_details": {"audio_tokens": said, "text_tokens": frames},
    }


def _raise(wrong: _Wrong, *_: Any) -> NoReturn:
    raise wrong


def _clean_item(item: Any) -> Event:
    """What is said back of an item: all of its text, nothing of its sound and pictures."""
    if not isinstance(item, dict) or item.get("type") not in (
        "message",
        "function_call",
        "function_call_output",
    ):
        raise _Wrong("invalid_value", "item is no message or function call", "item")
    kept: Event = {"id": _name("item"), "object": "realtime.item", "status": "completed"}
    for name in ("id", "type", "role", "call_id", "name", "arguments", "output"):
        if isinstance(item.get(name), str) and item[name]:
            kept[name] = item[name]
    if len(kept["id"]) > _MOST_NAME:
        raise _Wrong("invalid_value", f"item.id is longer than {_MOST_NAME} characters", "item.id")
    if kept["type"] == "message":
        if kept.get("role") not in ("user", "assistant", "system"):
            raise _Wrong("invalid_value", "item.role is not user, assistant or system", "item.role")
        parts = item.get("content")
        kept["content"] = [
            {name: text for name in _TEXTS if isinstance(text := each.get(name), str)}
            for each in (parts if isinstance(parts, list) else [])
            if isinstance(each, dict) and isinstance(each.get("type"), str)
        ]
    if len(json.dumps(kept)) > _MOST_TEXT:
        raise _Wrong("invalid_value", f"item has more than {_MOST_TEXT} characters", "item")
    return kept
