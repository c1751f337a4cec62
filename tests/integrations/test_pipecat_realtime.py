"""Pipecat's published client of OpenAI's Realtime API, at our server."""

from __future__ import annotations

from pathlib import Path

import calls
import numpy as np
from callers import all_over, scenario, serving, value, websocket
from clients import KEY, PATIENT
from numpy.typing import NDArray
from pipecat.frames.frames import (
    ErrorFrame,
    Frame,
    LLMFullResponseEndFrame,
    LLMFullResponseStartFrame,
    ProposedUserStartedSpeakingFrame,
    ProposedUserStoppedSpeakingFrame,
    TTSAudioRawFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
)
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.services.openai.realtime.llm import OpenAIRealtimeLLMService
from test_pipecat import said
from test_pipecat_live import conversation

from moshi_c import Model


async def realtime_conversation(
    url: str, context: LLMContext | None, pcm: NDArray[np.int16]
) -> tuple[list[Frame], list[Frame]]:
    client = OpenAIRealtimeLLMService(
        # it puts "?model=" behind what it is given
        api_key=KEY,
        base_url=f"{url}/v1/realtime?seed={calls.SEED}&client=pipecat",
    )
    return await conversation(client, lambda: client._api_session_ready, context, pcm)


@scenario
async def test_pipecats_realtime_service_holds_a_call(model: Model, tmp_path: Path) -> None:
    """Package pipecat-ai, unmodified: WAV in, turns and the answer's frames and words out."""
    pcm, _ = calls.read(calls.write(tmp_path / "in.wav", calls.question()))
    async with serving(model, **PATIENT) as server:
        down, up = await realtime_conversation(websocket(server), None, pcm)
        await all_over(server)
        assert value(server, "moshi_ignored_messages_total") == 0
        assert value(server, "moshi_ended_total", reason="hung_up") == 1
    assert not [frame for frame in (*down, *up) if isinstance(frame, ErrorFrame)]
    assert said(down) == calls.ANSWER
    order = [type(frame) for frame in down]
    for first, then in (
        (ProposedUserStartedSpeakingFrame, ProposedUserStoppedSpeakingFrame),
        (ProposedUserStartedSpeakingFrame, LLMFullResponseStartFrame),
        (LLMFullResponseStartFrame, TTSStartedFrame),
        (TTSStartedFrame, TTSStoppedFrame),
        (TTSStoppedFrame, LLMFullResponseEndFrame),
    ):
        assert order.count(first) == order.count(then) == 1, (first, then)
        assert order.index(first) < order.index(then), (first, then)
    sounds = [frame.audio for frame in down if isinstance(frame, TTSAudioRawFrame)]
    voice = np.frombuffer(b"".join(sounds), np.int16)
    assert np.abs(voice).max() > 3000 and calls.RATE < len(voice) < 4 * calls.RATE


@scenario
async def test_pipecats_realtime_service_may_ask_for_a_response(model: Model) -> None:
    """It does when a context comes; its messages and instructions are nothing to the model, and no
    error, since that would end the service."""
    messages = [
        {"role": "system", "content": "You are a pirate."},
        {"role": "user", "content": "say something"},
    ]
    pcm = (32767 * calls.question()).astype(np.int16)
    async with serving(model, **PATIENT) as server:
        down, up = await realtime_conversation(websocket(server), LLMContext(messages), pcm)
        assert value(server, "moshi_ignored_messages_total") == 0
    assert not [frame for frame in (*down, *up) if isinstance(frame, ErrorFrame)]
    assert said(down) == calls.ANSWER
