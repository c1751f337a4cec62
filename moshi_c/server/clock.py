"""The clock of a live call: when a frame is stepped, when silence takes its place, what is too old.

The caller's frames are the clock. The first whole frame starts it; from then on a frame is due
every 80 ms.

- A frame is stepped as soon as it is whole. After a gap or a burst the conversation may run ahead
  of its clock by LEAD, no more: ten times too fast is not stepped ten times as fast.
- No whole frame for `tolerance` after it was due: silence is stepped in its place, so that who
  stalls still hears the model. Who has not said anything yet does not start the clock, unless the
  model was given something to say.
- The first frame after silence starts the clock anew. What comes in a burst then is too old, since
  its time was given to silence: no more than the newest KEPT frames of it are taken. A microphone
  that was muted for a while comes back a frame or two at a time, and loses nothing.
- The clock follows the caller's by up to FOLLOW of a frame each frame, so a sound card that is off
  by 0.1 % neither gathers frames nor lacks any: as many frames come out as went in, by the caller's
  own clock. Measured is the latest frame of each WINDOW; a client that sends every half second is
  as good as one that sends every 20 ms.
- Frames that waited through a whole window are a lag that would stay; they are dropped.
- When the server itself was held up it looks at what has come meanwhile before it puts in silence.

Times are seconds of one monotonic clock, given by the caller; changes of the time of day do not
matter.
"""

from __future__ import annotations

LEAD = 0.24  # s that a conversation may be ahead of its clock
FOLLOW = 0.02  # of a frame, how far the clock moves each frame
WINDOW = 25  # frames, 2 s
KEPT = 3  # frames of a burst after a stall

STEP, SILENCE, WAIT = "step", "silence", "wait"


class Clock:
    """One call's."""

    def __init__(self, frame_seconds: float, tolerance: float) -> None:
        self._frame = frame_seconds
        self._tolerance = tolerance
        self._due: float | None = None
        self._not_before = 0.0  # silence
        self._debt = 0  # frames given to silence whose sound may still come
        self._silent = False  # the last step
        self._begin_window()

    def _begin_window(self) -> None:
        self._steps = 0
        self._latest = -self._frame
        self._least: int | None = None

    def decide(self, now: float, ready: int) -> tuple[str, float]:
        """STEP, SILENCE or WAIT, and until when to wait with `ready` frames there."""
        if self._due is None:
            return (STEP, now) if ready else (WAIT, float("inf"))
        if ready:
            at = self._due - LEAD
            return (STEP if self._silent or now >= at else WAIT), at
        at = max(self._due + self._tolerance, self._not_before)
        return (SILENCE if now >= at else WAIT), at

    def begin(self, now: float) -> None:
        """Starts without a frame; silence is stepped until one comes."""
        if self._due is None:
            self._due = now

    def was_held_up(self, now: float) -> None:
        """The server could not look for a while."""
        self._not_before = now + self._tolerance

    def too_old(self, ready: int) -> int:
        """Of `ready` frames that have come, how many came after their time."""
        old = max(0, min(self._debt, ready - KEPT))
        self._debt -= old
        return old

    def silent(self) -> None:
        """Silence was stepped."""
        assert self._due is not None
        self._due += self._frame
        self._debt += 1
        self._silent = True
        self._begin_window()

    def stepped(self, arrived: float, left: int) -> int:
        """A frame that was whole at `arrived` is stepped, and `left` wait; returns how many of
        these are a lag that would stay."""
        if self._due is None or self._silent:
            self._due, self._silent = arrived, False
        self._latest = max(self._latest, arrived - self._due)
        self._least = left if self._least is None else min(self._least, left)
        self._due += self._frame
        self._steps += 1
        if self._steps < WINDOW:
            return 0
        most = FOLLOW * self._frame * WINDOW
        self._due += max(-most, min(most, self._latest))
        lag = self._least
        self._debt = 0
        self._begin_window()
        return lag
