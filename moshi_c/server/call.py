"""One call: samples in, frames stepped on the clock, sound and text out.

What the protocols have in common. A protocol is a `Wire`: it reads the caller's messages and
writes ours; everything else is here. Four tasks share a call: one reads, one talks (waits for a
slot, then steps), one writes, one watches the time. The first that finds a reason to end the call
ends it; the slot is free at once, before the caller has been told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from aiohttp import ClientConnectionError, WSCloseCode, WSMessage, WSMsgType, web

from ..audio import MAX_SAMPLE, Pcm
from ..errors import MoshiError, SessionError
from ..model import Model
from ..session import Frame, Session
from .admission import Place
from .clock import SILENCE, STEP, Clock
from .guard import Allowance
from .metrics import Metrics, Pace
from .settings import Sampling, Settings

log = logging.getLogger("moshi_c.server")

#: What a close frame says beyond RFC 6455; _LOST is never sent.
BAD_AUDIO, TIMEOUT = 4400, 4408
_LOST = 1006

#: Messages that mean nothing before the call is ended.
_MOST_IGNORED = 100
#: Seconds of sound that are taken a second; a caller who sends more is read more slowly.
_SOUND_PER_SECOND = 10.0
#: Likewise characters of text, and times that words are put into the model's mouth: what these
#: take to read, others wait.
_TEXT_PER_SECOND, _WORDS_PER_SECOND = float(1 << 20), 5.0
#: A wake-up later than this is the server's own fault, s.
_HELD_UP = 0.05
#: Seconds between two words about late answers.
_OVERRUN_SECONDS = 2.0
#: Bytes that may wait in a socket's buffer before we hold back.
_BUFFERED_BYTES = 32768
#: What may wait to be sent before who asks for more answers is read no further.
_MOST_UNSENT = 64

Payload = bytes | str
#: Makes what is sent when its turn has come: after all that waits by now.
Answer = Callable[[], list[Payload]]


class Ending(Exception):
    """Why a call is over.

    code: of the close frame. label: one word, for the metrics. reason: a sentence for people.
    """

    def __init__(self, code: int, label: str, reason: str) -> None:
        super().__init__(reason)
        self.code, self.label, self.reason = code, label, reason


class Ignored(Exception):
    """A message that means nothing here; the sentence says why.

    answer: what the caller is told.
    """

    def __init__(self, reason: str, answer: list[Payload] | None = None) -> None:
        super().__init__(reason)
        self.answer = answer or []


@dataclass(frozen=True, slots=True)
class Words:
    """What the model has to say next, a text token a frame."""

    tokens: list[int]


#: What a message may bring: the caller's samples at the model's rate, words for the model's mouth,
#: what we say to it, now or when its turn has come; None is the end of the input.
Heard = Pcm | Words | list[Payload] | Answer | None


@dataclass(slots=True)
class Counts:
    """Of one call, in frames, but for bad samples and ignored messages."""

    steps: int = 0
    silence: int = 0
    dropped_in: int = 0
    dropped_out: int = 0
    late: int = 0
    bad_samples: int = 0
    ignored: int = 0


class Wire(ABC):
    """One caller's protocol. What it has no message for, it says nothing of.

    All but `hear` are called when their turn to be sent has come.
    """

    name: str
    #: On the clock; else a file, as fast as it goes.
    live: bool

    @abstractmethod
    def hear(self, message: WSMessage) -> Iterable[Heard]:
        """What a message brings, in order.

        Raises:
            Ignored: the message means nothing.
            Ending: it ends the call.
        """

    def ready(self, session: Session) -> list[Payload]:
        """The slot is there."""
        return []

    def waiting(self, position: int) -> list[Payload]:
        """It is not there yet; 1 is the next."""
        return []

    @abstractmethod
    def sound(self, pcm: Pcm, frame: Frame) -> tuple[list[Payload], bool]:
        """A frame of the model's voice and what else is known of it, and whether there is sound in
        that: some protocols leave silence out."""

    def text(self, text: str, time: float) -> list[Payload]:
        """What the model says."""
        return []

    def event(self, event: str, **facts: Any) -> list[Payload]:
        """Something that the caller may want to know."""
        return []

    def keep_alive(self) -> list[Payload]:
        """Nothing has been sent for a while; WebSocket's own pings go out besides."""
        return []

    def finish(self) -> list[Payload]:
        """The last of the sound, and that this was the end, where callers do not just hang up."""
        return []

    @abstractmethod
    def error(self, ending: Ending) -> list[Payload]:
        """Why the call is cut short."""


class Inbox:
    """The caller's samples on their way to whole frames, with the times at which these came."""

    def __init__(self, frame_size: int) -> None:
        self._size = frame_size
        self._samples: Pcm = np.zeros(0, np.float32)
        self._first = 0  # its place among all samples
        self._came: deque[tuple[int, float]] = deque()  # up to which sample, when

    def add(self, pcm: Pcm, now: float) -> None:
        """Takes samples."""
        self._samples = np.concatenate([self._samples, pcm])
        self._came.append((self._first + len(self._samples), now))

    @property
    def ready(self) -> int:
        """Whole frames."""
        return len(self._samples) // self._size

    def take(self) -> tuple[Pcm, float]:
        """The next whole frame, and when it became whole."""
        frame = self._samples[: self._size]
        self.drop(1)
        return frame, self._whole

    def drop(self, frames: int) -> None:
        """Forgets the oldest frames."""
        self._first += frames * self._size
        self._samples = self._samples[frames * self._size :]
        while self._came and self._came[0][0] < self._first:
            self._came.popleft()
        if self._came:
            self._whole = self._came[0][1]

    def rest(self) -> Pcm:
        """All that is left, maybe less than a frame."""
        samples, self._samples = self._samples, self._samples[:0]
        return samples


@dataclass(frozen=True, slots=True)
class Out:
    """What waits to be sent: the model's voice, with the time its answer counts from, or what
    makes other messages."""

    frame: Frame | None = None
    since: float = 0.0
    answer: Answer | None = None
    text: str = ""
    time: float = 0.0
    last: bool = False


class Call:
    """From the upgrade to the close frame."""

    def __init__(
        self,
        number: int,
        model: Model,
        settings: Settings,
        metrics: Metrics,
        place: Place,
        wire: Wire,
        sampling: Sampling,
        address: str,
        live_company: Callable[[], bool],
    ) -> None:
        """live_company: whether a call on the clock is going on, beside which files take turns."""
        self._model, self._settings, self._metrics = model, settings, metrics
        self._place, self._wire, self._sampling = place, wire, sampling
        self._live_company, self._stepped = live_company, 0.0
        self._name = f"call {number} from {address} by {wire.name}"
        self._loop = asyncio.get_running_loop()
        self._frame_seconds = 1.0 / model.frame_rate
        self._most = max(1, round(settings.backlog_seconds * model.frame_rate))
        self._inbox = Inbox(model.frame_size)
        self._outbox: deque[Out] = deque()
        self._words: deque[Words] = deque()
        self._clock = Clock(self._frame_seconds, settings.silence_after)
        self._wake = asyncio.Event()  # for the one who talks
        self._room = asyncio.Event()  # for the one who reads a file, and who steps it
        self._send = asyncio.Event()  # for the one who writes
        self._ending: asyncio.Future[Ending] = self._loop.create_future()
        self._counts = Counts()
        self._pace = Pace(metrics, self._frame_seconds)
        self._overrun_until = 0.0  # then the caller is told again
        self._in_ended = self._lagging = False
        self._began = self._ready = self._sent = self._loop.time()
        self._heard: float | None = None  # when sound came last; None before the slot is there
        self._behind: float | None = None  # since when the caller has not read all

    # ---- the whole -----------------------------------------------------------------------------

    def end(self, ending: Ending) -> None:
        """Ends the call; the first reason counts."""
        if not self._ending.done():
            self._ending.set_result(ending)
            for event in (self._wake, self._room, self._send, self._place.changed):
                event.set()

    @property
    def live(self) -> bool:
        """Whether it talks on the clock."""
        return self._wire.live and not self.waiting

    @property
    def waiting(self) -> bool:
        """Whether it stands in the line."""
        return self._place.position > 0

    async def run(self, socket: web.WebSocketResponse, transport: asyncio.Transport) -> None:
        """Holds the call on a socket that has been upgraded."""
        self._socket, self._transport = socket, transport
        talk = self._task(self._talk())
        others = [self._task(part) for part in (self._read(), self._write(), self._watch())]
        try:
            ending = await self._ending
        except asyncio.CancelledError:
            ending = Ending(WSCloseCode.SERVICE_RESTART, "shutdown", "the server stopped")
            self.end(ending)
        await talk  # a step at most; frees the slot
        for task in others:
            task.cancel()
        await asyncio.wait(others)
        self._report(ending)
        await self._hang_up(ending)

    def _task(self, part: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self._loop.create_task(self._guarded(part))

    async def _guarded(self, part: Coroutine[Any, Any, None]) -> None:
        try:
            await part
        except Ending as ending:
            self.end(ending)
        except MoshiError as error:
            self.end(Ending(WSCloseCode.INTERNAL_ERROR, "model_error", str(error)))
        except (ConnectionError, ClientConnectionError):
            self.end(Ending(_LOST, "reset", "the connection was lost"))
        except Exception:
            log.exception("%s: an error of the server's own", self._name)
            self.end(Ending(WSCloseCode.INTERNAL_ERROR, "internal", "an error of the server's own"))

    async def _hang_up(self, ending: Ending) -> None:
        """Tells the caller, if it listens, and closes."""
        if not self._transport.is_closing() and ending.code != _LOST:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._say_goodbye(ending), 2.0)
        self._transport.abort()

    async def _say_goodbye(self, ending: Ending) -> None:
        if ending.label not in ("finished", "hung_up", "slow_reader"):
            await self._give(self._wire.error(ending))
        message = ending.reason.encode()[:120].decode("utf-8", "ignore").encode()
        await self._socket.close(code=ending.code, message=message)

    def _report(self, ending: Ending) -> None:
        counts, metrics = self._counts, self._metrics
        metrics.ended.labels(ending.label).inc()
        metrics.call_steps.observe(counts.steps)
        self._pace.over()
        facts = [f"{self._loop.time() - self._began:.1f} s", f"{counts.steps} frames"]
        for count, what in (
            (counts.silence, "of silence for late input"),
            (counts.dropped_in, "of input dropped"),
            (counts.dropped_out, "of output dropped"),
            (counts.late, "late"),
            (counts.bad_samples, "samples not finite"),
            (counts.ignored, "messages ignored"),
        ):
            if count:
                facts.append(f"{count} {what}")
        log.info("%s ended: %s (%s)", self._name, ending.reason, ", ".join(facts))

    # ---- in ------------------------------------------------------------------------------------

    async def _read(self) -> None:
        messages = Allowance(self._settings.messages_per_second)
        sound = Allowance(_SOUND_PER_SECOND)
        text, words = Allowance(_TEXT_PER_SECOND), Allowance(_WORDS_PER_SECOND)
        while True:
            message = await self._socket.receive()
            if message.type in (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED):
                if self._socket.close_code in (None, _LOST):
                    raise Ending(_LOST, "reset", "the connection was lost")
                raise Ending(WSCloseCode.OK, "hung_up", "the caller hung up")
            if message.type == WSMsgType.ERROR:
                raise self._broken()
            pause = messages.wait(self._loop.time(), 1)
            if message.type in (WSMsgType.PING, WSMsgType.PONG):
                if message.type == WSMsgType.PING:
                    await self._socket.pong(message.data)
                await asyncio.sleep(pause)
                continue
            if message.type == WSMsgType.TEXT:
                pause = max(pause, text.wait(self._loop.time(), len(message.data)))
            try:
                for heard in self._wire.hear(message):
                    if heard is None:
                        self._in_ended = True
                        self._wake.set()
                        break
                    if isinstance(heard, Words):
                        self._words.append(heard)
                        self._wake.set()
                        pause = max(pause, words.wait(self._loop.time(), 1))
                    elif isinstance(heard, np.ndarray):
                        await self._take(self._clean(heard))
                        if self._wire.live:
                            seconds = len(heard) / self._model.sample_rate
                            pause = max(pause, sound.wait(self._loop.time(), seconds))
                        if pause:
                            await asyncio.sleep(pause)
                            pause = 0.0
                    else:
                        await self._reply(heard)
            except Ignored as error:
                self._ignore(str(error))
                await self._reply(error.answer)
            await asyncio.sleep(pause)  # who has much to say lets others speak

    async def _reply(self, answer: list[Payload] | Answer) -> None:
        """Who does not read our answers is read no further."""
        self._post(answer if callable(answer) else lambda: answer)
        while len(self._outbox) > _MOST_UNSENT and not self._ending.done():
            self._room.clear()
            await self._room.wait()

    def _broken(self) -> Ending:
        error = self._socket.exception()
        code = getattr(error, "code", None)
        if code == WSCloseCode.MESSAGE_TOO_BIG:
            most = self._settings.message_bytes
            return Ending(code, "too_large", f"a message had more than {most} bytes")
        if isinstance(code, int):
            return Ending(code, "bad_messages", f"a message was no WebSocket message ({error})")
        return Ending(
            _LOST, "reset", "the connection was lost, or the caller did not answer a ping"
        )

    def _ignore(self, why: str) -> None:
        self._counts.ignored += 1
        self._metrics.ignored.inc()
        if self._counts.ignored > _MOST_IGNORED:
            raise Ending(
                WSCloseCode.UNSUPPORTED_DATA,
                "bad_messages",
                f"more than {_MOST_IGNORED} messages meant nothing; the last one: {why}",
            )

    def _clean(self, pcm: Pcm) -> Pcm:
        good = np.isfinite(pcm)
        if not good.all():
            bad = int(len(pcm) - np.count_nonzero(good))
            self._counts.bad_samples += bad
            self._metrics.bad_samples.inc(bad)
            pcm = np.where(good, pcm, np.float32(0))
        return np.clip(pcm, -MAX_SAMPLE, MAX_SAMPLE)

    async def _take(self, pcm: Pcm) -> None:
        now = self._loop.time()
        if not self._wire.live:  # a file waits until there is room
            while self.waiting or self._inbox.ready >= self._most:
                self._room.clear()
                await self._room.wait()
                if self._ending.done():
                    return
        elif self.waiting:  # nobody listens to who stands in the line
            return
        if self._in_ended or not len(pcm):
            return
        self._heard = now
        there = self._inbox.ready
        self._inbox.add(pcm, now)
        if self._wire.live:
            self._pace.came(now, self._inbox.ready - there)
            old = self._clock.too_old(self._inbox.ready)
            self._drop_input(old)
            self._drop_input(self._inbox.ready - self._most)
        self._wake.set()

    def _drop_input(self, frames: int) -> None:
        if frames <= 0:
            return
        self._inbox.drop(frames)
        self._counts.dropped_in += frames
        self._metrics.dropped.labels("in").inc(frames)
        if not self._lagging:  # once, until it has caught up
            self._lagging = True
            self._post(partial(self._wire.event, "lagging", dropped=self._counts.dropped_in))

    # ---- the conversation ----------------------------------------------------------------------

    async def _talk(self) -> None:
        try:
            await self._stand_in_line()
            if self._ending.done():
                return
            session = await self._open()
            try:
                self._post(partial(self._wire.ready, session))
                self._heard = self._ready = self._loop.time()
                self._room.set()
                await self._converse(session)
                if not self._ending.done():
                    await self._say_the_rest(session)
            finally:
                await asyncio.to_thread(session.close)
        finally:
            self._place.leave()

    async def _stand_in_line(self) -> None:
        while (position := self._place.position) and not self._ending.done():
            self._post(partial(self._wire.waiting, position))
            self._place.changed.clear()
            await self._place.changed.wait()

    async def _open(self) -> Session:
        wanted = self._sampling
        try:
            return await asyncio.to_thread(
                Session,
                self._model,
                seed=self._settings.seed if wanted.seed is None else wanted.seed,
                text_temperature=wanted.text_temperature,
                text_top_k=wanted.text_top_k,
                audio_temperature=wanted.audio_temperature,
                audio_top_k=wanted.audio_top_k,
            )
        except SessionError as error:
            raise Ending(WSCloseCode.TRY_AGAIN_LATER, "no_slot", str(error)) from error
        except ValueError as error:
            raise Ending(WSCloseCode.POLICY_VIOLATION, "bad_options", str(error)) from error

    async def _converse(self, session: Session) -> None:
        """Steps until the input has ended or the call has."""
        silence = np.zeros(self._model.frame_size, np.float32)
        async for pcm, since in self._frames(silence):
            self._deliver(await self._step(session, pcm), since)
            self._room.set()

    async def _frames(self, silence: Pcm) -> AsyncIterator[tuple[Pcm, float]]:
        """What is to be stepped, and from when on its answer may be late."""
        while not self._ending.done():
            now = self._loop.time()
            if self._in_ended or not self._wire.live:
                if self._inbox.ready:
                    await self._room_to_write()
                    if self._live_company():  # then no faster than they
                        due = self._stepped + self._frame_seconds
                        await asyncio.sleep(max(0.0, due - self._loop.time()))
                    self._stepped = now = self._loop.time()
                    pcm, _ = self._inbox.take()
                    yield pcm, now
                elif self._in_ended:
                    return
                else:
                    await self._nap(float("inf"))
                continue
            if self._words:  # the model may speak first
                self._clock.begin(now)
            what, at = self._clock.decide(now, self._inbox.ready)
            if what == STEP:
                pcm, came = self._inbox.take()
                lag = self._clock.stepped(came, self._inbox.ready)
                self._drop_input(min(lag, self._inbox.ready))
                self._lagging = self._lagging and self._inbox.ready > 1
                yield pcm, max(came, min(at, now))
            elif what == SILENCE:
                self._clock.silent()
                self._counts.silence += 1
                self._metrics.silence.inc()
                yield silence, now
            else:
                await self._nap(at)

    async def _nap(self, until: float) -> None:
        """Until then, or until something has come."""
        self._wake.clear()
        timer = None
        if until != float("inf"):
            timer = self._loop.call_at(until, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            if timer:
                timer.cancel()
        if self._loop.time() > until + _HELD_UP:
            self._clock.was_held_up(self._loop.time())

    async def _room_to_write(self) -> None:
        """A file goes no faster than its answer is read."""
        while len(self._outbox) > self._most and not self._ending.done():
            self._room.clear()
            await self._room.wait()

    async def _step(self, session: Session, pcm: Pcm) -> Frame:
        while self._words:
            session.force_text(self._words.popleft().tokens)
        begun = self._loop.time()
        frame = await session.astep(pcm)
        self._metrics.step_seconds.observe(self._loop.time() - begun)
        self._metrics.steps.inc()
        self._counts.steps += 1
        return frame

    async def _say_the_rest(self, session: Session) -> None:
        """As Session.flush: a partial frame, and the answer to the last ones."""
        rest = self._inbox.rest()

        def flush() -> list[Frame]:
            return [*session.push(rest), *session.flush()]

        frames = await asyncio.to_thread(flush)
        for frame in frames:
            self._deliver(frame, self._loop.time())
        self._counts.steps += len(frames)
        self._metrics.steps.inc(len(frames))
        self._outbox.append(Out(last=True))
        self._send.set()

    # ---- out -----------------------------------------------------------------------------------

    def _deliver(self, frame: Frame, since: float) -> None:
        if frame.pcm is not None:
            if self._wire.live and not self._in_ended:
                self._drop_output()
            self._outbox.append(Out(frame=frame, since=since))
        if frame.text:
            self._outbox.append(Out(text=frame.text, time=frame.time))
        if frame.event:
            self._post(partial(self._wire.event, frame.event))
        self._send.set()

    def _drop_output(self) -> None:
        """A slow reader loses the oldest sound; text is kept."""
        waiting = [i for i, out in enumerate(self._outbox) if out.frame is not None]
        if len(waiting) < self._most:
            return
        del self._outbox[waiting[0]]
        self._counts.dropped_out += 1
        self._metrics.dropped.labels("out").inc()

    def _post(self, answer: Answer) -> None:
        self._outbox.append(Out(answer=answer))
        self._send.set()

    async def _write(self) -> None:
        while not self._ending.done():
            silent_until = self._sent + self._settings.keepalive_seconds
            if self._loop.time() >= silent_until:
                await self._give(self._wire.keep_alive())
                self._sent = self._loop.time()
            if not self._outbox:
                self._behind = None
                self._send.clear()
                # no wait_for: before Python 3.12 it may swallow that the call has ended
                timer = self._loop.call_at(silent_until, self._send.set)
                try:
                    await self._send.wait()
                finally:
                    timer.cancel()
                continue
            if self._behind is None or not self._wire.live:
                self._behind = self._loop.time()
            while self._transport.get_write_buffer_size() > _BUFFERED_BYTES:
                await asyncio.sleep(0.02)
            out = self._outbox.popleft()
            self._room.set()
            if out.frame is not None and out.frame.pcm is not None:
                payloads, sounds = self._wire.sound(out.frame.pcm, out.frame)
                await self._give(payloads)
                self._answer(out.since, sounds)
            elif out.text:
                await self._give(self._wire.text(out.text, out.time))
            elif out.answer is not None:
                await self._give(out.answer())
            if out.last:
                await self._give(self._wire.finish())
                while self._transport.get_write_buffer_size():  # the close would cut it off
                    await asyncio.sleep(0.02)
                raise Ending(WSCloseCode.OK, "finished", "the caller's input has ended")

    async def _give(self, payloads: Iterable[Payload]) -> None:
        for payload in payloads:
            self._sent = self._loop.time()
            if isinstance(payload, str):
                await self._socket.send_str(payload)
            else:
                await self._socket.send_bytes(payload)

    def _answer(self, since: float, sounds: bool) -> None:
        """The answer to a frame has gone out; without sound, the caller does without silence."""
        now = self._loop.time()
        self._metrics.answer_seconds.observe(now - since)
        if not self._wire.live:
            return
        if sounds:
            self._pace.went(now)
        else:
            self._pace.paused()
        if now - since <= self._frame_seconds:
            return
        self._counts.late += 1
        self._metrics.late.inc()
        if now >= self._overrun_until:
            self._overrun_until = now + _OVERRUN_SECONDS
            self._post(partial(self._wire.event, "overrun", late=self._counts.late))

    # ---- time ----------------------------------------------------------------------------------

    async def _watch(self) -> None:
        settings = self._settings
        limits = (settings.max_seconds, settings.idle_seconds, settings.slow_seconds)
        pause = min([1.0, *(limit / 4 for limit in limits if limit)])
        while True:
            await asyncio.sleep(pause)
            now = self._loop.time()
            if self._transport.is_closing():
                raise Ending(_LOST, "reset", "the connection was lost")
            lasted = now - self._ready if self._heard is not None else 0.0
            if settings.max_seconds and lasted > settings.max_seconds:
                raise Ending(
                    WSCloseCode.OK,
                    "time_limit",
                    f"the call has lasted {settings.max_seconds:g} s, the most here",
                )
            if self._behind is not None and now - self._behind > settings.slow_seconds:
                raise Ending(
                    TIMEOUT, "slow_reader", f"nothing was read for {settings.slow_seconds:g} s"
                )
            idle = 0.0
            if self._heard is not None and not self._in_ended and not self._inbox.ready:
                idle = now - self._heard
            if settings.idle_seconds and idle > settings.idle_seconds:
                raise Ending(TIMEOUT, "idle", f"no sound came for {settings.idle_seconds:g} s")
