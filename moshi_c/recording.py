"""Recordings: what a model said over a whole input, with its words in time."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import timeline
from .audio import Pcm, write_audio
from .display import recording_html, shortened
from .errors import AudioError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Letters of the text that repr shows.
_REPR_LETTERS = 60


@dataclass(frozen=True, slots=True)
class Word:
    """One word of the model, with its times in seconds of the output.

    text: without the space in front of it.
    start: of the frame of its first piece.
    end: of the frame where the next word, or the silence before it (EPAD), begins; for a last word,
        the end of its last piece.
    """

    text: str
    start: float
    end: float


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """What a session said while it listened to a whole input.

    pcm: float32[N], the model's voice; a whole number of frames, silent until the first output.
        None for families without a voice.
    text: everything it said, as the frames' texts joined.
    words: the same in words, with times in seconds from the start of `pcm`.
    codes: int32[K, T], one column for each frame with output: the first `max_delay` frames of a
        conversation have none.
    user_codes: int32[K, T], one column for each frame.
    sample_rate: of `pcm`, in Hz.
    frame_rate: frames a second.
    user_pcm: float32[N], what the model heard, at the rate and with the length of a voice; None
        when it was not kept.
    """

    pcm: Pcm | None
    text: str
    words: list[Word]
    codes: NDArray[np.int32]
    user_codes: NDArray[np.int32]
    sample_rate: int
    frame_rate: float
    user_pcm: Pcm | None = None

    @property
    def duration(self) -> float:
        """Seconds."""
        return int(self.user_codes.shape[1]) / self.frame_rate

    def to_dict(self) -> dict[str, Any]:
        """Text and words, ready for JSON."""
        return {
            "duration": round(self.duration, 3),
            "text": self.text.strip(),
            "words": [
                {"text": word.text, "start": round(word.start, 3), "end": round(word.end, 3)}
                for word in self.words
            ],
        }

    def save(self, path: str | os.PathLike[str], *, words: bool = False) -> Path:
        """Writes the voice, or for a `.json` path text and words.

        Args:
            path: .wav, .flac, .ogg, .opus, .mp3 or .aiff: the voice; .json: text and words.
            words: write text and words too, beside the voice with the suffix .json.

        Returns:
            The path.

        Raises:
            AudioError: the suffix or folder is not usable, or the model has no voice.
        """
        path = Path(path)
        if path.suffix.lower() == ".json":
            return self._save_words(path)
        if self.pcm is None:
            raise AudioError(f"{path} was not written: this model has no voice; save to .json")
        write_audio(path, self.pcm, self.sample_rate)
        if words:
            self._save_words(path.with_suffix(".json"))
        return path

    def _save_words(self, path: Path) -> Path:
        text = json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n"
        try:
            path.write_text(text, "utf-8")
        except OSError as error:
            raise AudioError(f"{path} cannot be written: {error.strerror or error}") from error
        return path

    def plot(self, *, start: float = 0.0, end: float | None = None) -> Figure:
        """Draws the conversation over one time axis: the sound of both sides, the model's words,
        spectrograms, and the codes. `plot().savefig("picture.png")` makes a file of it.

        Args:
            start, end: the part to draw, in seconds; None for the end of the recording.

        Returns:
            A matplotlib figure, which notebooks show.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: an empty part, or one that begins outside the recording.
        """
        try:
            from .plot import draw
        except ImportError as error:
            raise ImportError(
                "Recording.plot needs matplotlib, which could not be imported "
                f"({error}); install it with: pip install 'moshi_c[plot]'"
            ) from error
        return draw(self, start, self.duration if end is None else end)

    def timeline(self, columns: int = 100) -> str:
        """Both sides in time, for a terminal: levels as bars, a column for each frame, and the
        model's words where they begin; wrapped at `columns` letters (at least 20)."""
        return timeline.draw(self, columns)

    def _repr_html_(self) -> str:
        """For notebooks: a player, both sides in time, and the words."""
        return recording_html(self)

    def __repr__(self) -> str:
        count = f"{len(self.words)} word{'s' * (len(self.words) != 1)}"
        text = shortened(self.text.strip(), _REPR_LETTERS)
        return f"<Recording {self.duration:.2f} s, {count}: {text!r}>"


_RUNS = re.compile(r"\s+|\S+")


def assemble_words(
    texts: Sequence[str], tokens: Sequence[int], end_padding_id: int, frame_rate: float
) -> list[Word]:
    """Words of consecutive frames, from what each printed and its token.

    A space or EPAD ends a word; see Word for the times, which count from the first frame.
    """
    words: list[Word] = []
    current, start, last = "", 0, 0

    def close(frame: int) -> None:
        nonlocal current
        if current:
            words.append(Word(current, start / frame_rate, max(frame, last + 1) / frame_rate))
        current = ""

    for frame, (text, token) in enumerate(zip(texts, tokens, strict=True)):
        if token == end_padding_id:
            close(frame)
        for run in _RUNS.findall(text):
            if run.isspace():
                close(frame)
                continue
            if not current:
                start = frame
            current += run
            last = frame
    close(last + 1)
    return words


def stack_codes(columns: Iterable[NDArray[np.int32] | None], rows: int) -> NDArray[np.int32]:
    """int32[K, T] of codes int32[K]; None is left out."""
    kept = [column for column in columns if column is not None]
    return np.stack(kept, axis=1) if kept else np.zeros((rows, 0), np.int32)
