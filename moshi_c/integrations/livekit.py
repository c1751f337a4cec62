"""Moshi as a full-duplex model of LiveKit Agents: `pip install "moshi_c[livekit]"`.

    session = AgentSession(llm=MoshiDuplexModel(moshi_c.load("kyutai/moshiko-pytorch-bf16")))
    await session.start(Agent(instructions=""), room=room)

It listens and speaks at the same time, and decides on its own when to do which: there are no turns
to detect, and nothing to interrupt. `examples/livekit_agent.py` is a whole agent.

Its speech, with the words in time, becomes generations of the framework; the user's turns are told
by the level of the user's voice, without a transcript; metrics tell the time from the user's last
sound to the reply, and tokens. `agent.duplex_session.say(text)` puts words into its mouth. It
follows no instructions, calls no tools and reads no chat context.

When no sound comes in, it hears silence (see `moshi_c.integrations.conversation`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterable
from typing import Any

from ..audio import to_int16
from ..errors import MoshiError
from ..model import Model
from ..session import Stats
from ..turns import Moment, Reply
from .conversation import (
    BACKLOG,
    RATE,
    Conversation,
    SharedModel,
    from_int16,
    log,
)

try:
    from livekit import rtc
    from livekit.agents import llm, utils
    from livekit.agents.metrics import RealtimeModelMetrics
    from livekit.agents.metrics.base import Metadata
    from livekit.agents.types import NOT_GIVEN, NotGivenOr
except ImportError as error:
    raise ImportError(
        f"moshi_c.integrations.livekit needs LiveKit Agents 1.8.9 or later ({error}); "
        'install it with pip install "moshi_c[livekit]"'
    ) from error

#: In the userdata of a frame of output: whether the model is speaking.
_SPEAKING = "moshi_c.speaking"


class MoshiDuplexModel(llm.DuplexModel):
    """A model of the Moshi family in this process; each session takes one of its slots."""

    def __init__(
        self,
        model: Model | str | os.PathLike[str] | None = None,
        *,
        silence_after: float | None = 0.2,
        user_level: float = -45.0,
        **options: Any,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            model: what `moshi_c.load` gave; or its source, which is loaded when the first session
                begins and closed by `aclose`. None: the model in the package.
            silence_after: seconds without sound after which the model hears silence; None: never.
            user_level: the user's voice is above this, dBFS.
            options: of `moshi_c.Session`: seed, text_temperature and the like.
        """
        super().__init__(
            capabilities=llm.DuplexCapabilities(
                user_transcription=False, auto_tool_reply_generation=False
            )
        )
        self._shared = SharedModel(model)
        self._name = model.family if isinstance(model, Model) else os.fspath(model or "moshi-tiny")
        self._options = {"silence_after": silence_after, "user_level": user_level, **options}

    @property
    def model(self) -> str:
        """Its family, or where it is loaded from."""
        return self._name

    @property
    def provider(self) -> str:
        """This package."""
        return "moshi_c"

    def audio_gate(self) -> llm.AudioGate:
        """Open while the model is speaking, as its own text and level tell."""
        return _SpeakingGate()

    def session(self) -> MoshiDuplexSession:
        """A conversation, which takes a slot when it is configured."""
        return MoshiDuplexSession(self)

    def _conversation(self) -> Conversation:
        return Conversation(self._shared, **self._options)

    async def aclose(self) -> None:
        """Closes the model if it was loaded here."""
        await asyncio.to_thread(self._shared.close)


class _SpeakingGate:
    def update(self, frame: rtc.AudioFrame) -> bool:
        """Whether the frame belongs to speech."""
        return bool(frame.userdata.get(_SPEAKING))

    def deactivate(self) -> None:
        """Nothing is kept from frame to frame."""


class MoshiDuplexSession(llm.DuplexSession[Any]):
    """One conversation, in a running agent `agent.duplex_session`."""

    def __init__(self, duplex_model: MoshiDuplexModel) -> None:
        """For `MoshiDuplexModel.session`, in a running event loop."""
        super().__init__(duplex_model)
        self._conversation = duplex_model._conversation()
        self._audio: utils.aio.Chan[llm.DuplexAudioFrame] = utils.aio.Chan()
        self._reported = 0  # frames in the metrics
        self._warned_dropped = self._warned_instructions = False
        self._talking = asyncio.create_task(self._talk(), name="MoshiDuplexSession")

    @property
    def stats(self) -> Stats | None:
        """How fast the session steps; None before the start and after the end."""
        return self._conversation.stats

    def say(self, text: str) -> None:
        """Makes the model say this from its next frame on.

        Raises:
            CheckpointError: the model was loaded without a tokenizer.
            ValueError: a letter or digit that the model's vocabulary lacks.
        """
        self._conversation.say(text)

    @property
    def audio_stream(self) -> AsyncIterable[llm.DuplexAudioFrame]:
        """What the model says, its silence included."""
        stream: AsyncIterable[llm.DuplexAudioFrame] = self._audio
        return stream

    @property
    def tools(self) -> llm.ToolContext:
        """None."""
        return llm.ToolContext.empty()

    def push_audio(self, frame: rtc.AudioFrame) -> None:
        """What the user says, at any rate. Ignored when closed."""
        self._conversation.hear(
            from_int16(frame.data.cast("B"), frame.num_channels), frame.sample_rate
        )
        if self._conversation.dropped and not self._warned_dropped:
            self._warned_dropped = True
            log.warning(
                "the model is slower than the sound that comes in: "
                "more than %d frames wait, and the oldest are dropped",
                BACKLOG,
            )

    async def aclose(self) -> None:
        """Gives the slot back at once."""
        await super().aclose()
        await utils.aio.cancel_and_wait(self._talking)
        await self._conversation.close()

    # ---- the conversation ------------------------------------------------------------------------

    async def _talk(self) -> None:
        try:
            await self._configured.wait()
            if self._closing:
                return
            began = time.perf_counter()
            await self._conversation.open()
            self._report_connection_acquired(time.perf_counter() - began)
            async for moment in self._conversation:
                self._give(moment)
        except (MoshiError, ValueError, TypeError) as error:
            self.emit(
                "error",
                llm.RealtimeModelError(
                    timestamp=time.time(),
                    label=self._duplex_model.label,
                    error=error,
                    recoverable=False,
                ),
            )
        finally:
            self._audio.close()
            await self._conversation.close()

    def _give(self, moment: Moment) -> None:
        if moment.user:
            self.emit("input_speech_started", llm.InputSpeechStartedEvent())
        start = round(1000 * moment.frame.time)
        if moment.frame.text:
            self.emit(
                "transcript_delta",
                llm.DuplexOutputTranscriptDelta(
                    text=moment.frame.text, start_ms=start, end_ms=start + 80
                ),
            )
        if moment.frame.pcm is not None:
            pcm = to_int16(moment.frame.pcm)
            frame = rtc.AudioFrame(
                pcm.tobytes(), RATE, 1, len(pcm), userdata={_SPEAKING: moment.frame.speaking}
            )
            with contextlib.suppress(utils.aio.ChanClosed):
                self._audio.send_nowait(llm.DuplexAudioFrame(frame, start))
        if moment.user is False:
            self.emit(
                "input_speech_stopped",
                llm.InputSpeechStoppedEvent(user_transcription_enabled=False),
            )
        if moment.reply is not None and moment.ended:
            self._report(moment.reply, moment.frame.index + 1)

    def _report(self, reply: Reply, frames: int) -> None:
        said = reply.frames + reply.output_codes
        seconds = 0.08 * reply.frames
        session_seconds, self._reported = 0.08 * (frames - self._reported), frames
        self.emit(
            "metrics_collected",
            RealtimeModelMetrics(
                label=self._duplex_model.label,
                request_id=utils.shortuuid("moshi_"),
                timestamp=time.time(),
                duration=seconds,
                session_duration=session_seconds,
                ttft=-1 if reply.latency is None else reply.latency,
                input_tokens=reply.input_codes,
                output_tokens=said,
                total_tokens=reply.input_codes + said,
                tokens_per_second=said / seconds,
                input_token_details=RealtimeModelMetrics.InputTokenDetails(
                    audio_tokens=reply.input_codes
                ),
                output_token_details=RealtimeModelMetrics.OutputTokenDetails(
                    text_tokens=reply.frames, audio_tokens=reply.output_codes
                ),
                metadata=Metadata(
                    model_name=self._duplex_model.model, model_provider=self._duplex_model.provider
                ),
            ),
        )

    # ---- what the framework would have it know ---------------------------------------------------

    async def _update_instructions(self, instructions: str) -> None:
        if instructions.strip() and not self._warned_instructions:
            self._warned_instructions = True
            log.warning("Moshi takes no instructions; the agent's are left out")

    async def _append_items(self, items: list[llm.ChatItem]) -> None:
        """What was said before is not heard again."""

    async def _update_tools(self, tools: list[llm.Tool]) -> None:
        if tools:
            raise llm.RealtimeError("Moshi calls no tools; expected an agent without")

    def _update_options(
        self, *, tool_choice: NotGivenOr[llm.ToolChoice | None] = NOT_GIVEN
    ) -> None:
        """There is nothing to choose from."""

    def _generate_reply(
        self,
        *,
        instructions: NotGivenOr[str] = NOT_GIVEN,
        tool_choice: NotGivenOr[llm.ToolChoice] = NOT_GIVEN,
        tools: NotGivenOr[list[llm.Tool]] = NOT_GIVEN,
    ) -> None:
        raise llm.RealtimeError(
            "Moshi decides for itself when to speak and what; duplex_session.say gives it words"
        )
