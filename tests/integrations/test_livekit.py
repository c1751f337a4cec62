"""MoshiDuplexModel in LiveKit's AgentSession and in its DuplexRealtimeAdapter, without a room."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import calls
import numpy as np
import pytest
from livekit import rtc
from livekit.agents import Agent, AgentSession, function_tool, llm
from livekit.agents.metrics import RealtimeModelMetrics
from livekit.agents.voice import io
from numpy.typing import NDArray

import moshi_c
from moshi_c.integrations.livekit import MoshiDuplexModel, MoshiDuplexSession


def pieces(pcm: NDArray[np.int16], rate: int = calls.RATE, ms: int = 10) -> list[rtc.AudioFrame]:
    """The samples as a room gives them."""
    step = rate * ms // 1000
    return [
        rtc.AudioFrame(pcm[i : i + step].tobytes(), rate, 1, len(pcm[i : i + step]))
        for i in range(0, len(pcm), step)
    ]


def samples(frames: list[rtc.AudioFrame]) -> NDArray[np.int16]:
    assert all(frame.sample_rate == calls.RATE for frame in frames)
    return np.frombuffer(b"".join(bytes(frame.data) for frame in frames), np.int16)


class Microphone(io.AudioInput):
    """A WAV file, then nothing more, as when a microphone is muted."""

    def __init__(self, frames: list[rtc.AudioFrame]) -> None:
        super().__init__(label="file")
        self._frames = iter(frames)

    async def __anext__(self) -> rtc.AudioFrame:
        await asyncio.sleep(0)
        for frame in self._frames:
            return frame
        await asyncio.Event().wait()
        raise StopAsyncIteration


class Speaker(io.AudioOutput):
    """Keeps what is played; the time it takes is none."""

    def __init__(self) -> None:
        super().__init__(
            label="kept", capabilities=io.AudioOutputCapabilities(pause=False), sample_rate=None
        )
        self.frames: list[rtc.AudioFrame] = []
        self._seconds = 0.0

    async def capture_frame(self, frame: rtc.AudioFrame) -> None:
        await super().capture_frame(frame)
        if not self._seconds:
            self.on_playback_started(created_at=0.0)
        self._seconds += frame.duration
        self.frames.append(frame)

    def flush(self) -> None:
        super().flush()
        if self._seconds:
            seconds, self._seconds = self._seconds, 0.0
            self.on_playback_finished(playback_position=seconds, interrupted=False)

    def clear_buffer(self) -> None:
        self.flush()


class AgentCall:
    """An agent in a session of the framework."""

    def __init__(
        self, model: MoshiDuplexModel, frames: list[rtc.AudioFrame], agent: Agent | None = None
    ) -> None:
        self.agent = agent or Agent(instructions="")
        self.session = AgentSession(llm=model)
        self.speaker = Speaker()
        self.session.input.audio = Microphone(frames)
        self.session.output.audio = self.speaker
        self.events: list[tuple[str, Any]] = []
        for name in (
            "conversation_item_added",
            "user_state_changed",
            "agent_state_changed",
            "metrics_collected",
            "error",
        ):
            self.session.on(name, lambda event, name=name: self.events.append((name, event)))

    def of(self, name: str) -> list[Any]:
        return [event for kind, event in self.events if kind == name]

    def said(self) -> list[str]:
        items = [event.item for event in self.of("conversation_item_added")]
        return [item.text_content for item in items if isinstance(item, llm.ChatMessage)]

    async def __aenter__(self) -> AgentCall:
        await self.session.start(self.agent)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.session.aclose()


async def until(done: Callable[[], Any], seconds: float = 60.0) -> None:
    async def wait() -> None:
        while not done():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(wait(), seconds)


def metrics(events: list[Any]) -> list[RealtimeModelMetrics]:
    kept = [getattr(event, "metrics", event) for event in events]
    return [each for each in kept if each.output_tokens]


@pytest.mark.parametrize("rate", [16000, 24000, 48000])
def test_an_agent_answers_a_question_in_a_wav_file(
    model: moshi_c.Model, tmp_path: Path, rate: int
) -> None:
    path = calls.write(tmp_path / "in.wav", calls.question(), rate)

    async def call() -> AgentCall:
        duplex = MoshiDuplexModel(model, seed=calls.SEED)
        async with AgentCall(duplex, pieces(*calls.read(path))) as made:
            await until(made.said)
            await until(lambda: metrics(made.of("metrics_collected")))
        return made

    made = asyncio.run(call())
    assert [text.strip() for text in made.said()] == [calls.ANSWER] and not made.of("error")
    voice = samples(made.speaker.frames).astype(np.float32) / 32768
    spoken, _ = calls.read(calls.write(tmp_path / "out.wav", voice))
    assert np.abs(spoken).max() > 3000 and 1.0 < len(spoken) / calls.RATE < 4.0
    assert ("listening", "speaking") in [
        (event.old_state, event.new_state) for event in made.of("agent_state_changed")
    ]
    assert [event.new_state for event in made.of("user_state_changed")][:2] == [
        "speaking",
        "listening",
    ]
    (report,) = metrics(made.of("metrics_collected"))
    assert report.ttft == pytest.approx(0.4, abs=0.3) and report.session_duration > 3
    assert report.output_tokens == report.input_tokens // 8 * 9
    assert report.metadata and report.metadata.model_provider == "moshi_c"


def test_text_that_an_agent_injects_is_spoken(model: moshi_c.Model) -> None:
    async def call() -> AgentCall:
        async with AgentCall(MoshiDuplexModel(model, seed=calls.SEED), []) as made:
            made.agent.duplex_session.say("my name is anna")
            await until(made.said)
        return made

    made = asyncio.run(call())
    assert [text.strip() for text in made.said()] == ["my name is anna"]
    assert np.abs(samples(made.speaker.frames)).max() > 3000


class Direct:
    """A session under the adapter that AgentSession puts around it."""

    def __init__(self, model: moshi_c.Model | None, **options: Any) -> None:
        self.model = MoshiDuplexModel(model, seed=calls.SEED, **options)

    async def __aenter__(self) -> Direct:
        self.adapter = llm.DuplexRealtimeAdapter(self.model)
        self.session = self.adapter.session()
        self.duplex: MoshiDuplexSession = self.session.duplex_session
        self.heard: list[rtc.AudioFrame] = []
        self.text = ""
        self.errors: list[llm.RealtimeModelError] = []
        self.readers: list[asyncio.Task[None]] = []
        self.done = 0
        self.session.on("generation_created", self._read)
        self.session.on("error", self.errors.append)
        await self.session._update_session(instructions="", tools=[])
        return self

    def _read(self, generation: llm.GenerationCreatedEvent) -> None:
        async def read() -> None:
            async for message in generation.message_stream:
                async for frame in message.audio_stream:
                    self.heard.append(frame)
                async for text in message.text_stream:
                    self.text += text
            self.done += 1

        self.readers.append(asyncio.create_task(read()))

    def hear(self, pcm: NDArray[np.int16], rate: int = calls.RATE) -> None:
        for frame in pieces(pcm, rate):
            self.session.push_audio(frame)

    async def __aexit__(self, *exc: object) -> None:
        await self.session.aclose()
        await self.model.aclose()


def test_the_voice_is_bit_for_bit_the_session_s_where_it_speaks(
    model: moshi_c.Model, tmp_path: Path
) -> None:
    pcm, _ = calls.read(calls.write(tmp_path / "in.wav", calls.question()))

    async def call() -> Direct:
        async with Direct(model, silence_after=None) as made:
            made.hear(pcm)
            await until(lambda: made.done)
        return made

    made = asyncio.run(call())
    assert made.text.strip() == calls.ANSWER
    expected, _ = calls.alone(model, pcm)
    voice = samples(made.heard)
    first = np.flatnonzero(np.abs(expected) > 20)[0] // calls.FRAME * calls.FRAME
    begins = range(0, first + 1, calls.FRAME)
    assert any(np.array_equal(voice, expected[i : i + len(voice)]) for i in begins)


def test_the_answer_comes_when_the_microphone_is_muted_after_the_question(
    model: moshi_c.Model, tmp_path: Path
) -> None:
    path = calls.write(tmp_path / "in.wav", calls.question(after=0.0))

    async def call() -> str:
        async with Direct(model) as made:
            made.hear(*calls.read(path))
            await until(lambda: made.done)
            return made.text

    assert asyncio.run(call()).strip() == calls.ANSWER


def test_a_model_of_its_own_is_loaded_and_closed(tmp_path: Path) -> None:
    pcm, _ = calls.read(calls.write(tmp_path / "in.wav", calls.question()))

    async def call() -> str:
        async with Direct(None) as made:
            made.hear(pcm)
            await until(lambda: made.done)
            return made.text

    assert asyncio.run(call()).strip() == calls.ANSWER


def test_aclose_frees_the_slot_and_late_sound_is_ignored(single: moshi_c.Model) -> None:
    async def call() -> None:
        async with Direct(single) as made:
            made.hear(np.zeros(20 * calls.RATE, np.int16))
            await until(lambda: made.duplex.stats and made.duplex.stats.frames)
            assert not calls.is_free(single)
        assert calls.is_free(single)
        made.hear(np.zeros(calls.RATE, np.int16))
        assert made.duplex.stats is None and not made.errors

    asyncio.run(call())


def test_a_session_that_is_closed_before_it_is_configured_takes_no_slot(
    single: moshi_c.Model,
) -> None:
    async def call() -> None:
        session = MoshiDuplexModel(single).session()
        await asyncio.sleep(0)
        await session.aclose()
        assert calls.is_free(single)

    asyncio.run(call())


def test_a_full_model_is_an_error_of_the_session(single: moshi_c.Model) -> None:
    async def call() -> list[llm.RealtimeModelError]:
        with moshi_c.Session(single):
            async with Direct(single) as made:
                await until(lambda: made.errors)
        return made.errors

    (error,) = asyncio.run(call())
    assert isinstance(error.error, moshi_c.SessionError) and not error.recoverable


def test_tools_and_replies_on_demand_are_refused_with_a_sentence(model: moshi_c.Model) -> None:
    @function_tool
    async def weather() -> str:
        """Never called."""
        return "wet"

    async def call() -> None:
        async with Direct(model) as made:
            with pytest.raises(llm.RealtimeError, match="calls no tools"):
                await made.session.update_tools([weather])
            with pytest.raises(llm.RealtimeError, match=r"duplex_session\.say"):
                await made.session.generate_reply(instructions="Greet the user.")

    asyncio.run(call())


def test_two_calls_share_a_model_and_an_event_loop(model: moshi_c.Model, tmp_path: Path) -> None:
    pcm, _ = calls.read(calls.write(tmp_path / "in.wav", calls.question()))

    async def one() -> Direct:
        async with Direct(model) as made:
            made.hear(pcm)
            await until(lambda: made.done)
        return made

    async def both() -> tuple[list[Direct], int]:
        async with calls.Ticks() as ticks:
            return await asyncio.gather(one(), one()), ticks.count

    made, ticks = asyncio.run(both())
    assert [call.text.strip() for call in made] == [calls.ANSWER] * 2
    assert ticks > len(made[0].heard) // 2  # the loop came around meanwhile


def test_the_example_answers_a_question_in_a_file(tmp_path: Path) -> None:
    printed, voice = calls.example("livekit_agent.py", tmp_path)
    assert f"assistant: {calls.ANSWER}" in printed and np.abs(voice).max() > 3000
