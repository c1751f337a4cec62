"""Two sessions that talk to each other: each hears what the other said one frame ago."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np

from .audio import Pcm
from .errors import AudioError
from .session import Frame, Session, step_many

#: Frames without a word of either, two seconds, after which the next question is asked ...
PAUSE_FRAMES = 25
#: ... and half a second in front of the first.
START_FRAMES = 6


def duet(
    left: Session, right: Session, questions: Iterable[Pcm] = ()
) -> Iterator[tuple[Frame, Frame, Pcm]]:
    """Steps both without end: a frame of each, and float32[n, 2], what was to be heard of them.

    Args:
        left, right: two sessions of one model with a voice, at its rate both ways.
        questions: sound at the model's rate, said in the left one's place; the first after half a
            second, each other one when both have been silent for two seconds.

    Raises:
        AudioError: the model has no voice, or a session has a rate of its own.
        SessionError, ValueError: as for `step_many`.
    """
    model = left.model
    if model._info["dep_q"] == 0:
        raise AudioError("this model has no voice; expected one that speaks")
    for session in (left, right):
        for rate in (session.sample_rate, session.output_sample_rate):
            if rate != model.sample_rate:
                raise AudioError(
                    f"a session of a duet is at {rate} Hz; expected {model.sample_rate} Hz"
                )
    size = model.frame_size
    waiting = deque(questions)
    asking, quiet = np.zeros(0, np.float32), PAUSE_FRAMES - START_FRAMES
    sound: Pcm = np.zeros((size, 2), np.float32)
    while True:
        frames = step_many([left, right], [sound[:, 1], sound[:, 0]])
        quiet = 0 if len(asking) or any(frame.speaking for frame in frames) else quiet + 1
        if waiting and quiet > PAUSE_FRAMES:
            asking = waiting.popleft()
        sound = np.stack([np.asarray(frame.pcm) for frame in frames], axis=1)
        sound[: len(asking), 0] += asking[:size]
        asking = asking[size:]
        np.clip(sound, -1.0, 1.0, out=sound)
        yield frames[0], frames[1], sound
