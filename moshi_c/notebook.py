"""A call in a notebook: the browser's microphone in, the model's voice, words and levels out.

    from moshi_c.notebook import talk

    call = talk()          # a widget: press Call and speak
    call.recording         # what was said, once it is over or meanwhile

The page cancels the echo of its own loudspeakers. Sound comes as messages of the widget and is put
on a queue; a thread of its own steps the session, so that the kernel is free for other cells. It
works where anywidget does: JupyterLab, Notebook, VS Code, Colab. Where a page may not open the
microphone, it can play a file to the model instead.
"""

from __future__ import annotations

import inspect
import queue
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .audio import Pcm, StreamResampler, as_pcm, check_rate
from .errors import AudioError, SessionError
from .model import Model, load
from .recording import Recording
from .session import Frame, Session
from .telephony import encode

try:
    import anywidget
    import traitlets
except ImportError as error:
    raise ImportError(
        f"moshi_c.notebook needs anywidget, which could not be imported ({error}); "
        "install it with: pip install 'moshi_c[notebook]'"
    ) from error

#: Pieces of sound that wait for the model, some two seconds; a page may be ahead by no more.
WAITING_PIECES = 25
#: Frames that a recording of a call keeps: its last ten minutes.
KEPT_FRAMES = 7500


class Talk(anywidget.AnyWidget):
    """The widget of a call. `talk` makes one."""

    _esm = Path(__file__).parent / "data" / "talk.js"
    #: Whether a call is on.
    live = traitlets.Bool(False).tag(sync=True)

    def __init__(self, model: Model, **options: Any) -> None:
        super().__init__()
        self._moshi = model
        self._options = options
        self._thread: threading.Thread | None = None
        self._inbox: queue.SimpleQueue[Pcm | str | None] = queue.SimpleQueue()
        self._said: deque[tuple[Frame, Pcm]] = deque(maxlen=KEPT_FRAMES)
        self._session: Session | None = None
        #: Pieces of the page's sound that were dropped, since the model was behind.
        self.dropped = 0
        self.on_msg(self._receive)

    def start(self, rate: int | None = None) -> None:
        """Begins a call.

        Args:
            rate: of the sound that comes, in Hz; None for the model's.

        Raises:
            AudioError: a rate that is not usable.
            SessionError: a call is on, the model is closed, or it has no free slot.
        """
        if self._thread is not None and self._thread.is_alive():
            raise SessionError("this call is on; expected stop() before another start()")
        rate = check_rate(self._moshi.sample_rate if rate is None else rate, "rate")
        self._session = Session(self._moshi, **self._options)
        self._inbox = queue.SimpleQueue()
        self._said.clear()
        self.dropped = 0
        self.live = True
        self._thread = threading.Thread(
            target=self._converse, args=(self._session, rate), name="moshi_c call", daemon=True
        )
        self._thread.start()

    def hear(self, pcm: Any) -> None:
        """Gives the call any number of samples at its rate, and comes back at once.

        Raises:
            AudioError: not usable as samples.
            SessionError: no call is on.
        """
        samples = as_pcm(pcm)
        self._check_live()
        self._inbox.put(samples)

    def say(self, text: str) -> None:
        """Makes the model say this from the next frame on, as `Session.say`; words that it cannot
        say are reported in the widget.

        Raises:
            SessionError: no call is on.
        """
        self._check_live()
        self._inbox.put(text)

    def stop(self) -> Recording:
        """Ends the call when all that came has been heard, and gives its recording."""
        self._inbox.put(None)
        if self._thread is not None:
            self._thread.join()
        return self.recording

    def close(self) -> None:
        """Ends the call and removes the widget."""
        self._inbox.put(None)
        super().close()

    @property
    def recording(self) -> Recording:
        """Both sides of the last ten minutes of the call, the present one or the last.

        Raises:
            SessionError: there has been no call.
        """
        if self._session is None:
            raise SessionError("there has been no call; press Call, or start() one")
        said = self._said.copy()
        recording = self._session._recording([frame for frame, _ in said])
        heard = [pcm for _, pcm in said]
        return replace(
            recording, user_pcm=np.concatenate(heard) if heard else np.zeros(0, np.float32)
        )

    def _check_live(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            raise SessionError("no call is on; press Call, or start() one")

    def _receive(self, _: Any, content: Any, buffers: Sequence[Any]) -> None:
        """A message of the page. It comes on the kernel's thread, so nothing here waits."""
        try:
            kind = content["type"]
            if kind == "start":
                self.start(int(content["rate"]))
            elif kind == "stop":
                self._inbox.put(None)
            elif kind == "sound" and self._inbox.qsize() >= WAITING_PIECES:
                self.dropped += 1
            elif kind == "sound":
                self.hear(np.frombuffer(buffers[0], "<i2"))
        except SessionError as error:
            if kind == "start":  # sound that is on its way when a call ends is no news
                self._tell(error)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            self._tell(error)

    def _tell(self, error: Exception) -> None:
        self.send({"type": "error", "message": str(error)})

    def _converse(self, session: Session, rate: int) -> None:
        """The thread of a call: steps what came until there is None."""
        model = self._moshi
        resampler = StreamResampler(rate, model.sample_rate)
        waiting: Pcm = np.zeros(0, np.float32)
        try:
            while (item := self._inbox.get()) is not None:
                if isinstance(item, str):
                    try:
                        session.say(item)
                    except ValueError as error:
                        self._tell(error)
                    continue
                waiting = np.concatenate([waiting, resampler.process(item)])
                while len(waiting) >= model.frame_size:
                    pcm, waiting = np.split(waiting, [model.frame_size])
                    self._show(session.step(pcm), pcm)
        except Exception as error:  # a thread has nobody else to tell
            self._tell(error)
        finally:
            session.close()
            self.live = False

    def _show(self, frame: Frame, heard: Pcm) -> None:
        """Sends a frame to the page and keeps it."""
        voice = frame.pcm if frame.pcm is not None else np.zeros(0, np.float32)
        power = float(np.mean(np.square(voice))) if len(voice) else 0.0
        self.send(
            {
                "type": "frame",
                "text": frame.text,
                "user": frame.level,
                "model": 10.0 * float(np.log10(max(power, 1e-12))),
                "rate": self._moshi.sample_rate,
            },
            [encode(voice, "s16")],
        )
        self._said.append((frame, heard))


def talk(model: Model | None = None, **options: Any) -> Talk:
    """A widget to call a model from a notebook.

    Args:
        model: what `load` gave; None for the small model in the package.
        options: of the call's `Session`, such as `seed=7`.

    Raises:
        TypeError: an option that `Session` does not have.
        AudioError: a rate among the options; the call is at the model's, the page's is converted.
    """
    for name in ("sample_rate", "output_sample_rate"):
        if name in options:
            raise AudioError(f"talk got {name}; a call takes the page's rate and gives the model's")
    model = load() if model is None else model
    inspect.signature(Session).bind(model, **options)
    return Talk(model, **options)
