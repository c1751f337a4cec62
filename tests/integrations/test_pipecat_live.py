"""Pipecat's published client of OpenAI's Live API, at our server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import calls
import numpy as np
from callers import all_over, scenario, serving, value, websocket
from clients import KEY, PATIENT
from numpy.typing import NDArray
from pipecat.frames.frames import (
    ErrorFrame,
    Frame,
    LLMContextFrame,
    LLMFullResponseEndFrame,
    LLMFullResponseStartFrame,
    LLMTextFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
    TTSTextFrame,
)
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.services.openai.live.llm import OpenAILiveLLMService
from pipecat.tests.utils import SleepFrame, run_test
from test_pipecat import START_S, heard, said, voice

from moshi_c import Model

RESPONSE = (
    LLMFullResponseStartFrame,
    TTSStartedFrame,
    LLMTextFrame,
    TTSTextFrame,
    TTSStoppedFrame,
    LLMFullResponseEndFrame,
)


def service(url: str) -> OpenAILiveLLMService:
    return OpenAILiveLLMService(api_key=KEY, base_url=f"{url}/v1/live/sessions?seed={calls.SEED}")


async def conversation(
    client: Any, ready: Callable[[], Any], context: LLMContext | None, pcm: NDArray[np.int16]
) -> tuple[list[Frame], list[Frame]]:
    """What comes down and up a pipeline of a client that is given the context, hears the samples in
    real time from when it is ready, then ends."""

    def frames() -> Iterator[Frame]:
        if context is not None:
            yield LLMContextFrame(context)
        while not ready():
            yield SleepFrame(0.01)
        for frame in heard(pcm):
            yield frame
            yield SleepFrame(0.02)

    down, up = await run_test(client, frames_to_send=frames(), start_timeout=START_S)  # type: ignore[arg-type]
    return list(down), list(up)


async def live_conversation(
    url: str, context: LLMContext, pcm: NDArray[np.int16]
) -> tuple[list[Frame], list[Frame]]:
    client = service(url)
    started: list[Any] = []
    client.add_event_handler("on_session_started", lambda *given: started.append(given))
    return await conversation(client, lambda: started, context, pcm)


@scenario
async def test_pipecats_live_service_holds_a_call(model: Model, tmp_path: Path) -> None:
    """Package pipecat-ai, unmodified: WAV in, the answer's frames and words out."""
    pcm, _ = calls.read(calls.write(tmp_path / "in.wav", calls.question()))
    async with serving(model, **PATIENT) as server:
        down, up = await live_conversation(websocket(server), LLMContext(), pcm)
        await all_over(server)
        assert value(server, "moshi_ignored_messages_total") == 0
        assert value(server, "moshi_ended_total", reason="finished") == 1
    assert said(down) == calls.ANSWER
    order = [type(frame) for frame in down if type(frame) in RESPONSE]
    words = len(calls.ANSWER.split())
    assert order == [*RESPONSE[:2], *RESPONSE[2:4] * words, *RESPONSE[4:]]
    expected, _ = calls.alone(model, pcm)
    given = voice(down)[: len(expected)]
    assert len(given) > 0.9 * len(expected)
    assert calls.is_spoken(given, expected[: len(given)])
    assert not [frame for frame in (*down, *up) if isinstance(frame, ErrorFrame)]


@scenario
async def test_pipecats_live_service_is_told_what_the_model_has_not(model: Model) -> None:
    """Instructions are refused by an error that ends nothing; what the model shall open the
    conversation with is said."""
    messages = [
        {"role": "system", "content": "You are a pirate."},
        {"role": "developer", "content": "the sky is blue"},
    ]
    silence = np.zeros(2 * calls.RATE, np.int16)
    async with serving(model, **PATIENT) as server:
        down, up = await live_conversation(websocket(server), LLMContext(messages), silence)
    assert said(down) == "the sky is blue"
    errors = [frame for frame in up if isinstance(frame, ErrorFrame)]
    assert len(errors) == 1 and not errors[0].fatal
    assert "session.instructions" in errors[0].error


@scenario
async def test_pipecats_live_service_is_refused_without_the_token(model: Model) -> None:
    async with serving(model, token="another one") as server:
        frames = [SleepFrame(0.1)]
        client = service(websocket(server))
        _, up = await run_test(client, frames_to_send=frames, start_timeout=START_S)
        assert value(server, "moshi_refused_total", reason="token") == 1
    assert any("401" in frame.error for frame in up if isinstance(frame, ErrorFrame))
