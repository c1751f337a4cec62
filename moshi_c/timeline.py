"""A conversation in a terminal: the levels of both sides over one axis, and the model's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .audio import Pcm

if TYPE_CHECKING:
    from .recording import Recording, Word

_BARS = " ▁▂▃▄▅▆▇█"
_FLOOR_DB = -50.0
_MARGIN = 7  # columns left of the axis, for the names of the sides


def draw(recording: Recording, columns: int) -> str:
    """Lines of at most `columns` letters (at least 20): a column is a frame, and every line of the
    conversation has its seconds, the user's level, the model's, and its words under them."""
    width = max(columns, 20) - _MARGIN
    frames = int(recording.user_codes.shape[1])
    user = _bars(recording.user_pcm, frames)
    model = _bars(recording.pcm, frames)
    blocks = []
    for first in range(0, max(frames, 1), width):
        last = min(first + width, frames)
        rows = [("", _axis(first, last, width, recording.frame_rate))]
        rows += [("you", user[first:last])] if user else []
        rows += [("model", model[first:last])] if model else []
        rows += [("", lane) for lane in _lanes(recording, first, last, width)]
        blocks.append("\n".join(f"{name:{_MARGIN}}{row}".rstrip() for name, row in rows))
    return "\n\n".join(blocks)


def _bars(pcm: Pcm | None, frames: int) -> str:
    """A letter for each frame, as high as its level is above -50 dBFS."""
    if pcm is None or not frames:
        return ""
    size = max(len(pcm) // frames, 1)
    part = np.nan_to_num(pcm[: size * frames]).astype(np.float64).reshape(-1, size)
    level = 10.0 * np.log10(np.maximum(np.mean(np.square(part), axis=1), 1e-12))
    heights = np.clip(level / -_FLOOR_DB + 1.0, 0.0, 1.0) * (len(_BARS) - 1)
    return "".join(_BARS[int(np.ceil(height))] for height in heights)


def _axis(first: int, last: int, width: int, frame_rate: float) -> str:
    """Whole seconds, each where its frame is."""
    row, second = "", int(np.ceil(first / frame_rate))
    while (at := round(second * frame_rate) - first) < last - first:
        label = f"{second} s"
        if len(row) < max(at, 1) and at + len(label) <= width:
            row = f"{row:{at}}{label}"
        second += 1
    return row


def _lanes(recording: Recording, first: int, last: int, width: int) -> list[str]:
    """The words that begin in these frames, each on the first line where there is room for it."""
    lanes: list[str] = []
    for word in _within(recording.words, first, last, recording.frame_rate):
        text = "".join(letter if letter.isprintable() else "?" for letter in word.text)[:width]
        at = min(round(word.start * recording.frame_rate) - first, width - len(text))
        lane = next((i for i, row in enumerate(lanes) if not row or len(row) < at), len(lanes))
        if lane == len(lanes):
            lanes.append("")
        lanes[lane] = f"{lanes[lane]:{at}}{text}"
    return lanes


def _within(words: Sequence[Word], first: int, last: int, frame_rate: float) -> list[Word]:
    return [word for word in words if first <= round(word.start * frame_rate) < last]
