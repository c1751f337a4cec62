"""A sound card for tests, in the place of the package sounddevice. The microphone hears the file
SOUND_IN, the loudspeaker writes what it plays to the file SOUND_OUT; both are raw float32.

SOUND_PACE are the seconds of a block, 0 for as fast as it goes. SOUND_END says what happens when
the file has been heard: "gone", the microphone is unplugged, or "ctrl-c", the user has had enough.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np


class PortAudioError(Exception):
    """As sounddevice has it."""


class _Stream:
    latency = 0.01

    def __init__(self, *, device: Any, samplerate: int, blocksize: int, **options: Any) -> None:
        if device == "none":
            raise ValueError("No device matching 'none'")
        assert samplerate == 24000 and options["channels"] == 1 and options["dtype"] == "float32"
        self.size = blocksize or 480
        self.callback = options["callback"]
        self.finished = options.get("finished_callback")
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        self.closed.set()
        self.thread.join()
        if self.finished:
            self.finished()

    def run(self) -> None:
        raise NotImplementedError

    def wait(self, began: float, block: int) -> bool:
        """Whether it is still open when that block is due."""
        pace = float(os.environ.get("SOUND_PACE", "0"))
        due = began + block * pace * self.size / 1920
        return not self.closed.wait(max(0.0, due - time.monotonic()))


class InputStream(_Stream):
    def run(self) -> None:
        pcm = np.fromfile(os.environ["SOUND_IN"], np.float32)
        began = time.monotonic()
        for block in range(len(pcm) // self.size):
            if not self.wait(began, block):
                return
            piece = pcm[block * self.size : (block + 1) * self.size, None]
            self.callback(piece, self.size, None, None)
        if os.environ["SOUND_END"] == "ctrl-c":
            os.kill(os.getpid(), signal.SIGINT)
        else:
            self.finished()


class OutputStream(_Stream):
    def run(self) -> None:
        out = np.empty((self.size, 1), np.float32)
        began = time.monotonic()
        with Path(os.environ["SOUND_OUT"]).open("wb") as file:
            block = 0
            while self.wait(began, block):
                self.callback(out, self.size, None, None)
                file.write(out.tobytes())
                block += 1
