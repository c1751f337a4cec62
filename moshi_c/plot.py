"""A recording as one picture, by matplotlib: sound, words, spectrograms and codes in time."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .audio import Pcm
from .display import MODEL_COLOUR, USER_COLOUR, shortened

if TYPE_CHECKING:
    from .recording import Recording, Word

#: Columns of a waveform or spectrogram, whatever the recording lasts.
_COLUMNS = 1500

_WINDOW = 1024
# Speech has hardly a sine above -20 dB.
_FLOOR_DB, _TOP_DB = -80.0, -20.0
_TOP_KHZ = 8.0

_WIDTH_INCHES = 10.0
_LETTER_INCHES = 0.085
_WORD_LETTERS = 24
_LANES = 3


class Picture(Figure):
    """A figure that notebooks show without pyplot, and so without a list of open figures."""

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        self.savefig(out, format="png")
        return out.getvalue()


def draw(recording: Recording, start: float, end: float) -> Figure:
    """The figure of the part from `start` to `end`, in seconds.

    Raises:
        ValueError: an empty part, or one that begins outside the recording.
    """
    if not 0 <= start < min(end, recording.duration):
        raise ValueError(
            f"plot was asked for {start:g} to {end:g} s; expected a part of the recording's "
            f"0 to {recording.duration:.2f} s"
        )
    end = min(end, recording.duration)
    sides: list[tuple[str, str, Pcm]] = []
    for name, colour, pcm in (
        ("you", USER_COLOUR, recording.user_pcm),
        ("model", MODEL_COLOUR, recording.pcm),
    ):
        if pcm is not None:
            sides.append((name, colour, _part(pcm, recording.sample_rate, start, end)))

    heights = [0.5 + 0.6 * len(sides)] * bool(sides) + [0.7] + [1.2] * len(sides) + [2.0]
    figure = Picture(figsize=(_WIDTH_INCHES, 1.3 * sum(heights)), dpi=100, layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)
    left = list(axes[:, 0])
    if sides:
        _sound(left.pop(0), sides, start, end)
    _words(left.pop(0), recording.words, start, end)
    for name, _, pcm in sides:
        _spectrogram(left.pop(0), name, pcm, recording.sample_rate, start, end)
    _codes(left[0], recording)
    left[0].set_xlim(start, end)
    left[0].set_xlabel("seconds")
    return figure


def _part(pcm: Pcm, rate: int, start: float, end: float) -> Pcm:
    """The samples from `start` to `end`, finite, with silence after the last one."""
    first, last = round(start * rate), round(end * rate)
    found = np.nan_to_num(pcm[first:last], posinf=1.0, neginf=-1.0)
    return np.concatenate([found, np.zeros(max(last - first, 1) - len(found), np.float32)])


def _label(ax: Axes, text: str) -> None:
    ax.set_ylabel(text, rotation=0, ha="right", va="center")


def _colour_scale(ax: Axes, image: Any, label: str) -> None:
    # Beside the axes, not taken from them: all have to have the same width.
    ax.figure.colorbar(image, cax=ax.inset_axes((1.01, 0.0, 0.012, 1.0)), label=label)


def _sound(ax: Axes, sides: list[tuple[str, str, Pcm]], start: float, end: float) -> None:
    """Both waveforms, one above the other and on one scale, lowest to highest samples."""
    peak = max(0.01, *(float(np.abs(pcm).max()) for _, _, pcm in sides))
    for row, (_, colour, pcm) in enumerate(sides):
        columns = np.array_split(pcm, min(len(pcm), _COLUMNS))
        edges = np.linspace(start, end, len(columns) + 1)
        low = np.array([column.min() for column in columns]) / peak
        high = np.array([column.max() for column in columns]) / peak
        # A line as thin as silence is drawn too.
        ax.fill_between(
            0.5 * (edges[1:] + edges[:-1]), low - 2.2 * row, high - 2.2 * row,
            color=colour, linewidth=0.6,
        )  # fmt: skip
    ax.set_ylim(-2.2 * len(sides) + 1.1, 1.1)
    ax.set_yticks([-2.2 * row for row in range(len(sides))], [name for name, _, _ in sides])
    for tick, (_, colour, _) in zip(ax.get_yticklabels(), sides, strict=True):
        tick.set_color(colour)
    ax.tick_params(axis="y", length=0)
    _label(ax, "sound")


def _words(ax: Axes, words: list[Word], start: float, end: float) -> None:
    """Each word from its start, on as many lines as it takes for none to cover another."""
    width = (end - start) / (0.85 * _WIDTH_INCHES) * _LETTER_INCHES  # seconds that a letter takes
    words = [word for word in words if word.end > start and word.start < end]
    spans = [(word.start, word.end - word.start) for word in words]
    ax.broken_barh(spans, (0, 1), color=MODEL_COLOUR, alpha=0.18, linewidth=0)
    free = [start] * _LANES
    for word in words:
        lane = next((lane for lane, until in enumerate(free) if until <= word.start), None)
        if lane is None:
            continue
        text = shortened(word.text, _WORD_LETTERS)
        ax.plot([word.start] * 2, [lane / _LANES, (lane + 1) / _LANES], color=MODEL_COLOUR)
        ax.text(
            word.start + 0.3 * width, (lane + 0.5) / _LANES, text,
            va="center", clip_on=True, parse_math=False,
        )  # fmt: skip
        free[lane] = word.start + width * (len(text) + 1)
    ax.set_ylim(1, 0)
    ax.set_yticks([])
    _label(ax, "words")


def _spectrogram(ax: Axes, name: str, pcm: Pcm, rate: int, start: float, end: float) -> None:
    """Levels over time and frequency; 0 dB is a sine at full scale."""
    padded = np.pad(pcm, _WINDOW // 2)
    starts = np.linspace(0, len(pcm) - 1, min(_COLUMNS, len(pcm) // 64 + 1)).astype(int)
    window = np.hanning(_WINDOW).astype(np.float32)
    pieces = padded[starts[:, None] + np.arange(_WINDOW)] * window
    power = np.abs(np.fft.rfft(pieces, axis=1)) / (window.sum() / 2)
    bins = min(int(_TOP_KHZ * 1000 * _WINDOW / rate), _WINDOW // 2)
    level = 20.0 * np.log10(np.maximum(power[:, :bins], 1e-6)).T
    image = ax.imshow(
        level, aspect="auto", origin="lower", cmap="magma", vmin=_FLOOR_DB, vmax=_TOP_DB,
        extent=(start, end, 0.0, bins * rate / _WINDOW / 1000), interpolation="bilinear",
    )  # fmt: skip
    _colour_scale(ax, image, "dB")
    ax.text(0.008, 0.88, name, transform=ax.transAxes, color="white", va="top", weight="bold")
    _label(ax, "kHz")


def _codes(ax: Axes, recording: Recording) -> None:
    """The numbers that the model hears and says: a column for each frame, a row for each codebook.

    The last columns of the model are those of the last frames: it begins max_delay frames late.
    """
    frames, below = recording.user_codes.shape[1], 0.0
    highest = max([1, *(int(c.max()) for c in (recording.user_codes, recording.codes) if c.size)])
    ticks: list[float] = []
    names: list[str] = []
    image: Any = None
    for name, codes in (("you", recording.user_codes), ("model", recording.codes)):
        rows, columns = codes.shape
        if not codes.size:
            continue
        begin = (frames - columns) / recording.frame_rate
        image = ax.imshow(
            codes, aspect="auto", cmap="viridis", vmin=0, vmax=highest, interpolation="nearest",
            extent=(begin, frames / recording.frame_rate, below + rows, below),
        )  # fmt: skip
        ticks += [below + 0.5, below + rows / 2, below + rows - 0.5]
        names += ["1", name, str(rows)]
        below += rows + 0.6
    if image is not None:
        _colour_scale(ax, image, "code")
        ax.set_ylim(below - 0.6, 0)
    ax.set_yticks(ticks, names)
    ax.tick_params(axis="y", length=0)
    _label(ax, "codes")
