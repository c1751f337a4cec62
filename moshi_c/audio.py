"""Sound in and out of arrays and files: mono, float32, nominal range -1..1.

Files are read and written by libsndfile (package `soundfile`), rates are changed by libsoxr
(package `soxr`). A streaming resampler gives the same samples, bit for bit, whatever the chunks,
and the same as resampling the whole signal at once.
"""

from __future__ import annotations

import functools
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import AudioError

Pcm = NDArray[np.float32]

#: Rates that files and callers may use, in Hz.
MIN_RATE, MAX_RATE = 1000, 768_000

#: Samples are in -1..1; what is louder is taken up to this, as by the core (MOSHI_MAX_SAMPLE).
MAX_SAMPLE = 100.0

_BLOCK = 1 << 16

#: More than any MP3 holds: 576 samples take 24 bytes at the lowest bit rate.
_MP3_SAMPLES_A_BYTE = 64


def as_pcm(
    audio: Any, name: str = "pcm", ndim: int = 1, most: float = MAX_SAMPLE, first: int = 0
) -> Pcm:
    """Samples from any array-like, as contiguous float32.

    Floating point samples of any width are taken as they are, int16 is divided by 32768.

    Args:
        audio: array, buffer, DLPack object on the CPU, or list of numbers; `[N]`, or `[1, N]` or
            `[N, 1]` when `ndim` is 1, `[N]` or `[B, N]` when it is 2.
        name: what to call it in messages.
        ndim: dimensions of the result; a batch of 1 is added for 2.
        most: the largest magnitude taken.
        first: number of the first sample, for messages.

    Raises:
        AudioError: another type or shape, NaN, infinity, or values far beyond -1..1.
    """
    if isinstance(audio, (bytes, bytearray)):
        raise AudioError(
            f"{name} is raw bytes, which do not tell their type; "
            "expected an array, such as numpy.frombuffer(data, dtype='<i2') makes"
        )
    try:
        array = np.asarray(audio)
        if array.dtype == object and hasattr(audio, "__dlpack__"):
            array = np.from_dlpack(audio)
    except Exception as error:
        raise AudioError(
            f"{name} is a {type(audio).__name__} that could not be read as samples ({error}); "
            "expected an array of float32 or int16 in the memory of the CPU"
        ) from error
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what does not fit becomes infinity, refused below
            samples = array.astype(np.float32, copy=False)
    elif array.dtype.kind == "i" and array.dtype.itemsize == 2:
        samples = array.astype(np.float32) / np.float32(32768.0)
    elif array.size == 0 and array.ndim == 1:
        samples = np.zeros(0, np.float32)
    else:
        raise AudioError(
            f"{name} has elements of type {array.dtype}; expected float32 in -1..1, or int16"
        )
    samples = _with_dimensions(samples, name, ndim)
    if not np.isfinite(samples).all():
        where = int(np.argmin(np.isfinite(samples.reshape(-1))))
        value = samples.reshape(-1)[where]
        raise AudioError(f"{name} has {value} at sample {first + where}; expected finite samples")
    if samples.size and max(samples.max(), -samples.min()) > most:
        where = int(np.argmax(np.abs(samples)))
        value = samples.reshape(-1)[where]
        raise AudioError(
            f"{name} has {value:g} at sample {first + where}; expected -1 to 1 "
            "(integers of 16 bits go in as int16, or divided by 32768)"
        )
    return np.ascontiguousarray(samples)


def to_int16(pcm: Pcm) -> NDArray[np.int16]:
    """Samples as int16, as `as_pcm` takes them; what is louder than full scale is clipped."""
    samples: NDArray[np.int16] = np.clip(np.rint(pcm * 32768.0), -32768, 32767).astype(np.int16)
    return samples


def _with_dimensions(samples: Pcm, name: str, ndim: int) -> Pcm:
    found = samples.shape
    if ndim == 1:
        if samples.ndim == 2 and 1 in samples.shape:
            samples = samples.reshape(-1)
        expected = "one channel, [samples]"
    else:
        if samples.ndim == 1:
            samples = samples[None]
        expected = "[samples] or [batch, samples]"
    if samples.ndim != ndim:
        raise AudioError(f"{name} has shape {list(found)}; expected {expected}")
    return samples


def check_rate(rate: int, name: str = "rate") -> int:
    """The rate as an int; AudioError outside MIN_RATE..MAX_RATE."""
    try:
        good = not isinstance(rate, bool) and int(rate) == rate and MIN_RATE <= rate <= MAX_RATE
    except (TypeError, ValueError, OverflowError):
        good = False
    if not good:
        raise AudioError(f"{name} is {rate!r}; expected whole Hz from {MIN_RATE} to {MAX_RATE}")
    return int(rate)


def resample(pcm: Pcm, rate_in: int, rate_out: int) -> Pcm:
    """The whole signal `[N]` at another rate."""
    if rate_in == rate_out or len(pcm) == 0:
        return pcm
    import soxr

    return np.asarray(soxr.resample(pcm, rate_in, rate_out), np.float32)


@dataclass(frozen=True, slots=True)
class ResamplerState:
    """Where a StreamResampler is in its signal: what it was fed last, from sample `first` on, and
    how many samples it has given."""

    first: int
    history: Pcm
    given: int


class StreamResampler:
    """Changes the rate of one signal that comes in pieces.

    The filter has to look ahead, so the output starts some 40 ms late and `flush` gives the rest.

    libsoxr's own state cannot be saved. `state` keeps the last half second of input instead, more
    than the filter sees, and `resume` feeds that to a new filter: what follows differs by rounding.
    """

    _HISTORY_SECONDS = 0.5

    def __init__(self, rate_in: int, rate_out: int) -> None:
        self.rate_in = check_rate(rate_in)
        self.rate_out = check_rate(rate_out)
        divisor = math.gcd(self.rate_in, self.rate_out)
        # The signals have a sample at the same time once a period, where a new filter may start.
        self._period_in, self._period_out = self.rate_in // divisor, self.rate_out // divisor
        self.reset()

    def process(self, pcm: Pcm) -> Pcm:
        """float32[n] -> float32[m]: what is ready by now, maybe nothing."""
        if self.rate_in == self.rate_out:
            return pcm
        self._remember(pcm)
        return self._give(self._filter(pcm))

    def flush(self) -> Pcm:
        """The end of the signal; the next `process` starts another one."""
        if self._stream is None:
            return np.zeros(0, np.float32)
        tail = self._give(self._filter(np.zeros(0, np.float32), last=True))
        self.reset()
        return tail

    def reset(self) -> None:
        """Forgets the signal."""
        self._stream: Any = None
        self._history: Pcm = np.zeros(0, np.float32)
        self._first = self._given = self._skip = 0
        self._ahead: Pcm = np.zeros(0, np.float32)

    def state(self) -> ResamplerState:
        """For `resume`."""
        return ResamplerState(self._first, self._history, self._given)

    def resume(self, state: ResamplerState) -> None:
        """Goes on where another resampler of these rates was.

        Raises:
            AudioError: no resampler of these rates can be there.
        """
        self.reset()
        if len(state.history) == 0:
            return
        made = self._filter(state.history)
        end = state.first // self._period_in * self._period_out + len(made)
        ahead = end - state.given
        if state.first % self._period_in or abs(ahead) > min(len(made), self.rate_out // 4):
            raise AudioError(
                f"a resampler from {self.rate_in} to {self.rate_out} Hz has given {state.given} "
                f"samples; expected about {end} after {state.first + len(state.history)}"
            )
        self._first, self._history = state.first, state.history
        self._given = state.given
        self._skip = max(0, -ahead)
        self._ahead = made[len(made) - max(0, ahead) :]

    def _filter(self, pcm: Pcm, last: bool = False) -> Pcm:
        if self._stream is None:
            import soxr

            self._stream = soxr.ResampleStream(self.rate_in, self.rate_out, 1, dtype="float32")
        return np.asarray(self._stream.resample_chunk(pcm, last=last), np.float32)

    def _remember(self, pcm: Pcm) -> None:
        self._history = np.concatenate([self._history, pcm])
        old = len(self._history) - int(self._HISTORY_SECONDS * self.rate_in)
        if old >= self._period_in:
            old -= old % self._period_in
            self._history = self._history[old:].copy()  # a view would keep what was dropped
            self._first += old

    def _give(self, made: Pcm) -> Pcm:
        """What is new of it, after a `resume` that was behind or ahead."""
        if len(self._ahead):
            made = np.concatenate([self._ahead, made])
            self._ahead = self._ahead[:0]
        skip = min(self._skip, len(made))
        self._skip -= skip
        self._given += len(made) - skip
        return made[skip:]


@functools.lru_cache(maxsize=64)
def resampler_shortage(rate_in: int, rate_out: int, n_in: int, n_out: int) -> int:
    """How many samples a stream fed `n_in` at a time falls behind `n_out` a time, at most.

    That many samples of silence in front make every call give exactly `n_out`.
    """
    if rate_in == rate_out:
        return 0
    stream = StreamResampler(rate_in, rate_out)
    silence = np.zeros(n_in, np.float32)
    made = worst = 0
    for call in range(1, 257):
        made += len(stream.process(silence))
        worst = max(worst, call * n_out - made)
    return worst


def read_audio(path: str | os.PathLike[str], rate: int) -> Pcm:
    """Reads a file, float32[N] at `rate` Hz. Of several channels the first is taken.

    Raises:
        AudioError: the file is missing, is no sound file, or holds NaN or infinity.
    """
    blocks = list(read_blocks(path, rate))
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


def read_blocks(path: str | os.PathLike[str], rate: int) -> Iterator[Pcm]:
    """As read_audio, piece by piece, in memory that does not grow with the file (an MP3's does)."""
    import soundfile

    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise AudioError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AudioError(f"{str(path)[:200]} could not be opened: {reason}") from error
    if not stat.S_ISREG(mode):
        raise AudioError(f"{path} is not a file; expected WAV, FLAC, OGG, MP3 or AIFF")
    try:
        with soundfile.SoundFile(path) as file:
            yield from _resampled(path, file, rate)
    except AudioError:
        raise
    except (soundfile.LibsndfileError, RuntimeError, OSError, TypeError, ValueError) as error:
        reason = getattr(error, "error_string", None) or str(error)
        raise AudioError(
            f"{path} could not be read ({reason.strip().rstrip('.')}); "
            "expected WAV, FLAC, OGG, MP3 or AIFF"
        ) from error


def _resampled(path: Path, file: Any, rate: int) -> Iterator[Pcm]:
    found = check_rate(int(file.samplerate), f"the rate of {path}")
    resampler = StreamResampler(found, rate)
    at = 0
    for block in _first_channel(file, path.stat().st_size):
        yield resampler.process(as_pcm(block, str(path), first=at))
        at += len(block)
    yield resampler.flush()


def _first_channel(file: Any, file_bytes: int) -> Iterator[Pcm]:
    # In blocks: the length in a header is a claim, not a reason to allocate.
    # An MP3 goes in one read: soundfile seeks after each, and that decoder loses its place.
    length = _BLOCK
    if file.format == "MP3":
        length = max(_BLOCK, min(int(file.frames), file_bytes * _MP3_SAMPLES_A_BYTE))
    while True:
        block = file.read(length, dtype="float32", always_2d=True)
        if len(block) == 0:
            return
        yield np.ascontiguousarray(block[:, 0])


#: Suffix -> (format, subtype) of libsndfile.
_FORMATS = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".oga": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
    ".aiff": ("AIFF", "PCM_16"),
    ".aif": ("AIFF", "PCM_16"),
}


def check_suffix(path: str | os.PathLike[str]) -> None:
    """AudioError unless the suffix is one that AudioWriter writes and the folder exists."""
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise AudioError(
            f"{path} has the suffix {path.suffix!r}; expected one of {', '.join(_FORMATS)}"
        )
    if not path.parent.is_dir():
        raise AudioError(f"{path} cannot be written: there is no folder {path.parent}")


class AudioWriter:
    """Writes a file piece by piece, 16 bit where the format has it; louder than full scale is
    clipped. The format goes by the suffix. A file that is closed early is whole up to there."""

    def __init__(self, path: str | os.PathLike[str], rate: int, channels: int = 1) -> None:
        """Opens `path` for samples at `rate` Hz.

        Raises:
            AudioError: unknown suffix, no such folder, or a rate the format does not have.
        """
        import soundfile

        check_suffix(path)
        self.path = Path(path)
        kind, subtype = _FORMATS[self.path.suffix.lower()]
        self._errors = (soundfile.LibsndfileError, RuntimeError, OSError, TypeError, ValueError)
        try:
            self._file = soundfile.SoundFile(
                self.path, "w", samplerate=rate, channels=channels, format=kind, subtype=subtype
            )
        except self._errors as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> AudioError:
        reason = getattr(error, "error_string", None) or str(error)
        return AudioError(f"{self.path} cannot be written: {reason.strip().rstrip('.')}")

    def write(self, pcm: Pcm) -> None:
        """Appends float32[n], or float32[n, channels].

        Raises:
            AudioError: the file cannot be written, such as on a full disk.
        """
        try:
            for start in range(0, len(pcm), _BLOCK):
                self._file.write(pcm[start : start + _BLOCK])
        except self._errors as error:
            raise self._error(error) from error

    def close(self) -> None:
        """Completes the file. A second call does nothing.

        Raises:
            AudioError: the file cannot be written.
        """
        try:
            self._file.close()
        except self._errors as error:
            raise self._error(error) from error

    def __enter__(self) -> AudioWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def write_audio(path: str | os.PathLike[str], pcm: Any, rate: int) -> Path:
    """Writes `[N]` samples at `rate` Hz; see AudioWriter. Returns the path.

    Raises:
        AudioError: the samples, the rate, the suffix or the folder is not usable.
    """
    samples = as_pcm(pcm, most=np.inf)
    with AudioWriter(path, rate) as writer:
        writer.write(samples)
    return Path(path)
