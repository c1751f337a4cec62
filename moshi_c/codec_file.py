"""`.mimi` files: the codes of a codec, with what is needed to turn them back into sound.

All numbers are little endian.

    offset  type     what
         0  4 bytes  "MIMI"
         4  u16      version, 1
         6  u16      codebooks K, 1 to 64
         8  u32      codes are below this, 1 to 65536
        12  u32      sample rate of the sound, Hz
        16  u32      samples of one frame
        20  u32      frames T
        24  u64      samples of the sound, at most T frames and more than T - 1
        32  u16[T, K] codes, frame by frame; nothing follows

At 12.5 frames a second and 8 codebooks that is 200 bytes a second.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .audio import MAX_RATE, MIN_RATE
from .errors import AudioError

_HEADER = struct.Struct("<4sHHIIIIQ")
_MAGIC = b"MIMI"
_VERSION = 1
_MAX_CODEBOOKS = 64
_MAX_FRAME = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class CodecFile:
    """codes: int32[K, T]. codebook_size: codes are below it. samples: of the sound, whose last
    frame may be cut. sample_rate: Hz. frame_size: samples of one frame."""

    codes: NDArray[np.int32]
    codebook_size: int
    samples: int
    sample_rate: int
    frame_size: int

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return self.sample_rate / self.frame_size


def write_codec_file(path: str | os.PathLike[str], file: CodecFile) -> Path:
    """Writes a `.mimi` file. Returns the path.

    Raises:
        AudioError: values that the format does not have, or a path that cannot be written.
    """
    path = Path(path)
    codebooks, frames = file.codes.shape
    size = (codebooks, file.codebook_size, file.sample_rate, file.frame_size, frames, file.samples)
    _check(path, *size)
    if file.codes.size and not 0 <= file.codes.min() <= file.codes.max() < file.codebook_size:
        raise AudioError(f"{path}: codes out of range; expected 0 to {file.codebook_size - 1}")
    header = _HEADER.pack(_MAGIC, _VERSION, *size)
    try:
        with path.open("wb") as out:
            out.write(header)
            out.write(np.ascontiguousarray(file.codes.T, "<u2").tobytes())
    except OSError as error:
        raise AudioError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def read_codec_file(path: str | os.PathLike[str]) -> CodecFile:
    """Reads a `.mimi` file.

    Raises:
        AudioError: the file is missing or differs from the format in any way.
    """
    path = Path(path)
    try:
        with path.open("rb") as source:
            header = source.read(_HEADER.size)
            found = os.fstat(source.fileno()).st_size
            if len(header) < _HEADER.size or header[:4] != _MAGIC:
                raise AudioError(f"{path} is not a .mimi file")
            _, version, *numbers = _HEADER.unpack(header)
            if version != _VERSION:
                raise AudioError(f"{path} has version {version}; expected {_VERSION}")
            codebooks, codebook_size, sample_rate, frame_size, frames, samples = numbers
            _check(path, *numbers)
            expected = _HEADER.size + 2 * codebooks * frames
            if found != expected:
                raise AudioError(
                    f"{path} has {found} bytes; expected {expected} for {frames} frames of "
                    f"{codebooks} codes"
                )
            data = source.read(expected - _HEADER.size)
    except OSError as error:
        raise AudioError(f"{path} could not be read: {error.strerror or error}") from error
    if len(data) != expected - _HEADER.size:
        raise AudioError(f"{path} ended early; was it being written?")
    codes = np.frombuffer(data, "<u2").reshape(frames, codebooks).T.astype(np.int32)
    if codes.size and codes.max() >= codebook_size:
        raise AudioError(f"{path} holds the code {codes.max()}; expected below {codebook_size}")
    return CodecFile(np.ascontiguousarray(codes), codebook_size, samples, sample_rate, frame_size)


def _check(
    path: Path,
    codebooks: int,
    codebook_size: int,
    sample_rate: int,
    frame_size: int,
    frames: int,
    samples: int,
) -> None:
    ranges = (
        ("codebooks", codebooks, 1, _MAX_CODEBOOKS),
        ("entries of a codebook", codebook_size, 1, 1 << 16),
        ("Hz", sample_rate, MIN_RATE, MAX_RATE),
        ("samples in a frame", frame_size, 1, _MAX_FRAME),
        ("frames", frames, 0, 2**32 - 1),
        ("samples", samples, max(0, (frames - 1) * frame_size + 1) if frames else 0,
         frames * frame_size),
    )  # fmt: skip
    for what, value, low, high in ranges:
        if not low <= value <= high:
            raise AudioError(f"{path} has {value} {what}; expected {low} to {high}")
