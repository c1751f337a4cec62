"""What the tests of all frameworks ask the model in the package, as WAV files, and what it says."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import numpy as np
import sound
import soundfile
from numpy.typing import NDArray

import moshi_c

QUESTION, ANSWER = "what colour is the sky", "the sky is blue"
SEED = 7
RATE, FRAME = 24000, 1920


def question(text: str = QUESTION, after: float = 4.0) -> NDArray[np.float32]:
    """Half a second of silence, the question, and time for the answer; in whole frames."""
    return sound.question(text, before=0.5, after=after, level=0.5)


def write(path: Path, pcm: NDArray[np.float32], rate: int = RATE) -> Path:
    """A WAV file of 16 bits."""
    soundfile.write(path, moshi_c.audio.resample(pcm, RATE, rate), rate, subtype="PCM_16")
    return path


def read(path: Path) -> tuple[NDArray[np.int16], int]:
    """Its samples and rate."""
    return soundfile.read(path, dtype="int16")


def alone(model: moshi_c.Model, pcm: NDArray[np.int16]) -> tuple[NDArray[np.int16], str]:
    """What a session says to this by itself, frame by frame."""
    with moshi_c.Session(model, seed=SEED) as session:
        frames = [session.step(frame) for frame in pcm.reshape(-1, FRAME)]
    voice = np.concatenate([frame.pcm for frame in frames])
    samples = np.clip(np.rint(voice * 32768), -32768, 32767).astype(np.int16)
    return samples, "".join(frame.text for frame in frames).strip()


def is_spoken(given: NDArray[np.int16], expected: NDArray[np.int16]) -> bool:
    """Whether it is what a session says, bit for bit where it speaks, and zeros elsewhere."""
    spoken = given != 0
    return bool(
        spoken.sum() > RATE
        and np.array_equal(given[spoken], expected[spoken])
        and np.abs(expected[~spoken]).max() < 20
    )


def example(name: str, folder: Path) -> tuple[str, NDArray[np.int16]]:
    """What an example prints when it hears the question from a file, and the file it writes."""
    path = Path(__file__).parent.parent.parent / "examples" / name
    source, target = write(folder / "in.wav", question(after=0.5)), folder / "out.wav"
    command = [sys.executable, str(path), str(source), str(target)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return done.stdout, read(target)[0]


def is_free(model: moshi_c.Model) -> bool:
    """Whether the only slot of a model can be taken."""
    try:
        moshi_c.Session(model).close()
    except moshi_c.SessionError:
        return False
    return True


class Ticks:
    """Counts how often the event loop comes around."""

    def __init__(self) -> None:
        self.count = 0

    async def __aenter__(self) -> Ticks:
        self._task = asyncio.create_task(self._run())
        return self

    async def _run(self) -> None:
        while True:
            self.count += 1
            await asyncio.sleep(0.001)

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()
