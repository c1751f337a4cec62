"""The pace of forced words: text tokens one a frame, spaced as the models learnt them from speech.

Each word is announced by EPAD in the frame before it, its pieces follow on consecutive frames, and
PAD fills the time that the word takes to say. Marks at its end make a pause.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from .errors import CheckpointError
from .tokenizer import Tokenizer

#: Seconds that a letter takes; a digit is read as a word.
_LETTER = 0.07
_LETTERS_OF_A_DIGIT = 4

#: Characters of a word in a sentence about it.
_SHOWN = 40

_CLOSING = "\"')]}»”’"

#: Frames of silence after a word that ends in one of these.
_PAUSES = {",": 2, ";": 3, ":": 3, ".": 5, "!": 5, "?": 5, "…": 5}


def _in_vocabulary(word: str, spelled: Callable[[str], bool]) -> str:
    """The word, in small letters if the vocabulary has no others."""

    def lost(text: str) -> str:
        return next((c for c in text if c.isalnum() and not spelled(c)), "")

    if not lost(word):
        return word
    if missing := lost(word.lower()):
        shown = word if len(word) <= _SHOWN else f"{word[:_SHOWN]}..."
        raise ValueError(
            f"say cannot put {shown!r} into tokens: this model's vocabulary has no {missing!r}; "
            "expected words that it can spell"
        )
    return word.lower()


def spoken_tokens(tokenizer: Tokenizer | None, text: str, frame_rate: float) -> list[int]:
    """Tokens of the text for the model that this is the tokenizer of, one a frame.

    A word takes 0.07 s a letter, and at least two frames more than it has pieces. Marks that the
    vocabulary lacks are left out.

    Raises:
        CheckpointError: there is no tokenizer.
        ValueError: a letter or digit that the vocabulary lacks.
    """
    if tokenizer is None:
        raise CheckpointError(
            "say needs a tokenizer, and the model was loaded without one; "
            "give one with load(..., tokenizer=...)"
        )
    pad, end_pad = tokenizer.padding_id, tokenizer.end_padding_id
    tokens: list[int] = []

    @functools.cache
    def spelled(letter: str) -> bool:
        return any(tokenizer.piece(token).strip() for token in tokenizer.encode(letter))

    for given in text.split():
        word = _in_vocabulary(given, spelled)
        pieces = [piece for piece in tokenizer.encode(word) if piece not in (pad, end_pad)]
        if not tokenizer.decode(pieces).strip():
            continue  # nothing of it is in the vocabulary
        letters = sum(_LETTERS_OF_A_DIGIT if char.isdigit() else char.isalpha() for char in word)
        frames = max(len(pieces) + 2, math.ceil(letters * _LETTER * frame_rate))
        frames += _PAUSES.get(word.rstrip(_CLOSING)[-1:], 0)
        tokens += [end_pad, *pieces]
        tokens += [pad] * (frames - 1 - len(pieces))
    return tokens
