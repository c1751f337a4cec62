"""The openai package's client of the Live API, at our server."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import calls
import numpy as np
from callers import cut, in_time, scenario, serving, value
from clients import KEY, PATIENT
from openai import AsyncOpenAI
from openai.types.live import ServerEvent
from pydantic import TypeAdapter

from moshi_c import Model

SCHEMA: TypeAdapter[ServerEvent] = TypeAdapter(ServerEvent)


async def in_base64(pcm: np.ndarray) -> AsyncIterator[str]:
    """Pieces of 20 ms as events carry them, in real time."""
    async for piece in in_time(cut(pcm, 480), 0.02):
        yield base64.b64encode(piece.tobytes()).decode()


async def received(connection: Any, schema: TypeAdapter[Any]) -> Any:
    """The next event. The package itself takes what is not as it should be."""
    message = await connection.recv_bytes()
    schema.validate_json(message)
    return connection.parse_event(message)


def heard(events: list[ServerEvent]) -> np.ndarray:
    sounds = [event.delta for event in events if event.type == "session.output_audio.delta"]
    return np.frombuffer(b"".join(map(base64.b64decode, sounds)), np.int16)


def said(events: list[ServerEvent]) -> str:
    kind = "session.output_transcript.delta"
    return "".join(event.delta for event in events if event.type == kind).strip()


@scenario
async def test_the_openai_package_holds_a_call(model: Model, tmp_path: Path) -> None:
    """Package openai, unmodified: WAV in, the session's sound and words out, every event as the
    package's own types have it."""
    pcm, _ = calls.read(calls.write(tmp_path / "in.wav", calls.question()))
    events: list[ServerEvent] = []
    async with (
        serving(model, **PATIENT) as server,
        AsyncOpenAI(api_key=KEY, base_url=f"{server.url}/v1") as client,
        client.live.connect(extra_query={"seed": str(calls.SEED)}) as connection,
    ):
        form = {"type": "audio/pcm", "rate": calls.RATE}
        await connection.session.start(session={"model": "moshi", "audio": {"format": form}})
        started = await connection.recv()
        assert started.type == "session.started"
        assert started.session.audio.format.rate == calls.RATE
        assert abs(started.session.expires_at - time.time() - 3600) < 60

        async def speak() -> None:
            async for piece in in_base64(pcm):
                await connection.session.input_audio.append(audio=piece)
            await connection.session.close()

        speaking = asyncio.create_task(speak())
        while not events or events[-1].type != "session.closed":
            events.append(await received(connection, SCHEMA))
        await speaking
        assert value(server, "moshi_ignored_messages_total") == 0
    expected, text = calls.alone(model, pcm)
    assert said(events) == text == calls.ANSWER
    assert calls.is_spoken(heard(events)[: len(expected)], expected)
    closed = events[-1]
    assert closed.reason == "close_requested" and closed.usage.seconds >= len(pcm) / calls.RATE
    usage = [event for event in events if event.type == "session.usage.updated"]
    assert usage and 0 < usage[0].context_window.usage_ratio <= 1
    assert not [event for event in events if event.type == "error"]


@scenario
async def test_every_answer_is_as_the_openai_package_has_it(model: Model) -> None:
    """Those to commands too, and errors: what the package offers for a session, in turn."""
    async with (
        serving(model, sessions=1, **PATIENT) as server,
        AsyncOpenAI(api_key=KEY, base_url=f"{server.url}/v1") as client,
        client.live.connect() as first,
        client.live.connect() as connection,
    ):
        events: list[ServerEvent] = []

        async def next_event() -> ServerEvent:
            events.append(await received(connection, SCHEMA))
            return events[-1]

        assert (await next_event()).type == "info"  # in the line
        await first.session.start(session={"model": "moshi"})
        await first.session.close()
        session = {"model": "moshi", "instructions": "You are a pirate."}
        await connection.session.start(session=session)
        while (await next_event()).type != "session.started":
            pass
        await connection.session.input_audio.mute(event_id="hush")
        await connection.session.input_audio.unmute()
        await connection.session.update(session={"delegation": {"type": "client"}})
        await connection.session.commentary.append(content="the sky is blue", delegation_id=None)
        await connection.session.thinking.append(content="it is late", delegation_id=None)
        await connection.session.instructions.append(content="be kind", delegation_id=None)
        await connection.response.create()
        await connection.session.close(event_id="last")
        while (await next_event()).type != "session.closed":
            pass
    assert [event.type for event in events if "output" not in event.type] == [
        "info",
        "session.started",
        "error",
        "session.input_audio.muted",
        "session.input_audio.unmuted",
        "session.updated",
        "session.commentary.appended",
        "error",
        "error",
        "error",
        "session.closed",
    ]
    errors = [event.error for event in events if event.type == "error"]
    assert {error.code for error in errors} == {"unsupported"}
    assert errors[0].param == "session.instructions"
    muted = next(event for event in events if event.type == "session.input_audio.muted")
    assert muted.client_event_id == "hush"
