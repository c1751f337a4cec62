"""Microphone and loudspeaker through PortAudio (package `sounddevice`): mono, float32.

Speakers are heard by the microphone, and a model that hears itself talks to itself. EchoGate keeps
its own voice out; with headphones there is nothing to keep out.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .audio import Pcm
from .errors import AudioError, DeviceError
from .session import SPEAKING_LEVEL

#: Seconds that a room goes on sounding after the loudspeaker.
ECHO_SECONDS = 0.3
#: Seconds of sound in front of the first, and after each gap, so that what comes a little late is
#: still in time.
SLACK_SECONDS = 0.04
#: Seconds that may wait for the loudspeaker; the clocks of two devices differ.
MOST_SECONDS = 0.5


def _sounddevice() -> Any:
    try:
        import sounddevice
    except ImportError as error:
        raise DeviceError(
            "microphone and speakers need the package sounddevice: pip install 'moshi_c[audio]'"
        ) from error
    except OSError as error:
        raise DeviceError(
            "sounddevice found no PortAudio library; on Debian: apt-get install libportaudio2"
        ) from error
    return sounddevice


@contextlib.contextmanager
def _opened(kind: str, device: int | str | None, **options: Any) -> Iterator[Any]:
    """A running stream of sounddevice; when there can be none, that is a DeviceError."""
    sounddevice = _sounddevice()
    try:
        stream = getattr(sounddevice, kind)(
            device=device, channels=1, dtype="float32", latency="low", **options
        )
        stream.start()
    except (sounddevice.PortAudioError, ValueError) as error:
        what = "microphone" if kind == "InputStream" else "loudspeaker"
        name = "" if device is None else f" {device!r}"
        raise DeviceError(f"the {what}{name} cannot be used: {error}") from error
    try:
        yield stream
    finally:
        stream.close()


@contextlib.contextmanager
def microphone(
    rate: int, size: int, deliver: Callable[[Pcm | None], None], device: int | str | None = None
) -> Iterator[None]:
    """While it is open, `deliver` gets blocks float32[size], in a thread of PortAudio's; None when
    the device has gone."""

    def heard(block: Any, frames: int, when: Any, status: Any) -> None:
        deliver(np.array(block[:, 0]))

    with _opened(
        "InputStream",
        device,
        samplerate=rate,
        blocksize=size,
        callback=heard,
        finished_callback=lambda: deliver(None),
    ):
        yield


class Loudspeaker:
    """Plays what it is given, and silence where there is nothing. A context manager."""

    def __init__(self, rate: int, device: int | str | None = None) -> None:
        self._rate, self._device = rate, device
        self._waiting: deque[Pcm] = deque()
        self._samples = 0
        self._lock = threading.Lock()
        self._loud_at = -np.inf
        self._latency = 0.0

    def play(self, pcm: Pcm) -> None:
        """Adds float32[n] to what is played; what has waited for too long is left out."""
        if not len(pcm):
            return
        with self._lock:
            if not self._samples:
                self._add(np.zeros(round(SLACK_SECONDS * self._rate), np.float32))
            self._add(pcm)
            while self._samples > MOST_SECONDS * self._rate and len(self._waiting) > 1:
                self._samples -= len(self._waiting.popleft())

    def _add(self, pcm: Pcm) -> None:
        self._waiting.append(pcm)
        self._samples += len(pcm)

    def _fill(self, out: Any, frames: int, when: Any, status: Any) -> None:
        at = 0
        out[:] = 0
        with self._lock:
            while at < frames and self._waiting:
                piece = self._waiting.popleft()
                taken = piece[: frames - at]
                out[at : at + len(taken), 0] = taken
                at += len(taken)
                if len(taken) < len(piece):
                    self._waiting.appendleft(piece[len(taken) :])
            self._samples -= at
        if float(np.mean(np.square(out))) > 10 ** (SPEAKING_LEVEL / 10):
            self._loud_at = time.monotonic()

    @property
    def heard(self) -> bool:
        """Whether a microphone beside it may be hearing it."""
        return time.monotonic() < self._loud_at + self._latency + ECHO_SECONDS

    def __enter__(self) -> Loudspeaker:
        self._stack = contextlib.ExitStack()
        options = {"samplerate": self._rate, "blocksize": 0, "callback": self._fill}
        stream = self._stack.enter_context(_opened("OutputStream", self._device, **options))
        self._latency = float(stream.latency)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


class EchoGate:
    """Half duplex: silence instead of the microphone while the loudspeaker can be heard."""

    def __init__(self, speaker: Loudspeaker, *, shut: bool = True) -> None:
        """`shut=False` lets everything through, for headphones."""
        self._speaker, self._shut = speaker, shut

    def __call__(self, pcm: Pcm) -> Pcm:
        return np.zeros_like(pcm) if self._shut and self._speaker.heard else pcm


def device_of(text: str | None) -> int | str | None:
    """What a command line names a device by: its number, or a part of its name."""
    return int(text) if text and text.isdecimal() else text


def gone() -> AudioError:
    """The error for a `None` from the microphone."""
    return AudioError("the microphone has stopped; expected it to go on")
