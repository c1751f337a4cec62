"""Moshi as a speech-to-speech service of Pipecat: `pip install "moshi_c[pipecat]"`.

    llm = MoshiLLMService(moshi_c.load("kyutai/moshiko-pytorch-bf16"))
    Pipeline([transport.input(), users, llm, transport.output(), assistants])

It listens and speaks at the same time, so there are no turns to detect and no interruptions to
handle. `examples/pipecat_agent.py` is a whole agent.

In: InputAudioRawFrame of any rate; TTSSpeakFrame and InputTextRawFrame, whose words it says;
LLMContextFrame, which lets it speak first. It cannot follow instructions or call functions.
Out: SpeechOutputAudioRawFrame all the time, exact silence where it does not speak; its words as
LLMTextFrame and TTSTextFrame between the frames that begin and end a response;
ProposedUserStartedSpeakingFrame and ProposedUserStoppedSpeakingFrame by the user's level; metrics:
the time from the user's last sound to the response, and tokens.

When no sound comes in, it hears silence (see `moshi_c.integrations.conversation`).
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

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
)

try:
    from loguru import logger
    from pipecat.frames.frames import (
        CancelFrame,
        EndFrame,
        Frame,
        InputAudioRawFrame,
        InputTextRawFrame,
        LLMContextFrame,
        LLMFullResponseEndFrame,
        LLMFullResponseStartFrame,
        LLMServiceMetadataFrame,
        LLMTextFrame,
        ProposedUserStartedSpeakingFrame,
        ProposedUserStoppedSpeakingFrame,
        SpeechOutputAudioRawFrame,
        StartFrame,
        TTSSpeakFrame,
        TTSStartedFrame,
        TTSStoppedFrame,
        TTSTextFrame,
    )
    from pipecat.metrics.metrics import LLMTokenUsage
    from pipecat.processors.aggregators.llm_context import LLMContext
    from pipecat.processors.frame_processor import FrameDirection
    from pipecat.services.llm_service import LLMService
    from pipecat.services.settings import LLMSettings
    from pipecat.turns.user_stop import ExternalUserTurnStopStrategy
    from pipecat.turns.user_turn_strategies import ExternalUserTurnStrategies
    from pipecat.utils.text.base_text_aggregator import TextType
    from pipecat.utils.types import NOT_GIVEN, NotGiven, assert_given
except ImportError as error:
    raise ImportError(
        f"moshi_c.integrations.pipecat needs Pipecat 1.14 or later ({error}); "
        'install it with pip install "moshi_c[pipecat]"'
    ) from error

#: Seconds that sound which has come is still listened to after the end of the pipeline.
_DRAIN_SECONDS = 5.0


@dataclass
class MoshiLLMSettings(LLMSettings):
    """Settings of MoshiLLMService. `temperature` and `top_k` are those of the text, `seed` is that
    of the conversation; None is the checkpoint's, or a random one. They hold from the start.

    audio_temperature, audio_top_k: of the voice.
    """

    audio_temperature: float | NotGiven | None = field(default_factory=lambda: NOT_GIVEN)
    audio_top_k: int | NotGiven | None = field(default_factory=lambda: NOT_GIVEN)


class MoshiLLMService(LLMService):
    """A conversation with a model of the Moshi family in this process."""

    Settings = MoshiLLMSettings
    _settings: MoshiLLMSettings

    def __init__(
        self,
        model: Model | str | os.PathLike[str] | None = None,
        *,
        settings: MoshiLLMSettings | None = None,
        silence_after: float | None = 0.2,
        user_level: float = -45.0,
        **kwargs: Any,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            model: what `moshi_c.load` gave, for services that share it; or its source, which is
                loaded when the pipeline starts and closed with it. None: the model in the package.
            settings: what differs from the checkpoint's.
            silence_after: seconds without sound after which the model hears silence; None: never.
            user_level: the user's voice is above this, dBFS.
            kwargs: of LLMService.
        """
        chosen = self.Settings(
            model=model.family if isinstance(model, Model) else os.fspath(model or "moshi-tiny"),
            system_instruction=None,
            temperature=None,
            max_tokens=None,
            top_p=None,
            top_k=None,
            frequency_penalty=None,
            presence_penalty=None,
            seed=None,
            filter_incomplete_user_turns=False,
            user_turn_completion_config=None,
            audio_temperature=None,
            audio_top_k=None,
        )
        if settings is not None:
            chosen.apply_update(settings)
        super().__init__(settings=chosen, **kwargs)
        self._shared = SharedModel(model)
        self._conversation = Conversation(
            self._shared,
            silence_after=silence_after,
            user_level=user_level,
            seed=assert_given(chosen.seed),
            text_temperature=assert_given(chosen.temperature),
            text_top_k=assert_given(chosen.top_k),
            audio_temperature=assert_given(chosen.audio_temperature),
            audio_top_k=assert_given(chosen.audio_top_k),
        )
        self._talking: asyncio.Task[None] | None = None
        self._speaks = self._warned_dropped = self._warned_context = False

    def can_generate_metrics(self) -> bool:
        """It can."""
        return True

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

    def service_metadata_frame(self) -> LLMServiceMetadataFrame:
        """This service tells the user's turns; they interrupt nothing and need no transcript."""
        turns = ExternalUserTurnStrategies(enable_interruptions=False)
        turns.stop = [ExternalUserTurnStopStrategy(wait_for_transcript=False)]
        return LLMServiceMetadataFrame(service_name=self.name, user_turn_strategies=turns)

    # ---- from start to end -----------------------------------------------------------------------

    async def start(self, frame: StartFrame) -> None:
        """Loads the model, if need be, and takes a slot."""
        await super().start(frame)
        try:
            await self._conversation.open()
        except (MoshiError, ValueError, TypeError) as error:
            await self._conversation.close()
            await self._fail(error)
            return
        self._talking = self.create_task(self._talk(), "talk")

    async def stop(self, frame: EndFrame) -> None:
        """Listens to the whole frames that have come, then gives the slot back."""
        await super().stop(frame)
        self._conversation.finish()
        if self._talking is not None:
            await asyncio.wait({self._talking}, timeout=_DRAIN_SECONDS)
        await self._hang_up()

    async def cancel(self, frame: CancelFrame) -> None:
        """Gives the slot back at once."""
        await super().cancel(frame)
        await self._hang_up()

    async def cleanup(self) -> None:
        """Gives back what is still held."""
        await super().cleanup()
        await self._hang_up()
        await asyncio.to_thread(self._shared.close)

    async def _hang_up(self) -> None:
        if self._talking is not None:
            await self.cancel_task(self._talking)
            self._talking = None
        await self._conversation.close()

    async def _fail(self, error: Exception) -> None:
        await self.push_error(error_msg=str(error), exception=error, force_treat_as_permanent=True)

    # ---- frames in -------------------------------------------------------------------------------

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Takes what is for the model, and passes everything on but TTSSpeakFrame."""
        await super().process_frame(frame, direction)
        if isinstance(frame, InputAudioRawFrame):
            self._conversation.hear(from_int16(frame.audio, frame.num_channels), frame.sample_rate)
            await self._check_dropped()
        elif isinstance(frame, (TTSSpeakFrame, InputTextRawFrame)):
            try:
                self._conversation.say(frame.text)
            except ValueError as error:
                await self.push_error(error_msg=str(error), exception=error)
        elif isinstance(frame, LLMContextFrame):
            self._warn_of_instructions(frame.context)
            self._conversation.begin()
        if not isinstance(frame, TTSSpeakFrame):
            await self.push_frame(frame, direction)

    def _warn_of_instructions(self, context: LLMContext) -> None:
        roles = [message["role"] for message in context.get_messages() if isinstance(message, dict)]
        if {"system", "developer"} & set(roles) and not self._warned_context:
            self._warned_context = True
            logger.warning(
                f"{self}: Moshi takes no instructions; those of the context are left out"
            )

    async def _check_dropped(self) -> None:
        if self._conversation.dropped and not self._warned_dropped:
            self._warned_dropped = True
            await self.push_error(
                error_msg=f"the model is slower than the sound that comes in: "
                f"more than {BACKLOG} frames wait, and the oldest are dropped"
            )

    async def _update_settings(self, delta: LLMSettings) -> dict[str, Any]:
        changed: dict[str, Any] = await super()._update_settings(delta)
        self._warn_unhandled_updated_settings(changed)
        return changed

    # ---- frames out ------------------------------------------------------------------------------

    async def _talk(self) -> None:
        try:
            async for moment in self._conversation:
                await self._give(moment)
        except MoshiError as error:
            await self._fail(error)
        await self._end_response()
        await self._conversation.close()

    async def _give(self, moment: Moment) -> None:
        if moment.user:
            await self.broadcast_frame(ProposedUserStartedSpeakingFrame)
        if moment.reply is not None and moment.began:
            self._speaks = True
            if moment.reply.latency is not None:
                now = time.time()
                await self.start_ttfb_metrics(start_time=now - moment.reply.latency)
                await self.stop_ttfb_metrics(end_time=now)
            await self.push_frame(LLMFullResponseStartFrame())
            await self.push_frame(TTSStartedFrame())
        if moment.frame.text:
            await self._give_text(moment.frame.text)
        if moment.frame.pcm is not None:
            # What is silent to the last bit tells the transport that the bot has stopped speaking.
            pcm = moment.frame.pcm if moment.frame.speaking else np.zeros_like(moment.frame.pcm)
            await self.push_frame(SpeechOutputAudioRawFrame(to_int16(pcm).tobytes(), RATE, 1))
        if moment.user is False:
            await self.broadcast_frame(ProposedUserStoppedSpeakingFrame)
        if moment.reply is not None and moment.ended:
            await self._end_response()
            await self.start_llm_usage_metrics(_usage(moment.reply))

    async def _give_text(self, text: str) -> None:
        # Clients read the first, the context is made of the second.
        shown = LLMTextFrame(text)
        shown.append_to_context = False
        await self.push_frame(shown)
        spoken = TTSTextFrame(text, text_type=TextType.WORD)
        spoken.includes_inter_frame_spaces = True
        await self.push_frame(spoken)

    async def _end_response(self) -> None:
        if self._speaks:
            self._speaks = False
            await self.push_frame(TTSStoppedFrame())
            await self.push_frame(LLMFullResponseEndFrame())


def _usage(reply: Reply) -> LLMTokenUsage:
    """One token is a code of sound, or what the model thinks in a frame."""
    said = reply.frames + reply.output_codes
    return LLMTokenUsage(
        prompt_tokens=reply.input_codes,
        completion_tokens=said,
        total_tokens=reply.input_codes + said,
        input_audio_tokens=reply.input_codes,
        output_audio_tokens=reply.output_codes,
    )
