"""Sessions: one conversation each, 80 ms at a time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import _core
from .audio import (
    MAX_SAMPLE,
    Pcm,
    StreamResampler,
    as_pcm,
    check_rate,
    read_audio,
    resample,
    resampler_shortage,
)
from .display import frame_html
from .errors import AudioError, CheckpointError, MoshiError, SessionError
from .fields import Fields
from .model import Model
from .note import Note
from .progress import Bar
from .recording import Recording, assemble_words, stack_codes
from .say import spoken_tokens

#: Frame.speaking: a word in this many frames (about a second) ...
SPEAKING_FRAMES = 12
#: ... or a voice above this level, in dBFS, over this many frames.
SPEAKING_LEVEL = -45.0
SPEAKING_LEVEL_FRAMES = 3

#: A voice that no finite weights exceed, and that a resampler can add up.
_MAX_OUTPUT = 1e6

#: Session.stats counts percentiles over this many steps.
_STATS_STEPS = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """What the model says in one frame of 80 ms.

    pcm: float32[n], its voice at the session's output_sample_rate; silence before the first output,
        None for families without a voice and with decode=False.
    text: what it says now, maybe "" and never half a character; a word begins with a space.
    text_token: the token behind it; -1 before the first output.
    codes: int32[K], the codes of its voice; None before the first output and without a voice.
    user_codes: int32[K], the codes of the user's frame.
    index: frames stepped before this one.
    time: index in seconds.
    speaking: whether the model is talking: one of its last 12 frames carried text, or the level of
        its last 3 frames is above -45 dBFS.
    level: of the user's frame, in dBFS, -120 at least; -120 when stepped by codes.
    heads: float32[heads, classes], probabilities of the extra heads; None without heads.
    event: None, or of the context: "context_80" in the frame that fills 80 % of what the model was
        trained on; "refresh_begin" when a new context begins to be read, and "refresh_end" in the
        first frame with it, if the session has that policy.
    """

    pcm: Pcm | None
    text: str
    text_token: int
    codes: NDArray[np.int32] | None
    user_codes: NDArray[np.int32]
    index: int
    time: float
    speaking: bool
    level: float
    heads: NDArray[np.float32] | None
    event: str | None = None

    def _repr_html_(self) -> str:
        """For notebooks: the same on one line, with the level as a bar."""
        return frame_html(self)

    def __repr__(self) -> str:
        return (
            f"<Frame {self.index} at {self.time:.2f} s: {self.text!r}"
            f"{', speaking' if self.speaking else ''}, user at {self.level:.0f} dBFS>"
        )


@dataclass(frozen=True, slots=True)
class Stats(Fields):
    """How fast a session steps.

    frames: stepped since the start or the last reset.
    p50_ms, p99_ms: of the last 4096 steps, in milliseconds; 0 without steps.
    max_ms: the slowest of all.
    real_time_factor: seconds of work for a second of sound; below 1 keeps up.
    late: steps that took longer than the frame lasts (80 ms).
    """

    frames: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    real_time_factor: float
    late: int


class _Clock:
    """Step times in bounded memory."""

    def __init__(self, frame_seconds: float) -> None:
        self._frame = frame_seconds
        self.reset()

    def reset(self) -> None:
        self._recent: deque[float] = deque(maxlen=_STATS_STEPS)
        self._count = self._late = 0
        self._total = self._slowest = 0.0

    def add(self, seconds: float) -> None:
        self._recent.append(seconds)
        self._count += 1
        self._total += seconds
        self._slowest = max(self._slowest, seconds)
        self._late += seconds > self._frame

    def stats(self) -> Stats:
        p50, p99 = np.percentile(self._recent.copy() or [0.0], [50, 99])
        return Stats(
            frames=self._count,
            p50_ms=1000.0 * float(p50),
            p99_ms=1000.0 * float(p99),
            max_ms=1000.0 * self._slowest,
            real_time_factor=self._total / (max(self._count, 1) * self._frame),
            late=self._late,
        )


class _Feed:
    """The user's samples on their way to whole frames at the model's rate.

    At another rate the resampler lags. Samples that come by `push` wait for it, and give what
    resampling the whole signal gives. `step` has to answer every frame with one, so a signal that
    begins with it gets `shortage` samples of silence in front.
    """

    def __init__(self, rate: int, model_rate: int, frame_size: int) -> None:
        self.frame_in = frame_size * rate // model_rate
        self._frame = frame_size
        self._resampler = StreamResampler(rate, model_rate)
        self._shortage = resampler_shortage(rate, model_rate, self.frame_in, frame_size)
        self.reset()

    def reset(self) -> None:
        self._resampler.reset()
        self._waiting: Pcm = np.zeros(0, np.float32)
        self._started = False
        self._steady = self._shortage == 0  # every frame in has one frame out

    def save(self, note: Note) -> None:
        """Puts the state into the note of a snapshot."""
        note.put_array("feed.waiting", self._waiting)
        note.put_flag("feed.started", self._started)
        note.put_flag("feed.steady", self._steady)
        note.put_resampler("feed.resampler", self._resampler.state())

    def load(self, note: Note) -> None:
        """Takes it back."""
        self._waiting = note.array("feed.waiting", MAX_SAMPLE)
        self._started = note.flag("feed.started")
        self._steady = note.flag("feed.steady")
        self._resampler.resume(note.resampler("feed.resampler", MAX_SAMPLE))

    @property
    def empty(self) -> bool:
        """Whether samples go straight through."""
        return len(self._waiting) == 0 and self._resampler.rate_in == self._resampler.rate_out

    def check_step(self) -> None:
        """SessionError when a frame in may have no frame out."""
        if self._started and not self._steady:
            raise SessionError(
                "this session got its samples by push at another rate, so that a step has no frame "
                "ready; go on with push, or end with flush"
            )

    def step(self, pcm: Pcm) -> None:
        """Takes one frame, after check_step."""
        if not self._started and self._shortage:
            self._waiting = np.zeros(self._shortage, np.float32)
            self._steady = True
        self.push(pcm)

    def push(self, pcm: Pcm) -> None:
        """Takes any number of samples."""
        self._started = self._started or len(pcm) > 0
        # What is near the limit may be beyond it at another rate.
        more = np.clip(self._resampler.process(pcm), -MAX_SAMPLE, MAX_SAMPLE)
        self._waiting = np.concatenate([self._waiting, more])

    def finish(self) -> None:
        """Ends the signal, with zeros up to a whole frame."""
        tail = np.clip(self._resampler.flush(), -MAX_SAMPLE, MAX_SAMPLE)
        missing = -(len(self._waiting) + len(tail)) % self._frame
        self._waiting = np.concatenate([self._waiting, tail, np.zeros(missing, np.float32)])
        self._started = False
        self._steady = self._shortage == 0

    def take(self) -> Pcm | None:
        """The next frame, float32[frame_size], or None. It is gone before it is stepped: Ctrl-C
        comes when the step is done, and the same frame must not be stepped again."""
        if len(self._waiting) < self._frame:
            return None
        frame, self._waiting = self._waiting[: self._frame], self._waiting[self._frame :]
        return frame

    def take_one(self) -> Pcm:
        """The frame that a step has put in. Only a damaged snapshot can be without."""
        frame = self.take()
        if frame is None:
            raise SessionError(
                "this session has no frame to step; the snapshot that it is from was damaged"
            )
        return frame


class Session:
    """One conversation with a model: a frame of the user in, a frame of the model out.

    One thread at a time; a second one gets SessionError at once. A context manager.
    """

    def __init__(
        self,
        model: Model,
        *,
        seed: int | None = None,
        text_temperature: float | None = None,
        text_top_k: int | None = None,
        audio_temperature: float | None = None,
        audio_top_k: int | None = None,
        cfg_coef: float = 1.0,
        conditions: Mapping[str, str | None] | None = None,
        null_conditions: Mapping[str, str | None] | None = None,
        cfg_masked_until: int | None = None,
        cfg_is_no_text: bool = False,
        sample_rate: int = 24000,
        output_sample_rate: int = 24000,
        keep_logits: bool = False,
        context_policy: Literal["ring", "refresh"] = "ring",
        context_range: int | None = None,
        context_keep: int | None = None,
    ) -> None:
        """Takes a slot of the model.

        Args:
            model: what `load` gave.
            seed: 0 to 2**64 - 1; the same seed, model and input give the same conversation. None
                for a random one.
            text_temperature, text_top_k, audio_temperature, audio_top_k: sampling; a temperature of
                0 is greedy, a top_k of 0 the whole vocabulary. None for the checkpoint's
                `lm_gen_config`, else upstream's: text 0.7 of 25, audio 0.8 of 250.
            cfg_coef: guidance, null + (conditioned - null) * cfg_coef; 1 is off.
            conditions: values of the model's conditions by name; what is not named gets the learnt
                padding. None for the family's usual ones.
            null_conditions: the same for the other half of guidance.
            cfg_masked_until: frames for which that half reads nothing; None is off.
            cfg_is_no_text: that half never reads text.
            sample_rate: of what goes in, Hz. A frame is 80 ms at that rate.
            output_sample_rate: of Frame.pcm, Hz.
            keep_logits: makes `logits` available.
            context_policy: what becomes of a call that is longer than the model's memory. "ring",
                as upstream: it forgets frame by frame. "refresh": before the range ends that the
                model was trained on, what it remembers is made anew from the tokens of the last
                frames, as that of a conversation which began there; in a pause, if one comes once
                80 % of the range are used. Steps go on meanwhile.
            context_range: that range, in frames; None for the checkpoint's context.
            context_keep: frames that a refresh keeps; None for half of the range.

        Raises:
            SessionError: the model is closed or has no free slot.
            AudioError: a rate that is not usable.
            ValueError: an option out of range, or a condition that the model does not know.
            TypeError: `model` is no Model.
        """
        if seed is None:
            seed = secrets.randbits(64)
        if not isinstance(model, Model):
            raise TypeError(f"Session got {type(model).__name__}, expected a Model from load()")
        if conditions is None and model.family == "hibiki":
            # upstream's defaults for speech translation
            conditions = {"description": "very_good"}
            if null_conditions is None and cfg_coef != 1.0:
                null_conditions = {"description": "very_bad"}
        self._prepare(model, sample_rate, output_sample_rate)
        self._begin(
            _core.Session(
                model._core,
                seed=seed,
                text_temperature=text_temperature,
                text_top_k=text_top_k,
                audio_temperature=audio_temperature,
                audio_top_k=audio_top_k,
                cfg_coef=cfg_coef,
                cfg_masked_until=-1 if cfg_masked_until is None else cfg_masked_until,
                cfg_no_text=cfg_is_no_text,
                conditions=conditions,
                null_conditions=null_conditions,
                keep_logits=keep_logits,
                context_policy=context_policy,
                context_range=context_range or 0,
                context_keep=context_keep or 0,
            )
        )

    def _prepare(self, model: Model, rate: int, output_rate: int) -> None:
        """Everything but the core's session, which needs a slot."""
        self._model = model
        self._rate = self._check_rate("sample_rate", rate)
        self._output_rate = self._check_rate("output_sample_rate", output_rate)
        self._inside: list[object] = []
        self._clock = _Clock(1.0 / model.frame_rate)
        self._detokenizer = model.tokenizer.detokenizer() if model.tokenizer else None
        self._feed = _Feed(self._rate, model.sample_rate, model.frame_size)
        self._forced: list[int] = []
        self._descriptor: int | None = None
        self._start()

    def _begin(self, core: _core.Session) -> None:
        self._core = core
        self._model._open.add(self)

    def _check_rate(self, name: str, rate: int) -> int:
        rate = check_rate(rate, name)
        samples = rate / self._model.frame_rate
        if samples != int(samples):
            raise AudioError(
                f"{name} is {rate}; expected a multiple of 25, so that a frame of "
                f"{1000 / self._model.frame_rate:g} ms has a whole number of samples"
            )
        return rate

    def _start(self) -> None:
        """The state of a conversation that has not begun, but for the core's."""
        self._feed.reset()
        self._forced.clear()
        self._clock.reset()
        if self._detokenizer:
            self._detokenizer.reset()
        self._since_word = SPEAKING_FRAMES
        self._power: deque[float] = deque(maxlen=SPEAKING_LEVEL_FRAMES)
        self._output = StreamResampler(self._model.sample_rate, self._output_rate)
        self._output_frame = self._model.frame_size * self._output_rate // self._model.sample_rate
        shortage = resampler_shortage(
            self._model.sample_rate, self._output_rate, self._model.frame_size, self._output_frame
        )
        self._output_waiting: Pcm = np.zeros(shortage, np.float32)

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """One thread at a time. A list instead of a lock: Ctrl-C may fall behind any call, and
        would leave a lock taken that was acquired in front of the try."""
        self._core.check_open()
        ticket = object()
        try:
            self._inside.append(ticket)
            if self._inside[0] is not ticket:
                raise SessionError(
                    "this session is in use by another thread; expected one thread at a time"
                )
            yield
        finally:
            self._inside.remove(ticket)

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        with self._held():
            self._settle()
            yield

    def _settle(self) -> None:
        """Takes the frame of a cancelled astep, which the model has said to nobody."""
        if self._core.in_flight:
            self._frame(self._core.finish())

    # ---- what it is ----------------------------------------------------------------------------

    @property
    def model(self) -> Model:
        """The model it talks with."""
        return self._model

    @property
    def seed(self) -> int:
        """The seed in use."""
        return self._core.seed

    @property
    def sample_rate(self) -> int:
        """Of what goes in, in Hz."""
        return self._rate

    @property
    def output_sample_rate(self) -> int:
        """Of Frame.pcm, in Hz."""
        return self._output_rate

    @property
    def frame_size(self) -> int:
        """Samples that `step` takes: 80 ms at `sample_rate`."""
        return self._feed.frame_in

    @property
    def stats(self) -> Stats:
        """How fast it steps."""
        return self._clock.stats()

    # ---- stepping ------------------------------------------------------------------------------

    def step(self, pcm: Any, *, decode: bool = True, dtype: str | None = None) -> Frame:
        """Steps one frame.

        Args:
            pcm: exactly one frame of float32 in -1..1 or of int16, any array, buffer or DLPack
                object on the CPU: 1920 samples at 24 kHz, `frame_size` at another rate, where
                resampling adds some 40 ms.
            decode: False leaves Frame.pcm out, which saves the codec's work.
            dtype: "float32" or "int16", little endian, for raw bytes.

        Raises:
            AudioError: another length or type, NaN, infinity or values far beyond -1..1; nothing
                has changed.
            DeviceError: there is no memory for a longer context. Nothing has changed and the frame
                can be given again, unless samples are resampled or wait from a `push`: then it is
                left out.
            SessionError: closed, in use by another thread, or in a forked process; or the model's
                weights give no numbers, which ends this session.
        """
        with self._busy():
            if self._feed.empty:
                return self._frame(self._core.step(pcm, decode, dtype))
            self._feed.check_step()
            self._feed.step(self._one_frame(pcm, dtype))
            return self._frame(self._core.step(self._feed.take_one(), decode))

    async def astep(self, pcm: Any, *, decode: bool = True, dtype: str | None = None) -> Frame:
        """`step` for asyncio: other tasks run while the engine steps the frame, without a thread of
        their own; any number of sessions may wait at once.

        Cancelled before the engine has begun, nothing has happened. Cancelled later, or when
        samples are resampled or wait from a `push`, the frame is stepped all the same and what the
        model said in it is lost. Either way the session can be used at once.

        Args:
            pcm, decode, dtype: as for `step`.

        Raises:
            AudioError: another length or type, NaN or infinity; nothing has changed.
            DeviceError: as for `step`.
            SessionError: closed, or in use by another task or thread.
        """
        with self._held():
            if self._descriptor is None:
                self._settle()  # the core gives it between two frames
                self._descriptor = self._core.descriptor()
            if self._core.in_flight:
                await _readable(self._descriptor)
                self._settle()
            fed = not self._feed.empty
            try:
                if fed:
                    self._feed.check_step()
                    self._feed.step(self._one_frame(pcm, dtype))
                    self._core.submit(self._feed.take_one(), decode)
                else:
                    self._core.submit(pcm, decode, dtype)
                await _readable(self._descriptor)
            except BaseException:
                if not fed and self._core.in_flight:
                    self._core.withdraw()
                raise
            return self._frame(self._core.finish())

    def _one_frame(self, pcm: Any, dtype: str | None = None) -> Pcm:
        """Exactly one frame at the session's rate, when it cannot go straight to the core."""
        if isinstance(pcm, (bytes, bytearray)) and dtype in ("float32", "int16"):
            size = 4 if dtype == "float32" else 2
            if len(pcm) % size:
                raise AudioError(f"pcm has {len(pcm)} bytes; expected whole samples of {size}")
            pcm = np.frombuffer(pcm, "<f4" if dtype == "float32" else "<i2")
        elif getattr(pcm, "dtype", None) == np.float64:
            raise AudioError(
                "pcm is float64; expected float32 or int16: convert with pcm.astype('float32')"
            )
        samples = as_pcm(pcm)
        if len(samples) != self._feed.frame_in:
            raise AudioError(
                f"pcm has {len(samples)} samples; a frame is {self._feed.frame_in} "
                f"({1000 / self._model.frame_rate:g} ms at {self._rate} Hz): "
                "use Session.push for other lengths"
            )
        return samples

    def step_codes(self, codes: Any, *, decode: bool = True) -> Frame:
        """Steps one frame from the codes of the user's voice, without encoding.

        Args:
            codes: integers `[K]`, one for each stream of the user, 0 to the codebook's size; the
                size itself is the token before the beginning.
            decode: False leaves Frame.pcm out.

        Raises:
            AudioError: another number of codes, or one out of range; nothing has changed.
            DeviceError: there is no memory for a longer context; nothing has changed.
            SessionError: closed, or in use by another thread.
        """
        with self._busy():
            return self._frame(self._core.step_codes(np.asarray(codes), decode))

    def prefill(self, text_tokens: Any = None, codes: Any = None, user_codes: Any = None) -> None:
        """Takes frames that are known already, many at once: a prompt, or a call that is taken up
        again. The session goes on as if it had stepped `user_codes` and had been made to say the
        rest, bit for bit, and `Frame.index` counts these frames.

        What belongs to one moment stands in one column, as in a Recording or from `Mimi.encode`,
        whatever the model's delays; the last codes of its late streams are said by the next steps.
        Every token of a frame is needed, so what is left out is taken for silence. `say` goes on
        where it was. The codec takes no part: it hears the next frame as the first of a recording,
        and its voice begins with the next frame that comes out.

        Args:
            text_tokens: integers `[T]`; None for padding, the token of not speaking.
            codes: integers `[K, T]`, the model's voice; None for silence as the codec encodes it.
            user_codes: integers `[K, T]`, the user's; None for silence.

        Raises:
            AudioError: another shape, or a code out of range; nothing has changed.
            CheckpointError: silence is asked for, and the model was loaded without a codec.
            ValueError: nothing is given, or a token out of the vocabulary; nothing has changed.
            DeviceError: there is no memory for a longer context, which ends this session.
            SessionError: closed, or in use by another thread.
        """
        given = [
            None if value is None else np.array(value) for value in (text_tokens, codes, user_codes)
        ]
        counts = [value.shape[-1] for value in given if value is not None and value.ndim]
        if not counts:
            raise ValueError("prefill got no frames; expected text_tokens, codes or user_codes")
        text, said, heard = given
        info, frames = self._model._info, counts[0]
        if text is None:
            text = np.full(frames, info["text_padding_id"], np.int32)
        with self._busy():
            came_out = self._core.prefill(
                text,
                self._silence(info["dep_q"], frames) if said is None else said,
                self._silence(info["user_q"], frames) if heard is None else heard,
            )
            for token in came_out.tolist():
                self._note_output(token, None)

    def _silence(self, streams: int, frames: int) -> NDArray[np.int32]:
        """Codes int32[streams, frames]."""
        if not streams:
            return np.zeros((0, frames), np.int32)
        return self._model.mimi.encode(np.zeros(frames * self._model.frame_size, np.float32))[
            :streams
        ]

    def push(self, pcm: Any) -> list[Frame]:
        """Takes any number of samples and steps the whole frames among them.

        However the samples are cut, the frames are the same bit for bit. The rest waits for more.

        Args:
            pcm: `[N]` samples at `sample_rate`: floating point in -1..1, or int16.

        Raises:
            AudioError: another type or shape, NaN or infinity; nothing has changed.
            SessionError: closed, or in use by another thread.
        """
        samples = as_pcm(pcm)
        with self._busy():
            self._feed.push(samples)
            return list(self._step_waiting())

    def flush(self) -> list[Frame]:
        """Ends the input: pads what waits with silence to a whole frame, then steps as many silent
        frames as the model's output is late, so that all of its answer to the input is out. The
        conversation may go on afterwards.

        Raises:
            SessionError: closed, or in use by another thread.
        """
        with self._busy():
            return self._ended([self._frame(raw) for raw in self._flush()])

    def _step_waiting(self, decode: bool = True) -> Iterator[Frame]:
        return (self._frame(raw) for raw in self._drain(decode))

    def _drain(
        self, decode: bool = True, heard: list[Pcm] | None = None
    ) -> Iterator[_core.FrameTuple]:
        while (frame := self._feed.take()) is not None:
            raw = self._core.step(frame, decode)
            if heard is not None:
                heard.append(frame)
            yield raw

    def _flush(self, heard: list[Pcm] | None = None) -> Iterator[_core.FrameTuple]:
        self._feed.finish()
        yield from self._drain(heard=heard)
        silence = np.zeros(self._model.frame_size, np.float32)
        for _ in range(self._model.max_delay):
            if heard is not None:
                heard.append(silence)
            yield self._core.step(silence, True)

    def _ended(self, frames: list[Frame]) -> list[Frame]:
        """Prints a character that was left incomplete."""
        if self._detokenizer and frames and (text := self._detokenizer.flush()):
            frames[-1] = replace(frames[-1], text=frames[-1].text + text)
        return frames

    def _frame(self, raw: _core.FrameTuple, resampled: bool = True) -> Frame:
        """The frame of a step of the core."""
        index, pcm, token, codes, user_codes, level, heads, seconds, event = raw
        self._clock.add(seconds)
        text = self._note_output(token, pcm)
        loud = sum(self._power) / len(self._power) > 10.0 ** (SPEAKING_LEVEL / 10.0)
        if pcm is not None and resampled and self._output_rate != self._model.sample_rate:
            waiting = np.concatenate([self._output_waiting, self._output.process(pcm)])
            pcm, self._output_waiting = np.split(waiting, [self._output_frame])
        return Frame(
            pcm=pcm,
            text=text,
            text_token=token,
            codes=codes,
            user_codes=user_codes,
            index=index,
            time=index / self._model.frame_rate,
            speaking=self._since_word < SPEAKING_FRAMES or loud,
            level=level,
            heads=heads,
            event=event,
        )

    def _note_output(self, token: int, pcm: Pcm | None) -> str:
        """The text of a frame's token; keeps what `Frame.speaking` goes by."""
        text = ""
        if self._detokenizer and token >= 0:
            text = self._detokenizer.push(token)
        self._since_word = 0 if text else self._since_word + 1
        with np.errstate(over="ignore"):  # a voice of damaged weights
            self._power.append(float(np.dot(pcm, pcm)) / len(pcm) if pcm is not None else 0.0)
        return text

    def run(self, audio: Any, *, after: float = 0.0, progress: bool = False) -> Recording:
        """Listens to a whole recording: `push`, then `flush`.

        Args:
            audio: a path, or `[N]` samples at `sample_rate`.
            after: seconds of silence to go on listening to, so that what is asked at the end of the
                recording can be answered; at most an hour.
            progress: show a bar on stderr.

        Returns:
            What the model said meanwhile, as long as the input in whole frames and `max_delay`
            frames more.

        Raises:
            AudioError: the file or the samples are not usable.
            SessionError: closed, or in use by another thread.
            ValueError: `after` is negative or more than an hour.
        """
        if isinstance(audio, (str, os.PathLike)):
            audio = read_audio(audio, self._rate)
        samples = as_pcm(audio, "audio")
        if not 0 <= after <= 3600:
            raise ValueError(f"after is {after!r} s; expected 0 to 3600")
        samples = np.concatenate([samples, np.zeros(round(after * self._rate), np.float32)])
        with self._busy(), Bar(progress, len(samples) / self._rate) as bar:
            frames: list[Frame] = []
            heard: list[Pcm] = []
            for start in range(0, len(samples), self._feed.frame_in):
                piece = samples[start : start + self._feed.frame_in]
                self._feed.push(piece)
                frames += [self._frame(raw, resampled=False) for raw in self._drain(heard=heard)]
                bar.update(len(piece) / self._rate)
            frames += [self._frame(raw, resampled=False) for raw in self._flush(heard)]
            return self._recording(self._ended(frames), heard)

    def _recording(self, frames: Sequence[Frame], heard: Sequence[Pcm] | None = None) -> Recording:
        model = self._model
        pcm: Pcm | None = None
        if model._info["has_mimi"] and model._info["dep_q"] > 0:
            pcm = self._joined([frame.pcm for frame in frames if frame.pcm is not None])
        return Recording(
            pcm=pcm,
            text="".join(frame.text for frame in frames),
            words=assemble_words(
                [frame.text for frame in frames],
                [frame.text_token for frame in frames],
                model._info["text_end_padding_id"],
                model.frame_rate,
            ),
            codes=stack_codes([frame.codes for frame in frames], model._info["dep_q"]),
            user_codes=stack_codes([frame.user_codes for frame in frames], model._info["user_q"]),
            sample_rate=self._output_rate,
            frame_rate=model.frame_rate,
            user_pcm=None if heard is None else self._joined(heard),
        )

    def _joined(self, parts: Sequence[Pcm]) -> Pcm:
        """Frames of the model's rate as one signal of the output's."""
        whole = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        return resample(whole, self._model.sample_rate, self._output_rate)

    # ---- words put into its mouth --------------------------------------------------------------

    def say(self, text: str) -> None:
        """Makes the model say this from the next frame on, after what it has still to say. The
        words are spaced in time as speech would be; the voice follows them.

        Raises:
            CheckpointError: the model was loaded without a tokenizer.
            ValueError: a letter or digit that the model's vocabulary lacks.
            SessionError: closed, or in use by another thread.
        """
        model = self._model
        self.force_text(spoken_tokens(model.tokenizer, text, model.frame_rate))

    def force_text(self, tokens: Sequence[int]) -> None:
        """Makes these the model's text tokens from the next frame on, one a frame, after what it
        has still to say.

        Raises:
            ValueError: a token out of the vocabulary.
            SessionError: closed, or in use by another thread.
        """
        tokens = [int(token) for token in tokens]
        with self._busy():
            if not tokens:
                return
            left = self._left()
            self._core.force_text(tokens)
            self._forced = left + tokens

    def _left(self) -> list[int]:
        """Of the forced tokens those still to come."""
        left = self._core.forced_left
        return self._forced[len(self._forced) - left :] if left else []

    @property
    def saying(self) -> str:
        """What is left of the text that it was made to say; "" without a tokenizer.

        Raises:
            SessionError: closed, or in use by another thread.
        """
        with self._busy():
            tokenizer = self._model.tokenizer
            return tokenizer.decode(self._left()).strip() if tokenizer else ""

    def _force_next(self, text: int | None, audio: Any | None) -> None:
        """Teacher forcing: the next step reads and stores these instead of what it would sample."""
        with self._busy():
            self._core.force_next(text, audio)

    # ---- state ---------------------------------------------------------------------------------

    @property
    def logits(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Of the last step, after guidance: text float32[text_card], audio float32[K, card].

        Raises:
            SessionError: no step yet, or a session without keep_logits.
        """
        with self._busy():
            return self._core.logits()

    def reset(self, seed: int | None = None) -> None:
        """Back to the state of a new session, with the same seed unless one is given.

        Args:
            seed: 0 to 2**64 - 1; None for the seed in use.

        Raises:
            SessionError: closed, or in use by another thread.
            ValueError: a seed out of range.
        """
        with self._busy():
            self._core.reset(seed)
            self._start()

    def snapshot(self, path: str | os.PathLike[str] | None = None) -> bytes:
        """The whole state, for `from_snapshot` in this process or another.

        It has the layout of a safetensors file: the history of the language model and the codec as
        fields by name, the random numbers to come, samples and text that wait. Its size grows with
        the call up to the context's length. The step times in `stats` are not part of it.

        Args:
            path: a file to write it to as well, which is replaced as a whole.

        Raises:
            SessionError: closed, or in use by another thread.
            OSError: the file cannot be written.
        """
        with self._busy():
            data = self._core.snapshot(self._note().encode())
        if path is not None:
            part = Path(f"{os.fspath(path)}.{secrets.token_hex(4)}.part")
            try:
                part.write_bytes(data)
                part.replace(path)
            except OSError as error:
                raise OSError(error.errno, error.strerror, os.fspath(path)) from error
            finally:
                with contextlib.suppress(OSError):
                    part.unlink()
        return data

    @classmethod
    def from_snapshot(
        cls, model: Model, data: bytes | bytearray | memoryview | str | os.PathLike[str]
    ) -> Session:
        """A session that goes on where a snapshot was taken, bit for bit on the same kind of
        processor. At another `sample_rate` or `output_sample_rate` than the model's, the resampler
        starts anew from the last half second, which changes the sound by rounding.

        Models are told apart by their configs and tensors and by a few bytes of each: one whose
        weights differ in a few numbers only may pass for the snapshot's.

        Args:
            model: the same weights, device, dtype and context as the snapshot's.
            data: what `snapshot` gave, or the path it was written to.

        Raises:
            CheckpointError: damaged, or of another model, device, dtype, context or version.
            SessionError: the model is closed or has no free slot.
        """
        if isinstance(data, (str, os.PathLike)):
            try:
                data = Path(data).read_bytes()
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                raise CheckpointError(
                    f"the snapshot {os.fspath(data)!r} could not be read ({reason})"
                ) from error
        core, note = _core.Session.restore(model._core, bytes(memoryview(data)))
        try:
            return cls._resumed(model, core, Note.decode(note))
        except AudioError as error:
            core.close()
            raise Note.damaged(str(error)) from error
        except BaseException:
            core.close()
            raise

    def fork(self, seed: int | None = None) -> Session:
        """Another session in the same state. It costs little: the keys and values of what was heard
        and said so far are shared until one of the two goes on.

        Args:
            seed: of the fork; None for the same random numbers as this session will have.

        Raises:
            SessionError: closed, in use by another thread, or the model has no free slot.
        """
        with self._busy():
            core = self._core.fork(seed)
            try:
                return self._resumed(self._model, core, self._note())
            except BaseException:
                core.close()
                raise

    def _note(self) -> Note:
        """What the core does not know of the state."""
        note = Note()
        note.put_number("sample_rate", self._rate)
        note.put_number("output_sample_rate", self._output_rate)
        note.put_numbers("forced", self._left())
        note.put_bytes("text", self._detokenizer.pending if self._detokenizer else b"")
        note.put_number("since_word", self._since_word)
        note.put_floats("power", list(self._power))
        self._feed.save(note)
        note.put_resampler("output.resampler", self._output.state())
        note.put_array("output.waiting", self._output_waiting)
        return note

    @classmethod
    def _resumed(cls, model: Model, core: _core.Session, note: Note) -> Session:
        self = cls.__new__(cls)
        self._prepare(model, note.number("sample_rate"), note.number("output_sample_rate"))
        self._forced = note.numbers("forced")
        if len(self._forced) != core.forced_left:
            raise note.damaged(
                f"{len(self._forced)} forced tokens; expected {core.forced_left} as in the state"
            )
        if self._detokenizer:
            self._detokenizer.pending = note.bytes("text")
        self._since_word = note.number("since_word")
        self._power.extend(note.floats("power"))
        self._feed.load(note)
        given = note.resampler("output.resampler", _MAX_OUTPUT)
        frames = (given.first + len(given.history)) // model.frame_size
        left = len(self._output_waiting) + given.given - frames * self._output_frame
        self._output.resume(given)
        self._output_waiting = note.array("output.waiting", _MAX_OUTPUT)
        if len(self._output_waiting) != left:
            raise note.damaged(
                f"{len(self._output_waiting)} samples of output wait; expected {left}"
            )
        self._begin(core)
        return self

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._core.closed

    def close(self) -> None:
        """Gives the slot back. A second call does nothing."""
        if self._core.in_flight:
            with contextlib.suppress(MoshiError), self._held():
                self._settle()
        self._core.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.stats.frames} frames"
        return f"<Session of {self._model._source}, seed {self.seed}, {state}>"


async def _readable(descriptor: int) -> None:
    """Waits until there is something to read, in the running event loop."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def wake() -> None:
        loop.remove_reader(descriptor)
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(descriptor, wake)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)


def step_many(
    sessions: Sequence[Session], pcms: Sequence[Any], *, decode: bool = True
) -> list[Frame]:
    """One batched step of sessions of one model; each frame equals the session's own `step`.

    Args:
        sessions: each once.
        pcms: one frame for each session, as for `Session.step`.
        decode: False leaves Frame.pcm out.

    Raises:
        AudioError: a frame of another length, type or value; no session has stepped.
        SessionError: one is closed or in use by another thread.
        ValueError: another number of frames than sessions, a session twice, or two models.
    """
    sessions, pcms = list(sessions), list(pcms)
    if len(sessions) != len(pcms):
        raise ValueError(f"step_many got {len(sessions)} sessions and {len(pcms)} frames")
    if len(set(map(id, sessions))) != len(sessions):
        raise ValueError("step_many got one session twice; expected each once")
    if len({id(session.model) for session in sessions}) > 1:
        raise ValueError("step_many got sessions of different models; expected one model")
    if not sessions:
        return []
    with contextlib.ExitStack() as stack:
        for session in sessions:
            stack.enter_context(session._busy())
        fed = [session for session in sessions if not session._feed.empty]
        if fed:  # these change before the core steps, so nothing may be wrong by then
            for session in fed:
                session._feed.check_step()
            pcms = [s._one_frame(pcm) for s, pcm in zip(sessions, pcms, strict=True)]
            for i, session in enumerate(sessions):
                if session in fed:
                    session._feed.step(pcms[i])
                    pcms[i] = session._feed.take_one()
        raws = _core.step_many([session._core for session in sessions], pcms, decode)
        return [session._frame(raw) for session, raw in zip(sessions, raws, strict=True)]
