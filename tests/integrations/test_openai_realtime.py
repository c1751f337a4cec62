"""The openai package's client of the Realtime API, at our server."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

import calls
import numpy as np
from callers import scenario, serving, value
from clients import KEY, PATIENT
from openai import AsyncOpenAI
from openai.types.realtime import RealtimeServerEvent
from pydantic import TypeAdapter
from test_openai_live import in_base64, received

from moshi_c import Model

SCHEMA: TypeAdapter[RealtimeServerEvent] = TypeAdapter(RealtimeServerEvent)


@scenario
async def test_the_openai_package_holds_a_call_in_turns(model: Model, tmp_path: Path) -> None:
    """Package openai, unmodified: WAV in, the response's sound and words out, every event as the
    package's own types have it."""
    pcm, _ = calls.read(calls.write(tmp_path / "in.wav", calls.question()))
    events: list[RealtimeServerEvent] = []
    async with (
        serving(model, **PATIENT) as server,
        AsyncOpenAI(api_key=KEY, base_url=f"{server.url}/v1") as client,
        client.realtime.connect(
            model="gpt-realtime", extra_query={"seed": str(calls.SEED)}
        ) as connection,
    ):

        async def next_event() -> RealtimeServerEvent:
            events.append(await received(connection, SCHEMA))
            return events[-1]

        async def speak() -> None:
            async for piece in in_base64(pcm):
                await connection.input_audio_buffer.append(audio=piece)

        assert (await next_event()).type == "session.created"
        await connection.session.update(
            session={"type": "realtime", "instructions": "You are a pirate."}
        )
        updated = await next_event()
        assert updated.type == "session.updated" and not updated.session.instructions
        speaking = asyncio.create_task(speak())
        while (await next_event()).type != "response.done":
            pass
        await speaking
        # the rest of what the package offers
        item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "?"}]}
        await connection.conversation.item.create(item=item)
        response = await next_event(), await next_event()
        assert [event.type[-5:] for event in response] == ["added", ".done"]
        await connection.conversation.item.delete(item_id=response[0].item.id)
        assert (await next_event()).type == "conversation.item.deleted"
        await connection.conversation.item.retrieve(item_id="none", event_id="mine")
        failed = await next_event()
        assert failed.type == "error" and failed.error.event_id == "mine"
        await connection.response.cancel()
        assert (await next_event()).error.code == "response_cancel_not_active"
        await connection.input_audio_buffer.commit()
        while (await next_event()).type != "conversation.item.done":
            pass
        await connection.input_audio_buffer.clear()
        assert (await next_event()).type == "input_audio_buffer.cleared"
        await connection.response.create(response={"metadata": {"who": "me"}})
        created = await next_event()
        assert created.type == "response.created" and created.response.metadata == {"who": "me"}
        await connection.response.cancel()
        done = await next_event()
        assert done.type == "response.done" and done.response.status == "cancelled"
        assert value(server, "moshi_ignored_messages_total") == 0
    words = [e.delta for e in events if e.type == "response.output_audio_transcript.delta"]
    assert "".join(words) == calls.ANSWER
    deltas = [base64.b64decode(e.delta) for e in events if e.type == "response.output_audio.delta"]
    voice = np.frombuffer(b"".join(deltas), np.int16)
    # sample for sample what the model says, from where it begins to where it has ended
    expected, _ = calls.alone(model, pcm)
    begin = next(
        start
        for start in range(0, len(expected), calls.FRAME)
        if np.array_equal(expected[start : start + len(voice)], voice)
    )
    assert np.abs(expected[:begin]).max(initial=0) < 1000
