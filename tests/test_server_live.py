"""`/v1/live/sessions`: OpenAI's Live protocol, and what callers may get wrong in it.

Clients that others have published hold their calls in integrations/test_*_live.py.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
import pytest
from callers import (
    PATIENT,
    Event,
    EventCaller,
    all_over,
    connected,
    cut,
    eventually,
    in_time,
    scenario,
    serving,
    value,
    websocket,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from sound import FRAME, RATE, Sound, question

import moshi_c
from moshi_c import Frame, Model, Session
from moshi_c.server import Server, live
from moshi_c.server.call import Ending, Ignored
from moshi_c.server.events import read_event
from moshi_c.telephony import BytesIn, BytesOut, decode, encode

pytestmark = pytest.mark.python


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with moshi_c.load(max_sessions=8) as model:
        yield model


def sent(frame: Frame) -> Sound:
    """What a caller hears of a frame: where the model is silent, that is exact."""
    assert frame.pcm is not None
    return frame.pcm if frame.speaking else np.zeros_like(frame.pcm)


@dataclass
class Talker(EventCaller):
    """One call. What has come is in `events`, and of these the sound in `heard` too."""

    heard: bytes = b""

    def take(self, message: aiohttp.WSMessage) -> None:
        super().take(message)
        if self.events[-1]["type"] == "session.output_audio.delta":
            self.heard += base64.b64decode(self.events[-1]["delta"], validate=True)

    async def start(self, **session: Any) -> Event:
        """Waits for the session."""
        await self.send("session.start", event_id="one", session={"model": "any", **session})
        return await self.next("session.started")

    async def next(self, kind: str) -> Event:
        """The first event of a kind, when it is there; forgets it."""
        await self.until(lambda: self.kinds(kind))
        event = self.kinds(kind)[0]
        self.events.remove(event)
        return event

    async def append(self, data: bytes) -> None:
        """A piece of sound."""
        await self.send("session.input_audio.append", audio=base64.b64encode(data).decode())

    async def say(self, data: bytes, piece: int, seconds: float) -> None:
        """Pieces of so many bytes, in the time that all of it lasts."""
        async for each in in_time(cut(data, piece), seconds * piece / len(data)):
            await self.append(each)

    @property
    def notes(self) -> list[Event]:
        """All but the sound."""
        return [event for event in self.events if event["type"] != "session.output_audio.delta"]

    @property
    def errors(self) -> list[tuple[str, str | None]]:
        """Code and parameter of each."""
        found = [event["error"] for event in self.kinds("error")]
        return [(error["code"], error["param"]) for error in found]

    @property
    def text(self) -> str:
        """All that was said in words."""
        return "".join(event["delta"] for event in self.kinds("session.output_transcript.delta"))


def talking(server: Server, query: str = "", **options: Any) -> AbstractAsyncContextManager[Talker]:
    """A call."""
    return connected(server, f"/v1/live/sessions{query}", Talker, **options)


# ---- what is heard and said --------------------------------------------------------------------


@scenario
async def test_a_call_is_what_the_session_says_with_its_times(model: Model) -> None:
    data = encode(question(), "s16")
    with Session(model, seed=3) as session:
        frames = session.push(decode(data, "s16")) + session.flush()
    voice = encode(np.concatenate([sent(frame) for frame in frames]), "s16")
    async with serving(model, max_seconds=600, **PATIENT) as server:
        async with talking(server, "?seed=3") as caller:
            started = await caller.start()
            assert started["client_event_id"] == "one"
            assert 0 < started["session"]["expires_at"] - time.time() <= 600
            assert started["session"]["audio"]["format"] == {"type": "audio/pcm", "rate": 24000}
            # pieces of odd length: a sample may be cut in two
            await caller.say(data, 1001, len(question()) / RATE)
            await caller.send("session.close", event_id="last")
            await caller.finished()
            assert caller.code == 1000
        assert caller.heard == voice
        said = [
            {"delta": frame.text, "start_ms": 80 * frame.index, "end_ms": 80 * frame.index + 80}
            for frame in frames
            if frame.text
        ]
        deltas = caller.kinds("session.output_transcript.delta")
        assert [{name: event[name] for name in said[0]} for event in deltas] == said
        assert "cold" in caller.text
        closed = caller.events[-1]
        assert (closed["type"], closed["reason"]) == ("session.closed", "close_requested")
        assert closed["usage"] == {"seconds": len(frames) * 0.08}
        assert closed["session"] == started["session"]
        usage = caller.kinds("session.usage.updated")[0]
        assert usage["usage"] == {"seconds": 4.0}
        assert usage["context_window"] == {"usage_ratio": 50 / model._info["context"]}
        ids = [event["event_id"] for event in [started, *caller.notes]]
        assert len(set(ids)) == len(ids)
        assert not caller.errors
        assert value(server, "moshi_connect_total", protocol="/v1/live/sessions") == 1
        assert value(server, "moshi_silence_steps_total") == 0


@scenario
async def test_every_format_of_the_protocol_is_what_the_session_says_at_its_rate(
    model: Model,
) -> None:
    async def call(server: Server, kind: str, encoding: Any, rate: int) -> None:
        out = BytesOut(encoding, rate, RATE)
        data = out.add(question()) + out.flush()
        heard = BytesIn(encoding, rate, RATE)
        with Session(model, seed=3) as session:
            frames = session.push(heard.add(data))
        back = BytesOut(encoding, rate, RATE)
        expected = b"".join(back.add(sent(frame)) for frame in frames)
        form = {"type": kind, "rate": rate}
        async with talking(server, "?seed=3") as caller:
            started = await caller.start(audio={"format": form})
            assert started["session"]["audio"]["format"] == form
            await caller.say(data, len(data) // 50, len(question()) / RATE)
            await caller.until(lambda: len(caller.heard) == len(expected))
            assert caller.heard == expected
            assert caller.text == "".join(frame.text for frame in frames)

    async with serving(model, **PATIENT) as server:
        await asyncio.gather(
            call(server, "audio/pcm", "s16", 16000),
            call(server, "audio/pcmu", "pcmu", 8000),
            call(server, "audio/pcma", "pcma", 8000),
        )


@scenario
async def test_commentary_is_said_word_for_word_by_a_model_that_may_speak_first(
    model: Model,
) -> None:
    async with serving(model, silence_after=0.1) as server, talking(server) as caller:
        await caller.start()
        words = {"content": "the sky is blue", "delegation_id": None}
        await caller.send("session.commentary.append", event_id="say", **words)
        appended = await caller.next("session.commentary.appended")
        assert appended["client_event_id"] == "say"
        assert appended["start_ms"] == 0 and 1000 < appended["end_ms"] < 4000
        await caller.send("session.commentary.append", content="bye")
        assert (await caller.next("session.commentary.appended"))["start_ms"] == appended["end_ms"]
        await caller.until(lambda: caller.text.endswith("bye"))
        assert caller.text.strip() == words["content"] + " bye"
        assert np.abs(decode(caller.heard, "s16")).max() > 0.05
        assert not caller.errors


@scenario
async def test_a_muted_caller_is_silence_to_the_model(model: Model) -> None:
    loud = encode(question()[: 10 * FRAME], "s16")
    with Session(model, seed=3) as session:
        quiet = session.push(np.zeros(10 * FRAME, np.float32))
        expected = encode(np.concatenate([sent(frame) for frame in quiet]), "s16")
    async with serving(model, **PATIENT) as server, talking(server, "?seed=3") as caller:
        await caller.start()
        for kind in ("mute", "unmute", "mute"):
            await caller.send(f"session.input_audio.{kind}", event_id=kind)
            answer = await caller.next(f"session.input_audio.{kind}d")
            assert answer["client_event_id"] == kind
        await caller.append(loud)
        await caller.until(lambda: len(caller.heard) == len(expected))
        assert caller.heard == expected


# ---- what the model has not --------------------------------------------------------------------


@scenario
async def test_what_the_model_has_not_is_an_error_event_and_the_call_goes_on(model: Model) -> None:
    tool = {"type": "function", "name": "f"}
    async with serving(model) as server, talking(server) as caller:
        await caller.start(
            instructions="You are a pirate.",
            audio={"output": {"voice": "cedar"}},
            input=[{"type": "message", "role": "user", "content": []}],
            store=True,
            triggers=[{}],
            delegation={"type": "responses", "responses": {"model": "m", "tools": [tool]}},
        )
        await caller.until(lambda: len(caller.errors) == 6)
        assert {code for code, _ in caller.errors} == {"unsupported"}
        assert {name.removeprefix("session.") for _, name in caller.errors} == {
            "instructions",
            "audio.output.voice",
            "input",
            "store",
            "triggers",
            "delegation.responses.tools",
        }
        assert {event["error"]["client_event_id"] for event in caller.kinds("error")} == {"one"}
        caller.events.clear()
        for kind in (
            "session.instructions.append",
            "session.thinking.append",
            "response.create",
            "response.item.create",
        ):
            await caller.send(kind, event_id=kind, delegation_id=None, content="x")
            error = await caller.next("error")
            assert error["error"]["code"] == "unsupported"
            assert error["client_event_id"] == error["error"]["client_event_id"] == kind
        tools = {"delegation": {"type": "responses", "responses": {"tools": [tool]}}}
        await caller.send("session.update", session=tools)
        assert (await caller.next("error"))["error"]["param"].endswith(".tools")
        await caller.send("session.update", session={"delegation": {"type": "client"}})
        await caller.next("session.updated")
        assert value(server, "moshi_ignored_messages_total") == 0
        await caller.append(bytes(2 * FRAME))
        await caller.until(lambda: len(caller.heard) == 2 * FRAME)


@scenario
async def test_what_clients_ask_for_by_default_is_no_error(model: Model) -> None:
    async with serving(model) as server, talking(server) as caller:
        await caller.start(
            instructions=" ",
            audio={"format": {"type": "audio/pcm", "rate": 24000}, "output": {"voice": "marin"}},
            delegation={"type": "responses", "responses": {"model": "m"}},
            input=[],
            store=False,
        )
        await caller.send("session.update", session={})
        await caller.next("session.updated")
        assert not caller.errors


# ---- hostile callers ---------------------------------------------------------------------------


def start(**session: Any) -> str:
    return json.dumps({"type": "session.start", "session": session})


def sounds(form: Any) -> str:
    return start(model="m", audio={"format": form})


def text_message(text: str) -> aiohttp.WSMessage:
    return aiohttp.WSMessage(aiohttp.WSMsgType.TEXT, text, None)


#: Those that the protocol gives a meaning, above all.
NAMES = (
    st.sampled_from(["session", "model", "audio", "format", "type", "rate", "output", "voice"])
    | st.sampled_from(["instructions", "input", "store", "delegation", "responses", "tools"])
    | st.sampled_from(["content", "delegation_id", "event_id"])
    | st.text(max_size=4)
)
APPEND = '{"type": "session.input_audio.append", "audio": "AAAA"}'
COMMENTARY = {"type": "session.commentary.append", "delegation_id": None}

BEFORE = [
    ("hello", "invalid_json", None),
    ("", "invalid_json", None),
    ("[" * 9000, "invalid_json", None),
    ("7", "invalid_json", None),
    ("{}", "invalid_json", None),
    ('{"type": ["session.start"]}', "invalid_json", None),
    ('{"type": "session.sing"}', "unknown_event", "type"),
    (APPEND, "not_started", "type"),
    (json.dumps({**COMMENTARY, "content": "x"}), "not_started", "type"),
    ('{"type": "session.start"}', "missing_parameter", "session"),
    ('{"type": "session.start", "session": 7}', "missing_parameter", "session"),
    (start(), "missing_parameter", "session.model"),
    (sounds({"type": "audio/opus"}), "invalid_value", "session.audio.format"),
    (sounds({"type": {}}), "invalid_value", "session.audio.format"),
    (sounds({"rate": 0}), "invalid_value", "session.audio.format.rate"),
    (sounds({"rate": True}), "invalid_value", "session.audio.format.rate"),
    (sounds({"rate": int("9" * 4000)}), "invalid_value", "session.audio.format.rate"),
    (sounds({"type": "audio/pcmu", "rate": 24000}), "invalid_value", "session.audio.format.rate"),
]
AFTER = [
    (start(model="m"), "already_started", "type"),
    ('{"type": "session.input_audio.append"}', "missing_parameter", "audio"),
    ('{"type": "session.input_audio.append", "audio": 7}', "missing_parameter", "audio"),
    ('{"type": "session.input_audio.append", "audio": "A"}', "invalid_value", "audio"),
    ('{"type": "session.input_audio.append", "audio": "täg="}', "invalid_value", "audio"),
    (json.dumps(COMMENTARY), "missing_parameter", "content"),
    (json.dumps({**COMMENTARY, "content": "x" * 2001}), "invalid_value", "content"),
    (json.dumps({**COMMENTARY, "content": "日本"}), "invalid_value", "content"),
    (
        json.dumps({**COMMENTARY, "content": "x", "delegation_id": "d"}),
        "invalid_value",
        "delegation_id",
    ),
]


@scenario
async def test_what_a_caller_gets_wrong_is_an_error_event_and_hurts_no_call(model: Model) -> None:
    pcm = decode(encode(question()[: 10 * FRAME], "s16"), "s16")
    with Session(model, seed=3) as session:
        expected = encode(np.concatenate([sent(f) for f in session.push(pcm)]), "s16")
    async with serving(model, **PATIENT) as server, talking(server, "?seed=3") as caller:
        for cases in (BEFORE, AFTER):
            for message, code, name in cases:
                await caller.socket.send_str(message)
                error = (await caller.next("error"))["error"]
                assert (error["code"], error["param"]) == (code, name), message[:80]
                assert error["type"] == "invalid_request_error" and 0 < len(error["message"]) < 200
            if cases is BEFORE:
                await caller.socket.send_bytes(b"\x00\x01")
                assert (await caller.next("error"))["error"]["code"] == "invalid_json"
                await caller.start()
        # nothing of that was heard
        await caller.append(encode(pcm, "s16"))
        await caller.until(lambda: len(caller.heard) == len(expected))
        assert caller.heard == expected
        assert value(server, "moshi_ignored_messages_total") == len(BEFORE) + len(AFTER) + 1


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(NAMES, inside, max_size=4),
    max_leaves=12,
)


@given(
    kind=st.sampled_from(sorted(live._KNOWN)),
    facts=st.dictionaries(NAMES, ANYTHING, max_size=6),
    started=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_any_event_is_taken_answered_or_refused(
    model: Model, kind: str, facts: Event, started: bool
) -> None:
    """Of every type, whatever it holds: no other exception, and every answer is JSON."""
    wire, answers = live.LiveWire(model, 0.0), []
    if started:
        list(wire.hear(text_message(start(model="m"))))
        answers += wire.ready(None)  # type: ignore[arg-type]
    try:
        for heard in wire.hear(text_message(json.dumps({**facts, "type": kind}))):
            answers += heard if isinstance(heard, list) else []
        answers += wire.ready(None)  # type: ignore[arg-type]
    except Ignored as error:
        answers += error.answer
        assert answers
    except Ending as ending:
        assert kind == "session.close" and ending.code == 1000
    assert all(json.loads(answer)["event_id"] for answer in answers)


@scenario
async def test_words_that_wait_to_be_said_are_bounded(model: Model) -> None:
    async with serving(model, **PATIENT) as server, talking(server) as caller:
        await caller.start()
        for _ in range(8):
            await caller.send("session.commentary.append", content="hello " * 300)
        await caller.until(lambda: caller.errors)
        assert caller.errors[0] == ("invalid_value", "content")
        assert "five minutes" in caller.kinds("error")[0]["error"]["message"]
        assert len(caller.kinds("session.commentary.appended")) + len(caller.errors) <= 8


@scenario
async def test_events_that_are_much_work_are_read_more_slowly(model: Model) -> None:
    async with serving(model, **PATIENT) as server, talking(server) as caller:
        await caller.start()
        long = json.dumps({"type": "session.update", "padding": " " * 1_000_000})
        begin = time.monotonic()
        for _ in range(4):
            await caller.socket.send_str(long)
        await caller.until(lambda: len(caller.kinds("session.updated")) == 4)
        assert time.monotonic() - begin > 1.5, "a second's at once, then one a second"
        begin = time.monotonic()
        for _ in range(12):  # the work is done even where nothing of it can be said
            await caller.send("session.commentary.append", content="@ " * 1000)
        await caller.until(lambda: len(caller.kinds("session.commentary.appended")) == 12)
        assert time.monotonic() - begin > 1.0, "five at once, then five a second"
        assert not caller.errors


def test_an_event_of_very_many_parts_is_not_read() -> None:
    for part in ("[],", "{},", "7,"):
        message = text_message('{"type": "session.update", "session": [' + part * 20_000 + "7]}")
        with pytest.raises(Ignored, match="20000 brackets and commas"):
            read_event(message, "type")
    message = text_message('{"type": "session.update", "session": [' + "7," * 10_000 + "7]}")
    assert read_event(message, "type")[0] == "session.update"


@scenario
async def test_a_flood_of_wrong_events_and_a_message_too_large_end_the_call(model: Model) -> None:
    async with serving(model, messages_per_second=100_000, message_bytes=1 << 16) as server:
        async with talking(server) as caller:
            with contextlib.suppress(ConnectionError):
                for _ in range(200):
                    await caller.socket.send_str("hello")
            await caller.finished()
            assert caller.code == 1003
            assert caller.errors[-1] == ("bad_messages", None)
        async with talking(server) as caller:
            await caller.start()
            with contextlib.suppress(ConnectionError):
                await caller.append(bytes(1 << 20))
            await caller.finished()
            assert caller.code == 1009
        await all_over(server)


@scenario
async def test_a_caller_who_asks_and_does_not_read_is_hung_up_on(model: Model) -> None:
    async with (
        serving(model, slow_seconds=0.5, messages_per_second=100_000) as server,
        aiohttp.ClientSession() as client,
        client.ws_connect(f"{websocket(server)}/v1/live/sessions", autoping=False) as socket,
    ):
        await socket.send_str(start(model="m"))

        async def ask() -> None:
            with contextlib.suppress(ConnectionError):
                while True:  # until the server has hung up
                    await socket.send_str('{"type": "session.update"}')

        asking = asyncio.create_task(ask())
        await eventually(lambda: value(server, "moshi_ended_total", reason="slow_reader") == 1)
        assert server._admission.busy == 0
        asking.cancel()
        await asyncio.wait([asking])


# ---- admission and ends ------------------------------------------------------------------------


@scenario
async def test_who_waits_is_told_so_and_starts_when_it_is_their_turn(model: Model) -> None:
    async with serving(model, sessions=1, queue=1, token="open sesame") as server:
        key = {"headers": {"api-key": "open sesame"}}
        for headers in ({}, {"api-key": "wrong"}, {"Authorization": "Bearer wrong"}):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                async with talking(server, headers=headers):
                    pass
            assert refused.value.status == 401
        async with talking(server, **key) as first, talking(server, **key) as second:
            await first.start()
            waiting = await second.next("info")
            assert waiting["code"] == "waiting" and "1" in waiting["message"]
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                async with talking(server, **key):
                    pass
            assert refused.value.status == 503
            await second.send("session.start", session={"model": "any"})
            await second.append(bytes(2 * FRAME))  # nobody listens yet
            await first.send("session.close")
            await first.finished()
            await second.next("session.started")
            await second.append(bytes(2 * FRAME))
            await second.until(lambda: len(second.heard) == 2 * FRAME)
            assert not second.errors
            await second.send("session.close")
            await second.finished()
            assert second.kinds("session.closed")[0]["usage"]["seconds"] == pytest.approx(0.16)
        assert server._admission.busy == 0


def test_the_time_of_a_call_counts_from_its_slot_however_late_it_is_started(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = live.LiveWire(model, 100.0)
    monkeypatch.setattr(live.time, "time", lambda: 1000.0)
    assert wire.ready(None) == []  # type: ignore[arg-type]
    monkeypatch.setattr(live.time, "time", lambda: 1050.0)
    ((answer,),) = wire.hear(text_message(start(model="m")))
    assert json.loads(answer)["session"]["expires_at"] == 1100


@scenario
async def test_a_call_out_of_time_is_expired_and_an_idle_one_an_error(model: Model) -> None:
    async with serving(model, max_seconds=2.0) as server, talking(server) as caller:
        await caller.start()
        await caller.finished()
        assert caller.code == 1000
        assert caller.events[-1]["reason"] == "expired"
    async with serving(model, idle_seconds=0.3) as server, talking(server) as caller:
        await caller.finished()  # who does not even start has no slot for long
        assert caller.code == 4408
        assert caller.errors == [("idle", None)]
