"""LiveKit's published client of OpenAI's Realtime API, at our server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import calls
import numpy as np
from callers import all_over, scenario, serving, value
from clients import KEY, PATIENT
from livekit.plugins.openai.realtime import RealtimeModel
from test_livekit import pieces, samples, until
from test_livekit_live import agent_call

from moshi_c import Model
from moshi_c.server import Server


def realtime_model(server: Server) -> RealtimeModel:
    return RealtimeModel(base_url=f"{server.url}/v1?seed={calls.SEED}", api_key=KEY)


@scenario
async def test_livekits_realtime_model_holds_a_call(model: Model, tmp_path: Path) -> None:
    """Packages livekit-agents and livekit-plugins-openai, unmodified: WAV in, the answer's turn,
    words and voice out of an AgentSession."""
    pcm, _ = calls.read(calls.write(tmp_path / "in.wav", calls.question()))
    async with serving(model, **PATIENT) as server:
        async with agent_call(realtime_model(server), pieces(pcm), "You are a pirate.") as call:
            await until(call.said)
        await all_over(server)
        assert value(server, "moshi_ignored_messages_total") == 0
        assert value(server, "moshi_ended_total", reason="hung_up") == 1
    assert [text.strip() for text in call.said()] == [calls.ANSWER]
    heard = samples(call.speaker.frames)
    assert np.abs(heard).max() > 3000 and len(heard) < 3.5 * calls.RATE, "silence ends a turn"
    users = [event.new_state for event in call.of("user_state_changed")]
    assert "speaking" in users
    assert not call.of("error")


@scenario
async def test_livekits_realtime_model_is_not_left_waiting_for_a_reply(model: Model) -> None:
    """`generate_reply` ends, without words: a model without turns is not made to speak."""
    silence = np.zeros(60 * calls.RATE, np.int16)
    async with (
        serving(model, **PATIENT) as server,
        agent_call(realtime_model(server), pieces(silence)) as call,
    ):
        await asyncio.wait_for(call.session.generate_reply(user_input="hello"), 60)
        assert not "".join(call.said()).replace("hello", "").strip()
        assert not call.of("error")
