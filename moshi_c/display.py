"""How recordings and frames look in a notebook: HTML and SVG alone, nothing runs or is fetched.

Lines and letters take the colour of the page, so that they are legible on light and dark; the two
sides have colours that colour-blind readers tell apart. All of it is well-formed XML.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .audio import Pcm, resample

if TYPE_CHECKING:
    from .recording import Recording, Word
    from .session import Frame

#: Colours of the two sides, everywhere.
USER_COLOUR, MODEL_COLOUR = "#2f86c8", "#d55e00"

#: Of a longer recording a page holds the first part, which keeps it under 3 MB.
PAGE_SECONDS = 120.0

_PLAYER_RATE = 24000
_ROW_SECONDS = 10.0
_BIN_SECONDS = 0.04
_FLOOR_DB = -50.0

# In the units of the drawing, pixels at full width.
_LEFT, _WIDTH, _RIGHT = 48.0, 676.0, 36.0
_TRACK, _LANE, _AXIS, _GAP = 30.0, 15.0, 16.0, 8.0
_LETTER = 7.0
_LANES = 4

#: Letters of a word that are shown.
_WORD_LETTERS = 40

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _text(text: str) -> str:
    """Escaped for HTML and XML; what no page may hold becomes the replacement character."""
    return html.escape(_NOT_XML.sub("\ufffd", text))


def shortened(text: str, letters: int) -> str:
    """The text, or its beginning and an ellipsis."""
    return text if len(text) <= letters else text[: letters - 1] + "…"


def clock(seconds: float) -> str:
    """A time for people: 7.36 s, 2 min 5 s, 1 h 2 min."""
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


# ---- a recording -------------------------------------------------------------------------------


def recording_html(recording: Recording) -> str:
    """A player of both sides, their levels in time with the model's words, and a table of words."""
    shown = min(recording.duration, PAGE_SECONDS)
    user = _beginning(recording.user_pcm, recording.sample_rate, shown)
    model = _beginning(recording.pcm, recording.sample_rate, shown)
    words = [word for word in recording.words if word.start < shown]
    parts = [
        '<div style="max-width:760px;font-family:system-ui,sans-serif;font-size:13px">',
        _player(user, model),
    ]
    if shown < recording.duration:
        kept = "save() keeps all of it" if recording.pcm is not None else "words holds all of it"
        parts.append(
            f"<p>The first {clock(shown)} of {clock(recording.duration)} are shown; {kept}.</p>"
        )
    rows = range(math.ceil(shown / _ROW_SECONDS - 1e-9))
    # Short recordings fill the width, long ones get rows of the same scale.
    scale = _WIDTH / (_ROW_SECONDS if len(rows) > 1 else max(shown, 0.5 * _ROW_SECONDS))
    parts += [_row(row * _ROW_SECONDS, shown, scale, user, model, words) for row in rows]
    parts += [_word_table(words), "</div>"]
    return "".join(parts)


def _beginning(pcm: Pcm | None, rate: int, seconds: float) -> Pcm | None:
    """The part that is shown, at the player's rate, finite and within -1..1."""
    if pcm is None:
        return None
    part = np.nan_to_num(pcm[: round(seconds * rate)], nan=0.0, posinf=1.0, neginf=-1.0)
    return np.clip(resample(part, rate, _PLAYER_RATE), -1.0, 1.0)


def _player(user: Pcm | None, model: Pcm | None) -> str:
    import soundfile

    sides = [side for side in (user, model) if side is not None and len(side)]
    if not sides:
        return ""
    sound = np.zeros((max(map(len, sides)), len(sides)), np.float32)
    for channel, side in enumerate(sides):
        sound[: len(side), channel] = side
    out = io.BytesIO()
    # MP3: a tenth of WAV or less, and every browser plays it.
    soundfile.write(out, sound, _PLAYER_RATE, format="MP3", subtype="MPEG_LAYER_III")
    data = base64.b64encode(out.getvalue()).decode("ascii")
    both = "left: you, right: the model"
    caption = both if len(sides) == 2 else "the model" if model is not None else "you"
    return (
        '<audio controls="controls" style="width:100%;height:40px" '
        f'src="data:audio/mpeg;base64,{data}"></audio>'
        f'<div style="opacity:.7;font-size:11px;margin:2px 0 6px">{caption}</div>'
    )


def _row(
    begin: float,
    end: float,
    scale: float,
    user: Pcm | None,
    model: Pcm | None,
    words: Sequence[Word],
) -> str:
    """One line of the timeline: the model's words over its level, the user's level, the seconds."""
    end = min(end, begin + _WIDTH / scale)
    lanes = _in_lanes([word for word in words if begin <= word.start < end], begin, scale)
    above = _LANE * len(lanes)
    sides = (("model", MODEL_COLOUR, model), ("you", USER_COLOUR, user))
    tracks = [(name, colour, pcm) for name, colour, pcm in sides if pcm is not None]
    bottom = above + len(tracks) * _TRACK
    height, width = bottom + _AXIS + _GAP, _LEFT + _WIDTH + _RIGHT

    lines = "".join(
        f"M{_LEFT + second * scale:g} {above:g}V{bottom + 3:g}"
        for second in range(math.floor(end - begin + 1e-9) + 1)
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="levels from {begin:g} to {end:.2f} s" '
        'style="display:block;width:100%;overflow:visible" fill="currentColor" font-size="12">',
        f'<path d="{lines}" stroke="currentColor" stroke-opacity=".18"/>',
    ]
    for index, (name, colour, pcm) in enumerate(tracks):
        middle = above + (index + 0.5) * _TRACK
        parts.append(
            f'<text x="{_LEFT - 8:g}" y="{middle + 4:g}" text-anchor="end" fill="{colour}">'
            f'{name}</text><g stroke="{colour}">'
            f'<path d="M{_LEFT:g} {middle:g}h{(end - begin) * scale:.1f}"/>'
            f'<path d="{_bars(pcm, begin, end, scale, middle)}" '
            f'stroke-width="{0.7 * _BIN_SECONDS * scale:.2f}"/></g>'
        )
    for lane, placed in enumerate(lanes):
        y = above - _LANE * lane - 4
        for x, word in placed:
            parts.append(
                f'<path d="M{x:g} {y - 8:g}V{above + _TRACK / 2:g}" stroke="{MODEL_COLOUR}" '
                f'stroke-opacity=".5"/><text x="{x + 3:.1f}" y="{y:g}">'
                f"<title>{word.start:.2f} to {word.end:.2f} s</title>"
                f"{_text(shortened(word.text, _WORD_LETTERS))}</text>"
            )
    for second in range(math.floor(end - begin + 1e-9) + 1):
        parts.append(
            f'<text x="{_LEFT + second * scale:g}" y="{bottom + 14:g}" text-anchor="middle" '
            f'font-size="10" fill-opacity=".7">{begin + second:g} s</text>'
        )
    parts.append("</svg>")
    return "".join(parts)


def _bars(pcm: Pcm, begin: float, end: float, scale: float, middle: float) -> str:
    """A bar for every 40 ms, as high as its level is above -50 dBFS."""
    size = round(_BIN_SECONDS * _PLAYER_RATE)
    first, last = round(begin * _PLAYER_RATE), round(end * _PLAYER_RATE)
    part = pcm[first:last]
    part = np.concatenate([part, np.zeros(-len(part) % size, np.float32)]).reshape(-1, size)
    power = np.mean(np.square(part, dtype=np.float64), axis=1)
    level = 10.0 * np.log10(np.maximum(power, 1e-12))
    heights = np.clip(level / -_FLOOR_DB + 1.0, 0.0, 1.0) * (_TRACK - 4.0)
    bars = []
    for index, high in enumerate(heights):
        if high >= 1:
            x = _LEFT + (index + 0.5) * _BIN_SECONDS * scale
            bars.append(f"M{x:.1f} {middle - high / 2:.1f}v{high:.1f}")
    return "".join(bars)


def _in_lanes(words: Sequence[Word], begin: float, scale: float) -> list[list[tuple[float, Word]]]:
    """Words with their places, on as many lines as it takes for none to cover another; what does
    not fit on the last line stands in the table alone."""
    lanes: list[list[tuple[float, Word]]] = []
    free: list[float] = []  # where each line is free again
    for word in words:
        x = _LEFT + (word.start - begin) * scale
        lane = next((lane for lane, until in enumerate(free) if until <= x), len(free))
        if lane == _LANES:
            continue
        if lane == len(free):
            lanes.append([])
            free.append(0.0)
        lanes[lane].append((x, word))
        free[lane] = x + _LETTER * (min(len(word.text), _WORD_LETTERS) + 1.5)
    return lanes


def _word_table(words: Sequence[Word]) -> str:
    if not words:
        return '<p style="opacity:.7">no words</p>'
    rows = "".join(
        f'<tr><td style="text-align:left">{_text(shortened(word.text, _WORD_LETTERS))}</td>'
        f"<td>{word.start:.2f}</td><td>{word.end:.2f}</td></tr>"
        for word in words
    )
    said = " ".join(_text(shortened(word.text, _WORD_LETTERS)) for word in words)
    count = "1 word and its time" if len(words) == 1 else f"{len(words)} words and their times"
    return (
        f'<p style="font-size:15px;margin:4px 0">{said}</p>'
        f'<details><summary style="cursor:pointer">{count}</summary>'
        "<table><thead><tr><th>word</th><th>from s</th><th>to s</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></details>"
    )


# ---- a frame -----------------------------------------------------------------------------------


def frame_html(frame: Frame) -> str:
    """One line: index, time, the user's level as a bar, the model's text, and who speaks."""
    full = 60.0
    width = full * min(max(frame.level / -_FLOOR_DB + 1.0, 0.0), 1.0)
    text = _text(repr(frame.text)) if frame.text_token >= 0 else "no output yet"
    speaking = f' <span style="color:{MODEL_COLOUR}">speaking</span>' if frame.speaking else ""
    event = f" {_text(frame.event)}" if frame.event else ""
    return (
        '<div style="font-family:ui-monospace,monospace;font-size:13px;white-space:pre">'
        f"frame {frame.index:<4d} {frame.time:6.2f} s   "
        f'<span style="color:{USER_COLOUR}">you</span> '
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{full:g}" height="9" role="img" '
        f'aria-label="{frame.level:.0f} dBFS" fill="{USER_COLOUR}">'
        f'<rect width="{full:g}" height="9" fill="currentColor" fill-opacity=".15"/>'
        f'<rect width="{width:.1f}" height="9"/></svg> {frame.level:4.0f} dBFS   '
        f'<span style="color:{MODEL_COLOUR}">model</span> {text}{speaking}{event}</div>'
    )
