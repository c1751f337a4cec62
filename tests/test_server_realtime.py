"""`/v1/realtime`: the Realtime protocol of turn-based clients, over a model without turns."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any

import aiohttp
import numpy as np
import pytest
from callers import (
    PATIENT,
    EventCaller,
    all_over,
    connected,
    cut,
    eventually,
    in_time,
    scenario,
    serving,
    value,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from sound import Sound, question

import moshi_c
from moshi_c import Frame, Model, telephony
from moshi_c.server import Server
from moshi_c.server.call import Ignored
from moshi_c.server.realtime import RealtimeWire

pytestmark = pytest.mark.python

QUESTION, ANSWER = "what colour is the sky", "the sky is blue"
RATES: dict[telephony.Encoding, int] = {"s16": 24000, "pcmu": 8000, "pcma": 8000}


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with moshi_c.load(max_sessions=2) as model:
        yield model


class Client(EventCaller):
    """One call, with what it waits for."""

    @property
    def notes(self) -> list[str]:
        return [event["type"] for event in self.events]

    async def said(self, kind: str, count: int = 1) -> dict[str, Any]:
        """The last event of a kind, when so many have come."""
        await self.until(lambda: self.notes.count(kind) >= count)
        return self.kinds(kind)[-1]

    async def speak(self, pcm: np.ndarray, encoding: telephony.Encoding = "s16") -> None:
        """Sound in real time, 40 ms a message."""
        rate = RATES[encoding]
        data = telephony.encode(moshi_c.audio.resample(pcm, 24000, rate), encoding)
        size = rate // 25 * telephony.sample_bytes(encoding)
        async for piece in in_time(cut(data, size), 0.04):
            audio = base64.b64encode(piece).decode()
            await self.send("input_audio_buffer.append", audio=audio)


def realtime(server: Server, query: str = "?seed=7") -> AbstractAsyncContextManager[Client]:
    """A call."""
    return connected(server, f"/v1/realtime{query}", Client)


def asked(after: float = 4.0) -> Sound:
    return question(QUESTION, before=0.5, after=after, level=0.5)


def formats(kind: str) -> dict[str, Any]:
    way = {"format": {"type": kind}}
    return {"type": "realtime", "audio": {"input": way, "output": way}}


@scenario
async def test_a_question_is_a_turn_and_its_answer_a_response(model: Model) -> None:
    """With samples and by telephone, side by side."""
    async with serving(model, **PATIENT) as server:
        await asyncio.gather(answered(server, "s16"), answered(server, "pcmu"))


async def answered(server: Server, encoding: telephony.Encoding) -> None:
    """One call, and what it has to be like."""
    async with realtime(server) as client:
        session = (await client.said("session.created"))["session"]
        assert session["audio"]["input"]["format"] == {"type": "audio/pcm", "rate": 24000}
        if encoding != "s16":
            await client.send("session.update", session=formats(f"audio/{encoding}"))
            session = (await client.said("session.updated"))["session"]
            assert session["audio"]["output"]["format"] == {"type": "audio/pcmu"}
        await client.speak(asked(), encoding)
        done = (await client.said("response.done"))["response"]

    of_turn = [kind for kind in client.notes if not kind.endswith(".delta")]
    assert of_turn[-len(ORDER) :] == ORDER
    assert done["status"] == "completed"
    (item,) = done["output"]
    words = "".join(e["delta"] for e in client.kinds("response.output_audio_transcript.delta"))
    assert item["content"][0]["transcript"] == words
    assert ANSWER in words.lower()
    deltas = client.kinds("response.output_audio.delta")
    assert {event["item_id"] for event in deltas} == {item["id"]}
    pcm = telephony.decode(b"".join(base64.b64decode(e["delta"]) for e in deltas), encoding)
    assert 1.0 < len(pcm) / RATES[encoding] < 4.0, "the answer, without the silence around it"
    assert np.abs(pcm).max() > 0.1
    assert done["usage"]["output_token_details"]["text_tokens"] >= len(deltas)


#: Of a question and its answer: the model begins when the user has ended.
ORDER = [
    "input_audio_buffer.speech_started",
    "response.created",
    "response.output_item.added",
    "conversation.item.added",
    "response.content_part.added",
    "input_audio_buffer.speech_stopped",
    "input_audio_buffer.committed",
    "conversation.item.added",
    "conversation.item.done",
    "response.output_audio.done",
    "response.output_audio_transcript.done",
    "response.content_part.done",
    "response.output_item.done",
    "conversation.item.done",
    "response.done",
]


def frames_of(model: Model, states: str, first: int) -> list[Frame]:
    """A frame for each letter: u the user speaks, m the model does, b both, . neither."""
    with moshi_c.Session(model, seed=1) as session:
        frame = session.step(np.zeros(model.frame_size, np.float32))
    return [
        replace(
            frame,
            index=i,
            time=i * 0.08,
            pcm=np.zeros(model.frame_size, np.float32),
            text=" word" if state in "mb" else "",
            speaking=state in "mb",
            level=-20.0 if state in "ub" else -90.0,
        )
        for i, state in enumerate(states, first)
    ]


class Wired:
    """A protocol without a socket, and all that it has said."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.wire = RealtimeWire(model)
        self.events: list[dict[str, Any]] = []
        self.frames = 0

    def ready(self) -> Wired:
        with moshi_c.Session(self.model) as session:
            self._keep(self.wire.ready(session))
        return self

    def hear(self, kind: str, **facts: Any) -> list[str]:
        """The events that answer an event."""
        message = aiohttp.WSMessage(aiohttp.WSMsgType.TEXT, json.dumps({"type": kind, **facts}), "")
        before = len(self.events)
        for answer in self.wire.hear(message):
            if not isinstance(answer, np.ndarray):
                self._keep(answer())
        return [event["type"] for event in self.events[before:]]

    def step(self, states: str) -> list[str]:
        """Frames as `frames_of` has them; what they bring, sound and text left out."""
        before = len(self.events)
        for frame in frames_of(self.model, states, self.frames):
            assert frame.pcm is not None
            self.frames += 1
            before_sound = self.sounds()
            payloads, sounds = self.wire.sound(frame.pcm, frame)
            self._keep(payloads)
            assert sounds == (self.sounds() > before_sound), "for the metrics"
            if frame.text:
                self._keep(self.wire.text(frame.text, frame.time))
        kinds = [event["type"] for event in self.events[before:]]
        return [kind for kind in kinds if not kind.endswith(".delta")]

    def _keep(self, payloads: list[bytes | str]) -> None:
        self.events += map(json.loads, payloads)

    def sounds(self) -> int:
        return sum(event["type"] == "response.output_audio.delta" for event in self.events)

    def last(self, kind: str) -> dict[str, Any]:
        return [event for event in self.events if event["type"] == kind][-1]


@pytest.mark.parametrize("by", ["the user", "the client"])
def test_what_the_model_was_saying_is_not_sent_when_it_is_cut_off(model: Model, by: str) -> None:
    """Only what it says after a pause."""
    call = Wired(model).ready()
    call.step("..mmm")
    assert call.sounds() == 3
    if by == "the user":
        said = call.step("bb")
        assert said[0] == "input_audio_buffer.speech_started"
        reason, sent = "turn_detected", 4  # two loud frames make speech
    else:
        said = call.hear("response.cancel")
        reason, sent = "client_cancelled", 3
    assert said[-1] == "response.done"
    done = call.last("response.done")["response"]
    assert done["status"] == "cancelled" and done["status_details"]["reason"] == reason
    assert call.hear("response.cancel") == ["error"]
    assert call.last("error")["error"]["code"] == "response_cancel_not_active"
    call.step("mmmmm")
    assert call.sounds() == sent
    assert "response.created" in call.step("...........m")
    assert call.sounds() == sent + 1


@pytest.mark.parametrize("detection", [None, {"type": "server_vad", "interrupt_response": False}])
def test_a_client_may_let_the_model_talk_on(model: Model, detection: Any) -> None:
    call = Wired(model).ready()
    assert call.hear("session.update", session=update(detection)) == ["session.updated"]
    call.step("mmm")
    said = call.step("bbbbuu..........")
    assert said.count("input_audio_buffer.speech_started") == (detection is not None)
    assert said.count("conversation.item.done") == 1 + (detection is not None)
    assert call.last("response.done")["response"]["status"] == "completed"


def update(detection: Any) -> dict[str, Any]:
    return {"type": "realtime", "audio": {"input": {"turn_detection": detection}}}


COMMANDS = ("response.create", "response.cancel", "input_audio_buffer.commit")


@given(st.lists(st.tuples(st.text("umb..", max_size=12), st.sampled_from(COMMANDS)), max_size=12))
@settings(max_examples=60, deadline=None)
def test_responses_never_overlap_and_hold_all_that_is_theirs(
    model: Model, turns: list[tuple[str, str]]
) -> None:
    """Whoever speaks and whatever is asked meanwhile: clients fail on anything else."""
    call = Wired(model).ready()
    for states, command in turns:
        call.step(states)
        call.hear(command)
    call.step("." * 110)
    now: str | None = None
    items: set[str] = set()
    for event in call.events:
        kind = event["type"]
        if kind == "response.created":
            assert now is None
            now = event["response"]["id"]
        elif kind == "response.done":
            assert event["response"]["id"] == now
            now = None
        elif kind.startswith("response."):
            assert event["response_id"] == now
            if kind == "response.output_item.added":
                assert event["item"]["id"] not in items
                items.add(event["item"]["id"])
            elif "item_id" in event:
                assert event["item_id"] in items
    assert now is None


def test_a_response_that_is_asked_for_has_the_next_words_or_none(model: Model) -> None:
    call = Wired(model).ready()
    assert call.hear("response.create", response={"metadata": {"k": "v"}}) == ["response.created"]
    assert call.hear("response.create") == ["error"]
    assert call.last("error")["error"]["code"] == "conversation_already_has_active_response"
    said = call.step("....mm.")
    assert "response.created" not in said and said[-1] == "response.done"
    done = call.last("response.done")["response"]
    assert done["metadata"] == {"k": "v"}
    assert done["output"][0]["content"][0]["transcript"] == "word word"
    call = Wired(model).ready()
    call.hear("response.create")
    assert call.step("." * 110) == ["response.done"], "eight seconds of silence"
    done = call.last("response.done")["response"]
    assert done["status"] == "completed" and done["output"] == []


def test_what_is_asked_in_the_line_is_answered_with_the_slot(model: Model) -> None:
    call = Wired(model)
    assert call.hear("session.update", session=formats("audio/pcma")) == []
    for _ in range(10):
        assert call.hear("conversation.item.create", item={"type": "function_call_output"}) == []
    call.ready()
    assert [event["type"] for event in call.events][:2] == ["session.created", "session.updated"]
    assert len(call.events) == 2 + 2 * 10
    call = Wired(model)
    with pytest.raises(Ignored):
        for _ in range(1000):
            call.hear("input_audio_buffer.clear")


def test_items_are_kept_in_order_and_no_more_than_so_many(model: Model) -> None:
    call = Wired(model).ready()

    def create(name: str, **place: Any) -> str | None:
        part = {"type": "input_text", "text": "hi", "image_url": "x" * 100_000}
        item = {"id": name, "type": "message", "role": "user", "content": [part, 3, {}]}
        assert call.hear("conversation.item.create", item=item, **place)[0] != "error", name
        added = call.last("conversation.item.added")
        assert added["item"]["content"] == [{"type": "input_text", "text": "hi"}]
        return added["previous_item_id"]

    assert [create("a"), create("b"), create("c", previous_item_id="root")] == [None, "a", None]
    assert create("d", previous_item_id="a") == "a"  # c a d b
    assert create("e") == "b"
    assert call.hear("conversation.item.delete", item_id="e") == ["conversation.item.deleted"]
    assert create("f") == "b"
    for i in range(2000):
        create(str(i))
    assert len(call.wire._items) <= 501
    assert call.hear("conversation.item.truncate", item_id="a", audio_end_ms=1) == ["error"]


ODD: list[tuple[str, dict[str, Any], str]] = [
    ("session.update", {}, "invalid_value"),
    ("session.update", {"session": []}, "invalid_value"),
    ("session.update", {"session": formats("audio/mp3")}, "invalid_value"),
    ("session.update", {"session": {"audio": {"input": {"format": "pcm16"}}}}, "invalid_value"),
    ("session.update", {"session": update("always")}, "invalid_value"),
    ("session.update", {"session": update({"type": ["server_vad"]})}, "invalid_value"),
    ("conversation.item.create", {}, "invalid_value"),
    ("conversation.item.create", {"item": {"type": "song"}}, "invalid_value"),
    ("conversation.item.create", {"item": {"type": "message", "role": "cat"}}, "invalid_value"),
    (
        "conversation.item.create",
        {"item": {"type": "function_call", "arguments": "x" * 70_000}},
        "invalid_value",
    ),
    (
        "conversation.item.create",
        {"item": {"type": "function_call", "id": "x" * 300}},
        "invalid_value",
    ),
    (
        "conversation.item.create",
        {"item": {"type": "function_call"}, "previous_item_id": {}},
        "item_create_invalid_item_id",
    ),
    ("conversation.item.delete", {"item_id": []}, "item_delete_invalid_item_id"),
    ("conversation.item.truncate", {"item_id": "a"}, "item_truncate_invalid_item_id"),
    ("conversation.item.retrieve", {"item_id": "a"}, "item_retrieve_invalid_item_id"),
    ("input_audio_buffer.commit", {}, "input_audio_buffer_commit_empty"),
    ("response.create", {"response": {"metadata": {"a": {"b": "c"}}}}, "invalid_value"),
    ("response.create", {"response": {"metadata": {"a": "x" * 999}}}, "invalid_value"),
    ("response.cancel", {"response_id": 3}, "response_cancel_not_active"),
]


@pytest.mark.parametrize(("kind", "facts", "code"), ODD, ids=lambda value: str(value)[:30])
def test_a_wrong_command_is_an_error_that_says_which(
    model: Model, kind: str, facts: dict[str, Any], code: str
) -> None:
    call = Wired(model).ready()
    assert call.hear(kind, event_id="mine", **facts) == ["error"]
    error = call.last("error")["error"]
    assert (error["code"], error["event_id"]) == (code, "mine")
    assert len(error["message"]) < 200


@scenario
async def test_hostile_messages_are_answered_and_then_end_the_call(model: Model) -> None:
    wrong = ["no JSON", "[" * 100_000, "[]", "{}", '{"type": 3}', '{"type": "sing"}']
    wrong.append('{"type": "input_audio_buffer.append", "audio": "not base64!"}')
    wrong.append('{"type": "input_audio_buffer.append", "audio": {"a": 1}}')
    async with serving(model) as server:
        async with realtime(server) as client:
            for message in wrong:
                await client.socket.send_str(message)
            await client.socket.send_bytes(b"\x00")
            await client.said("error", len(wrong) + 1)
            codes = [event["error"]["code"] for event in client.kinds("error")]
            assert codes == ["invalid_json"] * 5 + ["unknown_event"] + ["invalid_value"] * 2 + [
                "invalid_json"
            ]
            for _ in range(101 - len(codes)):
                await client.socket.send_str("no JSON")
            await client.finished()
            assert client.code == 1003
            assert client.events[-1]["error"]["code"] == "bad_messages"
        await all_over(server)


@scenario
async def test_who_does_not_read_the_answers_is_read_no_further(model: Model) -> None:
    item = {"type": "function_call", "arguments": "x" * 60_000}
    async with serving(model, slow_seconds=1.0) as server, realtime(server) as client:
        await client.said("session.created")
        (call,) = server._calls
        response = client.socket._response
        assert response.connection is not None and response.connection.transport is not None
        response.connection.transport.pause_reading()  # type: ignore[attr-defined]
        most = 0
        with pytest.raises(ConnectionError):
            while True:
                await client.send("conversation.item.create", item=item)
                most = max(most, len(call._outbox))
        assert 1 <= most < 100
        await all_over(server)
        assert value(server, "moshi_ended_total", reason="slow_reader") == 1


@scenario
async def test_the_token_is_asked_for_and_the_line_is_silent(model: Model) -> None:
    async with serving(model, sessions=1, token="open sesame") as server:
        with pytest.raises(aiohttp.WSServerHandshakeError, match="401"):
            async with realtime(server):
                pass
        async with realtime(server, "?token=open+sesame&seed=7") as first:
            await first.said("session.created")
            async with realtime(server, "?token=open+sesame") as second:
                await second.send("session.update", session=formats("audio/pcmu"))
                await eventually(lambda: server._admission.waiting == 1)
                assert not second.events
                await first.socket.close()
                await second.said("session.updated")
                assert second.notes[:2] == ["session.created", "session.updated"]
        assert value(server, "moshi_connect_total", protocol="/v1/realtime") == 2
