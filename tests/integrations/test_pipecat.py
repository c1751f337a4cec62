"""MoshiLLMService in pipelines of Pipecat's own test harness."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import calls
import numpy as np
import pytest
from numpy.typing import NDArray
from pipecat.frames.frames import (
    CancelFrame,
    ErrorFrame,
    Frame,
    InputAudioRawFrame,
    InputTextRawFrame,
    InterruptionFrame,
    LLMContextFrame,
    LLMFullResponseEndFrame,
    LLMFullResponseStartFrame,
    LLMTextFrame,
    MetricsFrame,
    ProposedUserStartedSpeakingFrame,
    ProposedUserStoppedSpeakingFrame,
    SpeechOutputAudioRawFrame,
    TTSSpeakFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
    TTSTextFrame,
    UserStartedSpeakingFrame,
    UserStoppedSpeakingFrame,
)
from pipecat.metrics.metrics import LLMUsageMetricsData, TTFBMetricsData
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair
from pipecat.tests.utils import SleepFrame, run_test

import moshi_c
from moshi_c.integrations.pipecat import MoshiLLMService

START_S = 60.0


def service(model: moshi_c.Model | None, **options: Any) -> MoshiLLMService:
    return MoshiLLMService(model, settings=MoshiLLMService.Settings(seed=calls.SEED), **options)


def heard(pcm: NDArray[np.int16], rate: int = calls.RATE, ms: int = 20) -> list[Frame]:
    """The samples as a transport gives them."""
    step = rate * ms // 1000
    return [
        InputAudioRawFrame(pcm[i : i + step].tobytes(), rate, 1) for i in range(0, len(pcm), step)
    ]


def wav(path: Path, **options: Any) -> list[Frame]:
    return heard(*calls.read(calls.write(path, calls.question(), **options)))


async def down(processor: Any, frames: Sequence[Frame], **options: Any) -> list[Frame]:
    given, _ = await run_test(processor, frames_to_send=frames, start_timeout=START_S, **options)
    return list(given)


def said(frames: Sequence[Frame]) -> str:
    return "".join(frame.text for frame in frames if isinstance(frame, TTSTextFrame)).strip()


def voice(frames: Sequence[Frame]) -> NDArray[np.int16]:
    parts = [frame for frame in frames if isinstance(frame, SpeechOutputAudioRawFrame)]
    assert all(part.sample_rate == calls.RATE and part.num_channels == 1 for part in parts)
    return np.frombuffer(b"".join(part.audio for part in parts), np.int16)


@pytest.mark.parametrize("rate", [8000, 16000, 24000, 48000])
def test_a_question_in_a_wav_file_is_answered_in_another(
    model: moshi_c.Model, tmp_path: Path, rate: int
) -> None:
    frames = asyncio.run(down(service(model), wav(tmp_path / "in.wav", rate=rate)))
    assert said(frames) == calls.ANSWER
    calls.write(tmp_path / "out.wav", voice(frames).astype(np.float32) / 32768)
    spoken, _ = calls.read(tmp_path / "out.wav")
    loud = np.flatnonzero(np.abs(spoken) > 1000) / calls.RATE
    assert 1.5 < loud[0] < 4.0 and 0.5 < loud[-1] - loud[0] < 3.0


def test_the_voice_is_bit_for_bit_the_session_s_where_it_speaks(
    model: moshi_c.Model, tmp_path: Path
) -> None:
    pcm, _ = calls.read(calls.write(tmp_path / "in.wav", calls.question()))
    frames = asyncio.run(down(service(model), heard(pcm, ms=10)))
    expected, text = calls.alone(model, pcm)
    given = voice(frames)
    assert text == said(frames) == calls.ANSWER and len(given) == len(expected)
    assert calls.is_spoken(given, expected)


def test_a_response_is_framed_and_its_words_come_twice(
    model: moshi_c.Model, tmp_path: Path
) -> None:
    frames = asyncio.run(down(service(model), wav(tmp_path / "in.wav")))
    kinds = (
        LLMFullResponseStartFrame,
        TTSStartedFrame,
        LLMTextFrame,
        TTSTextFrame,
        TTSStoppedFrame,
        LLMFullResponseEndFrame,
    )
    order = [type(frame) for frame in frames if type(frame) in kinds]
    words = len(calls.ANSWER.split())
    assert order == [*kinds[:2], *[LLMTextFrame, TTSTextFrame] * words, *kinds[4:]]
    texts = [frame for frame in frames if type(frame) is LLMTextFrame]
    assert not any(frame.append_to_context for frame in texts)


def test_the_user_s_turns_are_proposed_both_ways(model: moshi_c.Model, tmp_path: Path) -> None:
    frames, up = asyncio.run(
        run_test(service(model), frames_to_send=wav(tmp_path / "in.wav"), start_timeout=START_S)
    )
    kinds = (ProposedUserStartedSpeakingFrame, ProposedUserStoppedSpeakingFrame)
    for each in (frames, up):
        assert [type(frame) for frame in each if isinstance(frame, kinds)] == list(kinds)


def test_the_user_s_turns_and_the_answer_reach_the_context(
    model: moshi_c.Model, tmp_path: Path
) -> None:
    context = LLMContext()
    pair = LLMContextAggregatorPair(context)
    pipeline = Pipeline([pair.user(), service(model), pair.assistant()])
    frames = asyncio.run(down(pipeline, [*wav(tmp_path / "in.wav"), SleepFrame(1.0)]))
    kinds = (UserStartedSpeakingFrame, UserStoppedSpeakingFrame, InterruptionFrame)
    turns = [type(frame) for frame in frames if isinstance(frame, kinds)]
    assert turns == [UserStartedSpeakingFrame, UserStoppedSpeakingFrame]
    assert [(m["role"], m["content"]) for m in context.get_messages()] == [
        ("assistant", calls.ANSWER)
    ]


def test_metrics_tell_the_latency_and_the_tokens(model: moshi_c.Model, tmp_path: Path) -> None:
    params = PipelineParams(enable_metrics=True, enable_usage_metrics=True)
    frames = asyncio.run(down(service(model), wav(tmp_path / "in.wav"), pipeline_params=params))
    data = [item for f in frames if isinstance(f, MetricsFrame) for item in f.data]
    latency = [item.value for item in data if isinstance(item, TTFBMetricsData) and item.value]
    usage = [item.value for item in data if isinstance(item, LLMUsageMetricsData)]
    assert len(latency) == len(usage) == 1
    assert latency[0] == pytest.approx(0.4, abs=0.3)
    assert usage[0].total_tokens == usage[0].prompt_tokens + usage[0].completion_tokens
    # 8 codes a frame each way, and a text token
    assert usage[0].completion_tokens == usage[0].prompt_tokens // 8 * 9


@pytest.mark.parametrize("kind", [TTSSpeakFrame, InputTextRawFrame])
def test_injected_text_is_spoken(model: moshi_c.Model, kind: type[Frame]) -> None:
    silence = heard(np.zeros(3 * calls.RATE, np.int16))
    frames = asyncio.run(down(service(model), [kind("my name is anna"), *silence]))
    assert said(frames) == "my name is anna"
    assert np.abs(voice(frames)).max() > 3000
    assert any(isinstance(f, kind) for f in frames) == (kind is InputTextRawFrame)


def test_what_the_vocabulary_cannot_spell_is_an_error_and_the_call_goes_on(
    model: moshi_c.Model, tmp_path: Path
) -> None:
    async def call() -> tuple[Sequence[Frame], Sequence[Frame]]:
        frames = [TTSSpeakFrame("Ωμέγα"), *wav(tmp_path / "in.wav")]
        return await run_test(service(model), frames_to_send=frames, start_timeout=START_S)

    frames, up = asyncio.run(call())
    errors = [frame.error for frame in up if isinstance(frame, ErrorFrame)]
    assert len(errors) == 1 and "vocabulary" in errors[0]
    assert said(frames) == calls.ANSWER


def test_the_answer_comes_when_the_sound_stops_with_the_question(
    model: moshi_c.Model, tmp_path: Path
) -> None:
    path = calls.write(tmp_path / "in.wav", calls.question(after=0.0))
    frames = asyncio.run(down(service(model), [*heard(*calls.read(path)), SleepFrame(5.0)]))
    assert said(frames) == calls.ANSWER
    assert any(isinstance(frame, TTSStoppedFrame) for frame in frames)


def test_without_silence_nothing_is_stepped_but_what_is_heard(model: moshi_c.Model) -> None:
    frames = heard(np.zeros(10 * calls.FRAME, np.int16))
    given = asyncio.run(down(service(model, silence_after=None), [*frames, SleepFrame(0.6)]))
    assert len(voice(given)) == 10 * calls.FRAME


def test_a_context_starts_the_clock_so_that_the_model_may_speak_first(
    model: moshi_c.Model,
) -> None:
    frames = [LLMContextFrame(LLMContext()), SleepFrame(1.0)]
    assert len(voice(asyncio.run(down(service(model), frames)))) >= 3 * calls.FRAME


def test_the_model_is_loaded_and_closed_by_a_service_of_its_own(tmp_path: Path) -> None:
    alone = service(None)
    frames = asyncio.run(down(alone, wav(tmp_path / "in.wav")))
    assert said(frames) == calls.ANSWER and alone.stats is None


def test_end_frees_the_slot(single: moshi_c.Model) -> None:
    async def call() -> bool:
        await down(service(single), heard(np.zeros(calls.RATE, np.int16)))
        return calls.is_free(single)

    assert asyncio.run(call())


def test_cancel_frees_the_slot_and_leaves_waiting_sound_unheard(single: moshi_c.Model) -> None:
    async def call() -> tuple[list[Frame], bool]:
        frames = [*heard(np.zeros(20 * calls.RATE, np.int16), ms=1000), CancelFrame()]
        given = await down(service(single), frames, send_end_frame=False)
        return given, calls.is_free(single)

    frames, free = asyncio.run(call())
    assert free and len(voice(frames)) < 20 * calls.RATE


def test_a_full_model_is_an_error_and_the_pipeline_ends_as_ever(single: moshi_c.Model) -> None:
    async def call() -> Sequence[Frame]:
        with moshi_c.Session(single):
            _, up = await run_test(
                service(single),
                frames_to_send=heard(np.zeros(calls.RATE, np.int16)),
                start_timeout=START_S,
            )
        return up

    errors = [frame.error for frame in asyncio.run(call()) if isinstance(frame, ErrorFrame)]
    assert len(errors) == 1 and "session" in errors[0]


def test_two_calls_share_a_model_and_an_event_loop(model: moshi_c.Model, tmp_path: Path) -> None:
    async def call() -> tuple[list[list[Frame]], int]:
        async with calls.Ticks() as ticks:
            both = await asyncio.gather(
                *(down(service(model), wav(tmp_path / f"{i}.wav")) for i in range(2))
            )
        return both, ticks.count

    both, ticks = asyncio.run(call())
    assert [said(frames) for frames in both] == [calls.ANSWER] * 2
    assert np.array_equal(voice(both[0]), voice(both[1]))
    assert ticks > len(voice(both[0])) // calls.FRAME // 2  # the loop came around meanwhile


def test_the_example_answers_a_question_in_a_file(tmp_path: Path) -> None:
    printed, voice = calls.example("pipecat_agent.py", tmp_path)
    assert calls.ANSWER in printed and np.abs(voice).max() > 3000
