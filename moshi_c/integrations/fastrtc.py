"""Moshi as a handler of FastRTC, for browsers and telephones: `pip install "moshi_c[fastrtc]"`.

    handler = MoshiHandler(moshi_c.load("kyutai/moshiko-pytorch-bf16"))
    Stream(handler, modality="audio", mode="send-receive").ui.launch()

Each connection gets a copy of the handler, and with it a conversation of its own.
`examples/fastrtc_page.py` is a whole page.

Beside the voice it emits AdditionalOutputs with one dict each, whose "type" is
    "text"      "text" and "time" (s): what the model says;
    "speaking"  "who" ("user" or "model"), "speaking" (bool) and "time": who begins and who stops;
    "reply"     "text", "start", "seconds", "latency" (s or None), "input_tokens", "output_tokens":
                what the model has said without a pause;
    "error"     "error": a sentence. The stream closes.

Text that `Stream.set_input` gives a connection is what the model says next. When no sound comes in,
it hears silence (see `moshi_c.integrations.conversation`).
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..audio import to_int16
from ..errors import MoshiError
from ..model import Model
from ..session import Stats
from ..turns import Moment, Reply
from .conversation import RATE, Conversation, SharedModel, log

try:
    from fastrtc import AdditionalOutputs, AsyncStreamHandler, CloseStream
except ImportError as error:
    raise ImportError(
        f"moshi_c.integrations.fastrtc needs FastRTC 0.0.34 or later ({error}); "
        'install it with pip install "moshi_c[fastrtc]"'
    ) from error


class MoshiHandler(AsyncStreamHandler):
    """Conversations with a model of the Moshi family in this process."""

    def __init__(
        self,
        model: Model | str | os.PathLike[str] | SharedModel | None = None,
        *,
        silence_after: float | None = 0.2,
        user_level: float = -45.0,
        **options: Any,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            model: what `moshi_c.load` gave; or its source, which is loaded when the first
                connection begins and stays for others. None: the model in the package.
            silence_after: seconds without sound after which the model hears silence; None: never.
            user_level: the user's voice is above this, dBFS.
            options: of `moshi_c.Session`: seed, text_temperature and the like.
        """
        super().__init__("mono", output_sample_rate=RATE, input_sample_rate=RATE)
        self._shared = model if isinstance(model, SharedModel) else SharedModel(model)
        self._options = {"silence_after": silence_after, "user_level": user_level, **options}
        self._conversation = Conversation(self._shared, **self._options)
        self._outputs: asyncio.Queue[Any] = asyncio.Queue()
        self._talking: asyncio.Task[Any] | None = None
        self._loop_here: asyncio.AbstractEventLoop | None = None

    def copy(self) -> MoshiHandler:
        """Another conversation with the same model."""
        return MoshiHandler(self._shared, **self._options)

    @property
    def stats(self) -> Stats | None:
        """How fast the session steps; None before the start and after the end."""
        return self._conversation.stats

    def say(self, text: str) -> None:
        """Makes the model say this from its next frame on. For the stream's event loop; other
        threads have `Stream.set_input`.

        Raises:
            CheckpointError: the model was loaded without a tokenizer.
            ValueError: a letter or digit that the model's vocabulary lacks.
        """
        self._conversation.say(text)

    def set_args(self, args: list[Any]) -> None:
        """Input for this connection, from any thread; the model says what is text of it."""
        super().set_args(args)
        for text in args:
            if isinstance(text, str) and text.strip():
                if self._loop_here is None:
                    self._say(text)
                else:
                    self._loop_here.call_soon_threadsafe(self._say, text)

    def _say(self, text: str) -> None:
        try:
            self.say(text)
        except ValueError as error:
            log.warning("%s", error)  # who set it has gone on

    # ---- called by the stream --------------------------------------------------------------------

    async def start_up(self) -> None:
        """The conversation, from beginning to end. A stream makes it a task, which it cancels when
        a websocket closes; for other connections it calls `shutdown`."""
        self._talking, self._loop_here = asyncio.current_task(), asyncio.get_running_loop()
        try:
            await self._conversation.open()
            async for moment in self._conversation:
                self._give(moment)
        except (MoshiError, ValueError, TypeError) as error:
            self._tell(type="error", error=str(error))
            self._outputs.put_nowait(CloseStream(str(error)))
        finally:
            await self._conversation.close()

    async def receive(self, frame: tuple[int, NDArray[np.int16]]) -> None:
        """What the user says. Ignored when closed."""
        rate, samples = frame
        self._conversation.hear(np.squeeze(samples), rate)

    async def emit(self) -> Any:
        """What the model says, when it is there."""
        return await self._outputs.get()

    async def shutdown(self) -> None:
        """Gives the slot back at once."""
        if self._talking is not None:
            self._talking.cancel()
            await asyncio.wait({self._talking})
        await self._conversation.close()

    # ---- the conversation ------------------------------------------------------------------------

    def _tell(self, **facts: Any) -> None:
        self._outputs.put_nowait(AdditionalOutputs(facts))

    def _give(self, moment: Moment) -> None:
        time = moment.frame.time
        if moment.user is not None:
            self._tell(type="speaking", who="user", speaking=moment.user, time=time)
        if moment.began:
            self._tell(type="speaking", who="model", speaking=True, time=time)
        if moment.frame.text:
            self._tell(type="text", text=moment.frame.text, time=time)
        if moment.frame.pcm is not None:
            self._outputs.put_nowait((RATE, to_int16(moment.frame.pcm)[None]))
        if moment.reply is not None and moment.ended:
            self._tell(type="speaking", who="model", speaking=False, time=time)
            self._tell(type="reply", **_facts(moment.reply))


def _facts(reply: Reply) -> dict[str, Any]:
    return {
        "text": reply.text.strip(),
        "start": reply.start,
        "seconds": 0.08 * reply.frames,
        "latency": reply.latency,
        "input_tokens": reply.input_codes,
        "output_tokens": reply.frames + reply.output_codes,
    }
