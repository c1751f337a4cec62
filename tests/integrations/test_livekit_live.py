"""LiveKit's published client of OpenAI's Live API, at our server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import calls
import numpy as np
from callers import all_over, scenario, serving, value
from clients import KEY, PATIENT
from livekit import rtc
from livekit.agents import Agent
from livekit.plugins.openai.realtime import GPTLiveModel
from test_livekit import AgentCall, Microphone, pieces, samples, until

from moshi_c import Model
from moshi_c.server import Server


class Slowly(Microphone):
    """A WAV file in real time."""

    def __init__(self, frames: list[rtc.AudioFrame]) -> None:
        super().__init__(frames)
        self._begin: float | None = None
        self._given = 0.0

    async def __anext__(self) -> rtc.AudioFrame:
        self._begin = self._begin or time.monotonic()
        await asyncio.sleep(self._begin + self._given - time.monotonic())
        frame = await super().__anext__()
        self._given += frame.duration
        return frame


@asynccontextmanager
async def agent_call(
    model: Any, frames: list[rtc.AudioFrame], instructions: str = ""
) -> AsyncIterator[AgentCall]:
    """An agent of a client's model, which hears the frames in real time."""
    call = AgentCall(model, [], Agent(instructions=instructions))
    call.session.input.audio = Slowly(frames)
    try:
        async with call:
            yield call
    finally:
        await model.aclose()


def live_model(server: Server) -> GPTLiveModel:
    return GPTLiveModel(base_url=f"{server.url}/v1", api_key=KEY)


@scenario
async def test_livekits_live_model_holds_a_call(model: Model, tmp_path: Path) -> None:
    """Packages livekit-agents and livekit-plugins-openai, unmodified: WAV in, the answer's turn,
    words and voice out of an AgentSession."""
    pcm, _ = calls.read(calls.write(tmp_path / "in.wav", calls.question()))
    async with serving(model, **PATIENT) as server:
        async with agent_call(live_model(server), pieces(pcm)) as call:
            await until(call.said)
        await all_over(server)
        assert value(server, "moshi_ignored_messages_total") == 0
        assert value(server, "moshi_ended_total", reason="finished") == 1
    assert [text.strip() for text in call.said()] == [calls.ANSWER]
    heard = samples(call.speaker.frames)
    assert np.abs(heard).max() > 3000 and len(heard) < 3.5 * calls.RATE, "silence ends a turn"
    assert not call.of("error")


@scenario
async def test_livekits_live_model_is_told_what_the_model_has_not(model: Model) -> None:
    """Instructions are refused by an error that ends nothing; commentary is said."""
    silence = np.zeros(60 * calls.RATE, np.int16)
    async with (
        serving(model, **PATIENT) as server,
        agent_call(live_model(server), pieces(silence), "You are a pirate.") as call,
    ):
        await until(lambda: call.of("error"))
        assert call.of("error")[0].error.recoverable
        call.agent.duplex_session.append_commentary("the sky is blue")
        await until(call.said)
        assert [text.strip() for text in call.said()] == ["the sky is blue"]
        assert len(call.of("error")) == 1
