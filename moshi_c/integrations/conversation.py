"""One conversation in an event loop: sound of any rate and length in, frames out as they come.

The caller's sound is the clock: a frame is stepped as soon as it is whole, and the event loop is
free meanwhile. When no sound comes, silence takes its place:

- Nothing is stepped before the first sound, or before the model has something to say.
- With no sound for `silence_after` seconds (a muted microphone, a stalled line) the model hears
  silence, a frame every 80 ms, so that it finishes what it is saying. With None exactly what is
  heard is stepped, whenever it comes.
- Sound that comes late after all, in a burst, makes up for the silence that was put in its place,
  and so does sound from before the model was there: pauses in it are cut to half a second while
  frames wait, so that the conversation does not stay behind. Words are never left out.
- More than BACKLOG frames never wait. Beyond that the oldest are dropped and counted in `dropped`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..audio import MAX_SAMPLE, Pcm, StreamResampler, as_pcm
from ..errors import SessionError
from ..model import Model, load
from ..say import spoken_tokens
from ..session import Session, Stats
from ..turns import Moment, Turns

log = logging.getLogger("moshi_c.integrations")

#: Of the sound that sessions take and give, Hz, and samples of a frame.
RATE, FRAME = 24000, 1920
_FRAME_SECONDS = FRAME / RATE

#: Frames that wait at most, half a minute.
BACKLOG = 375
#: Frames that wait when sound comes in a burst.
_BURST = 3
#: Below this a frame is quiet, dBFS; a pause is at least so many quiet frames.
_QUIET, _PAUSE = -55.0, 6
#: After the event loop was held up, silence is put in for this much of it at most, s.
_HELD_UP = 0.5


class SharedModel:
    """A model that conversations share: one that is given, or one that is loaded when the first of
    them begins.

    model: a Model, which stays open; or a folder, file or hub id, None for the model in the
        package, which is closed by `close`.
    """

    def __init__(self, model: Model | str | os.PathLike[str] | None = None) -> None:
        self._model = model if isinstance(model, Model) else None
        self._source = None if isinstance(model, Model) else model
        self._owned = self._model is None
        self._lock = threading.Lock()

    def get(self) -> Model:
        """The model. It may take a while: not for the thread of an event loop."""
        with self._lock:
            if self._model is None:
                self._model = load(self._source, progress=False)
            return self._model

    def close(self) -> None:
        """Closes the model if it was loaded here; it may take a while too."""
        with self._lock:
            if self._owned and self._model is not None:
                self._model.close()
                self._model = None


class Conversation:
    """A session for one task of an event loop, which goes through its moments:

        try:
            await conversation.open()
            async for moment in conversation: ...
        finally:
            await conversation.close()

    `hear`, `say`, `begin` and `finish` are for every task of the same loop; they never wait. Sound
    and text that come before `open` is done are not lost.

    dropped: frames that were dropped, since BACKLOG others waited.
    """

    def __init__(
        self,
        model: SharedModel,
        *,
        silence_after: float | None = 0.2,
        user_level: float = -45.0,
        **options: Any,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            model: what to talk with.
            silence_after: seconds without sound after which the model hears silence; None: never.
            user_level: the user's voice is above this, dBFS.
            options: of `Session`: seed, text_temperature and the like, but no rates.

        Raises:
            ValueError: `silence_after` is not above 0.
        """
        if silence_after is not None and not silence_after > 0:
            raise ValueError(
                f"silence_after is {silence_after!r}; expected seconds above 0, or None"
            )
        self._shared = model
        self._silence_after = silence_after
        self._options = options
        self._turns = Turns(user_level)
        self._session: Session | None = None
        self._ended = False  # no more sound is taken
        self._arrived = asyncio.Event()
        self._resampler: StreamResampler | None = None
        self._frames: deque[Pcm] = deque(maxlen=BACKLOG)
        self._rest: Pcm = np.zeros(0, np.float32)
        self._texts: list[str] = []  # to say when the model is there
        self._tokens: deque[list[int]] = deque()  # to say next
        self._due: float | None = None  # when silence is put in, on the loop's clock
        self._debt = 0  # frames that pauses in a burst make up for
        self._quiet = 0  # frames in a row that were stepped
        self.dropped = 0

    # ---- for the task that holds it --------------------------------------------------------------

    async def open(self) -> None:
        """Loads the model, if need be, and takes a slot, in a thread.

        Raises:
            CheckpointError, DeviceError: the model cannot be loaded.
            SessionError: no slot is free.
            ValueError: an option of the session.
        """
        making = asyncio.get_running_loop().run_in_executor(None, self._take_slot)
        try:
            self._session = await asyncio.shield(making)
        except asyncio.CancelledError:
            making.add_done_callback(_close_made)
            raise
        if self._silence_after is not None:
            self._debt = len(self._frames)
        texts, self._texts = self._texts, []
        for text in texts:
            try:
                self.say(text)
            except ValueError as error:
                log.warning("%s", error)  # who asked for it has gone on

    def _take_slot(self) -> Session:
        return Session(self._shared.get(), **self._options)

    async def close(self) -> None:
        """Gives the slot back, in a thread: a frame that the engine has begun is waited for. The
        task that goes through the moments must have stopped. A second call does nothing."""
        self.finish()
        self._frames.clear()
        session, self._session = self._session, None
        if session is not None:
            await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, session.close))

    def __aiter__(self) -> Conversation:
        return self

    async def __anext__(self) -> Moment:
        """The next frame, when its sound is there. Ends after `finish`, when no whole frame waits.

        Raises:
            SessionError: not open; or the model's weights give no numbers.
        """
        if self._session is None:
            raise SessionError("the conversation is not open; expected its moments after open()")
        pcm = await self._next()
        if pcm is None:
            raise StopAsyncIteration
        while self._tokens:
            self._session.force_text(self._tokens.popleft())
        return self._turns.add(await self._session.astep(pcm))

    async def _next(self) -> Pcm | None:
        """The next frame to step, None at the end."""
        loop = asyncio.get_running_loop()
        while True:
            while self._frames:
                pcm = self._frames.popleft()
                if not self._can_skip(pcm):
                    return pcm
                self._debt -= 1
            if self._ended:
                return None
            if self._due is not None and self._due <= loop.time():
                return self._silence(loop.time())
            self._arrived.clear()
            timer = None if self._due is None else loop.call_at(self._due, self._arrived.set)
            try:
                await self._arrived.wait()
            finally:
                if timer is not None:
                    timer.cancel()

    def _can_skip(self, pcm: Pcm) -> bool:
        """Whether a frame can be left out; it is stepped otherwise."""
        is_quiet = float(np.dot(pcm, pcm)) / FRAME < 10.0 ** (_QUIET / 10.0)
        if is_quiet and self._quiet >= _PAUSE and self._debt and len(self._frames) >= _BURST:
            return True
        self._quiet = self._quiet + 1 if is_quiet else 0
        return False

    def _silence(self, now: float) -> Pcm:
        """A frame of silence, behind what waits of a frame."""
        self._due = max(self._due or now, now - _HELD_UP) + _FRAME_SECONDS
        self._debt = min(self._debt + 1, BACKLOG)
        pcm = np.zeros(FRAME, np.float32)
        pcm[: len(self._rest)] = self._rest
        self._rest = self._rest[:0]
        return pcm

    # ---- for everyone ----------------------------------------------------------------------------

    @property
    def stats(self) -> Stats | None:
        """How fast it steps; None when it is not open."""
        return None if self._session is None else self._session.stats

    def begin(self) -> None:
        """Starts the clock before the first sound, so that the model may speak first."""
        if self._due is None and self._silence_after is not None:
            self._due = asyncio.get_running_loop().time() + self._silence_after
            self._arrived.set()

    def hear(self, pcm: Any, rate: int) -> None:
        """What the user says; any number of samples `[N]` of int16 or float32. Ignored when closed.

        Raises:
            AudioError: another type or shape, NaN, infinity, or a rate that is not usable.
        """
        if self._ended:
            return
        samples = as_pcm(pcm)
        if self._resampler is None or self._resampler.rate_in != rate:
            resampler = StreamResampler(rate, RATE)
            if self._resampler is not None:
                self._add(self._resampler.flush())
            self._resampler = resampler
        self._add(self._resampler.process(samples))
        self.begin()
        if self._silence_after is not None:
            self._due = asyncio.get_running_loop().time() + self._silence_after

    def _add(self, samples: Pcm) -> None:
        # What is near the limit may be beyond it at another rate.
        samples = np.concatenate([self._rest, np.clip(samples, -MAX_SAMPLE, MAX_SAMPLE)])
        whole = len(samples) // FRAME
        for frame in samples[: whole * FRAME].reshape(whole, FRAME):
            self.dropped += len(self._frames) == BACKLOG
            self._frames.append(frame)
        self._rest = samples[whole * FRAME :]
        if whole:
            self._arrived.set()

    def say(self, text: str) -> None:
        """Makes the model say this from its next frame on. Ignored when closed.

        Raises:
            CheckpointError: the model was loaded without a tokenizer.
            ValueError: a letter or digit that the model's vocabulary lacks.
        """
        if self._ended:
            return
        if self._session is None:
            self._texts.append(text)
            return
        model = self._session.model
        self._tokens.append(spoken_tokens(model.tokenizer, text, model.frame_rate))
        self.begin()

    def finish(self) -> None:
        """No more sound comes: the moments end with the last whole frame that waits."""
        self._ended = True
        self._arrived.set()


def _close_made(making: asyncio.Future[Session]) -> None:
    """Closes a session that was made for nobody."""
    if not making.cancelled() and making.exception() is None:
        making.result().close()


def from_int16(data: bytes | bytearray | memoryview, channels: int) -> NDArray[np.int16]:
    """The mean of the channels `[N]`, of samples that follow each other channel by channel."""
    whole = len(data) // (2 * channels) * channels
    samples = np.frombuffer(data, "<i2", whole).astype(np.int16, copy=False)
    if channels == 1:
        return samples
    mean: NDArray[np.int16] = samples.reshape(-1, channels).mean(axis=1).astype(np.int16)
    return mean
