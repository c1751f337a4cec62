"""`/v1/realtime`: the Realtime protocol of turn-based clients, over a model without turns."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
import pytest
import sound
from callers import Caller, scenario, serving, websocket

import moshi_c
from moshi_c import Model, telephony
from moshi_c.server import Server

pytestmark = pytest.mark.python

QUESTION, ANSWER = "what colour is the sky", "the sky is blue"
RATES: dict[telephony.Encoding, int] = {"s16": 24000, "pcmu": 8000, "pcma": 8000}


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with moshi_c.load(max_sessions=2) as model:
        yield model


@dataclass
class Client:
    """One call. What has come is in `events`."""

    socket: aiohttp.ClientWebSocketResponse
    events: list[dict[str, Any]] = field(default_factory=list)
    progress: asyncio.Event = field(default_factory=asyncio.Event)
    over: bool = False

    async def listen(self) -> None:
        async for message in self.socket:
            self.events.append(json.loads(message.data))
            self.progress.set()
        self.over = True
        self.progress.set()

    until = Caller.until
    finished = Caller.finished
    code = Caller.code

    @property
    def notes(self) -> list[str]:
        return [event["type"] for event in self.events]

    async def send(self, kind: str, **facts: Any) -> None:
        await self.socket.send_str(json.dumps({"type": kind, **facts}))

    async def said(self, kind: str, count: int = 1) -> dict[str, Any]:
        """The last event of a kind, when so many have come."""
        await self.until(lambda: self.notes.count(kind) >= count)
        return self.kinds(kind)[-1]

    def kinds(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == kind]

    async def speak(self, pcm: np.ndarray, encoding: telephony.Encoding = "s16") -> None:
        """Sound in real time, 40 ms a message."""
        rate = RATES[encoding]
        data = telephony.encode(moshi_c.audio.resample(pcm, 24000, rate), encoding)
        size = rate // 25 * telephony.sample_bytes(encoding)
        begin = time.monotonic()
        for number, start in enumerate(range(0, len(data), size)):
            await asyncio.sleep(max(0.0, begin + number / 25 - time.monotonic()))
            audio = base64.b64encode(data[start : start + size]).decode()
            await self.send("input_audio_buffer.append", audio=audio)


@contextlib.asynccontextmanager
async def realtime(server: Server, query: str = "?seed=7") -> AsyncIterator[Client]:
    async with (
        aiohttp.ClientSession() as http,
        http.ws_connect(f"{websocket(server)}/v1/realtime{query}") as connection,
    ):
        client = Client(connection)
        listening = asyncio.create_task(client.listen())
        try:
            yield client
        finally:
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listening


def asked(after: float = 4.0) -> np.ndarray:
    parts = [sound.silence(0.5), 0.5 * sound.speech(QUESTION), sound.silence(after)]
    return np.concatenate(parts)


def formats(kind: str) -> dict[str, Any]:
    way = {"format": {"type": kind}}
    return {"type": "realtime", "audio": {"input": way, "output": way}}


@pytest.mark.parametrize("encoding", ["s16", "pcmu"])
def test_a_question_is_a_turn_and_its_answer_a_response(
    model: Model, encoding: telephony.Encoding
) -> None:
    @scenario
    async def call() -> None:
        async with serving(model) as server, realtime(server) as client:
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
        voice = b"".join(base64.b64decode(event["delta"]) for event in deltas)
        pcm = telephony.decode(voice, encoding)
        assert 1.0 < len(pcm) / RATES[encoding] < 4.0, "the answer, without the silence around it"
        assert np.abs(pcm).max() > 0.1
        assert done["usage"]["output_token_details"]["text_tokens"] >= len(deltas)

    call()


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
