"""`moshi-c chat`: a conversation with the model in this process, by microphone and loudspeaker."""

from __future__ import annotations

import queue
from collections.abc import Callable

from .audio import Pcm
from .session import Session
from .soundcard import EchoGate, Loudspeaker, gone, microphone

#: Blocks of the microphone that may wait for a step; older ones are left out.
_MOST_BLOCKS = 5


class Chat:
    """One conversation over the sound card.

    frames: stepped. left_out: blocks of the microphone that came while the model was too slow.
    """

    def __init__(
        self,
        session: Session,
        said: Callable[[str], None],
        *,
        echo_gate: bool = True,
        microphone: int | str | None = None,
        speaker: int | str | None = None,
    ) -> None:
        """Text goes to `said` as it comes. The devices are numbers or parts of names as
        `python -m sounddevice` lists them; None is the system's choice."""
        self._session, self._said = session, said
        self._microphone = microphone
        self._speaker = Loudspeaker(session.output_sample_rate, speaker)
        self._gate = EchoGate(self._speaker, shut=echo_gate)
        self._heard: queue.SimpleQueue[Pcm | None] = queue.SimpleQueue()
        self.frames = self.left_out = 0

    def run(self, listening: Callable[[], None] = lambda: None) -> None:
        """Talks until it is interrupted; calls `listening` when both devices are open.

        Raises:
            AudioError: the microphone has gone.
            DeviceError: no sounddevice, no PortAudio, or no such device.
            SessionError: the session ended.
        """
        session = self._session
        with (
            self._speaker,
            microphone(session.sample_rate, session.frame_size, self._heard.put, self._microphone),
        ):
            listening()
            while True:
                frame = session.step(self._gate(self._next()))
                self.frames += 1
                if frame.pcm is not None:
                    self._speaker.play(frame.pcm)
                if frame.text:
                    self._said(frame.text)

    def _next(self) -> Pcm:
        block = self._heard.get()
        while block is not None and self._heard.qsize() > _MOST_BLOCKS:
            block = self._heard.get()
            self.left_out += 1
        if block is None:
            raise gone()
        return block
