"""Recordings: what a model said over a whole input, with its words in time."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .audio import Pcm, write_audio
from .errors import AudioError

#: Longer recordings are not put into a notebook page.
_PLAYER_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Word:
    """One word of the model, with its times in seconds of the output.

    start: of the frame of its first piece. end: of the frame where the next word, or the silence
    before it (EPAD), begins; for a last word, the end of its last piece.
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
    """

    pcm: Pcm | None
    text: str
    words: list[Word]
    codes: NDArray[np.int32]
    user_codes: NDArray[np.int32]
    sample_rate: int
    frame_rate: float

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

    def _repr_html_(self) -> str:
        """A player and the words with their times, for notebooks."""
        parts = ["<div>"]
        if self.pcm is not None and self.duration <= _PLAYER_SECONDS:
            sound = base64.b64encode(_wav(self.pcm, self.sample_rate)).decode("ascii")
            parts.append(f'<audio controls src="data:audio/wav;base64,{sound}"></audio>')
        elif self.pcm is not None:
            parts.append(f"<p>{self.duration:.0f} s of sound: use save() to listen</p>")
        spans = (
            f'<span title="{word.start:.2f} to {word.end:.2f} s">{html.escape(word.text)}</span>'
            for word in self.words
        )
        parts.append(f"<p>{' '.join(spans)}</p></div>")
        return "".join(parts)

    def __repr__(self) -> str:
        return f"<Recording {self.duration:.2f} s: {self.text.strip()!r}>"


def _wav(pcm: Pcm, rate: int) -> bytes:
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, pcm, rate, format="WAV", subtype="PCM_16")
    return out.getvalue()


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
