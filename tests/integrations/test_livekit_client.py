"""LiveKit's published client of PersonaPlex's server, at ours."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp
import numpy as np
import sound
from callers import all_over, scenario, serving, value
from livekit import rtc
from livekit.plugins.nvidia.experimental import realtime
from sound import RATE, Sound

from moshi_c import Model


@scenario
async def test_livekits_personaplex_client_holds_a_call_in_turns(model: Model) -> None:
    """Package livekit-plugins-nvidia, unmodified. It does not wait for the handshake, and takes
    half a second without sound for the end of a turn."""
    asked = sound.question()
    turns: list[tuple[str, Sound]] = []
    turn_tasks: list[asyncio.Task[None]] = []
    errors: list[object] = []

    async def follow(generation: Any) -> None:
        async for message in generation.message_stream:
            sounds = [np.frombuffer(f.data, np.int16) async for f in message.audio_stream]
            text = "".join([piece async for piece in message.text_stream])
            turns.append((text, np.concatenate(sounds) if sounds else np.zeros(0, np.int16)))

    async with (
        serving(model, keepalive_seconds=0.5) as server,
        aiohttp.ClientSession() as http,
    ):
        plugin = realtime.RealtimeModel(
            base_url=f"ws://127.0.0.1:{server.port}", voice="NATF2", seed=3, http_session=http
        )
        session = plugin.session()
        session.on(
            "generation_created",
            lambda event: turn_tasks.append(asyncio.create_task(follow(event))),
        )
        session.on("error", errors.append)
        samples = (np.concatenate([asked, sound.silence(1)]) * 32767).astype(np.int16)
        begin = time.monotonic()
        for start in range(0, len(samples), 480):  # 20 ms, as a room has them
            frame = samples[start : start + 480]
            session.push_audio(rtc.AudioFrame(frame.tobytes(), RATE, 1, len(frame)))
            await asyncio.sleep(max(0.0, begin + start / RATE - time.monotonic()))
        await asyncio.wait_for(asyncio.gather(*turn_tasks), 30)
        await session.aclose()
        await all_over(server)
        assert value(server, "moshi_ignored_messages_total") == 0
    assert not errors
    assert len(turns) == 1, "one answer is one turn"
    assert "cold" in turns[0][0]
    assert np.abs(turns[0][1]).max() > 3000 and len(turns[0][1]) < 2.5 * RATE
