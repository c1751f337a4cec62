"""Turns in a conversation that has none: who is speaking, told frame by frame."""

from __future__ import annotations

from dataclasses import dataclass, field

from .session import Frame

#: The user has begun to speak after this many loud frames, and stopped after this many others.
_BEGIN_FRAMES, _END_FRAMES = 2, 8


@dataclass(slots=True)
class Reply:
    """What the model says without a pause of a second.

    start: when it began, in seconds of the conversation.
    latency: seconds from the user's last sound to it; None when the user had said nothing since the
        last reply, or was speaking still.
    text: all of it so far.
    frames: of 80 ms, so far; each has one text token.
    input_codes, output_codes: audio tokens heard and said meanwhile.
    """

    start: float
    latency: float | None
    text: str = ""
    frames: int = 0
    input_codes: int = 0
    output_codes: int = 0


@dataclass(frozen=True, slots=True)
class Moment:
    """A frame, and what changed in it.

    user: True, the user has begun to speak; False, has stopped; None, neither.
    reply: what the model is saying, in its last frame too; None when it is silent.
    began, ended: this is the reply's first frame; its last one.
    """

    frame: Frame
    user: bool | None = None
    reply: Reply | None = None
    began: bool = False
    ended: bool = False


@dataclass(slots=True)
class Turns:
    """Who is speaking, told frame by frame.

    user_level: the user's voice is above this, dBFS.
    """

    user_level: float = -45.0
    _user: bool = field(default=False, init=False)
    _against: int = field(default=0, init=False)  # frames in a row that differ from _user
    _loud: float | None = field(default=None, init=False)  # the user's last, not yet answered
    _reply: Reply | None = field(default=None, init=False)

    def add(self, frame: Frame) -> Moment:
        """The next frame."""
        loud = frame.level > self.user_level
        user = None
        self._against = self._against + 1 if loud != self._user else 0
        if self._against >= (_END_FRAMES if self._user else _BEGIN_FRAMES):
            self._user, self._against, user = loud, 0, loud
        if loud:
            self._loud = frame.time

        reply = self._reply
        began = frame.speaking and reply is None
        if began:
            speaks = self._loud is None or self._loud == frame.time
            reply = Reply(frame.time, None if speaks else frame.time - (self._loud or 0.0))
            self._loud = None
        if reply is not None:
            reply.text += frame.text
            reply.frames += 1
            reply.input_codes += len(frame.user_codes)
            reply.output_codes += len(frame.codes) if frame.codes is not None else 0
        self._reply = reply if frame.speaking else None
        return Moment(frame, user, reply, began, reply is not None and not frame.speaking)
