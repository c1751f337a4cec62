"""Text tokens to text and back, over SentencePiece.

A token is printed when it carries text: padding, end of padding, begin and end of sentence print
nothing, nor does -1, the token of a frame before the first output. Other ids outside the vocabulary
print U+FFFD. "▁" is a space. Characters that the vocabulary lacks come as
byte pieces, one byte a token; they are held back until they make whole characters.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterable
from pathlib import Path

from .errors import CheckpointError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"
_REPLACEMENT = "\ufffd"

#: A hundred times the published ones.
_MAX_BYTES = 64 << 20


def _reason(error: Exception) -> str:
    """What SentencePiece says, without the places in its sources and the file's odd letters."""
    if isinstance(error, UnicodeDecodeError):
        return "a piece is not UTF-8"
    text = str(error).removeprefix("INTERNAL: ").strip().rstrip(".")
    if ".cc(" in text or not text:
        return "it could not be parsed"
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text[:200])


class Tokenizer:
    """A SentencePiece model, read from a `.model` file. May be shared by threads."""

    def __init__(
        self, path: str | os.PathLike[str], *, padding_id: int = 3, end_padding_id: int = 0
    ) -> None:
        """Reads `path`.

        Args:
            path: the `.model` file.
            padding_id, end_padding_id: the model's PAD and EPAD, which print nothing.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        import sentencepiece

        self.path = Path(path)
        self.padding_id = padding_id
        self.end_padding_id = end_padding_id
        try:
            size = self.path.stat().st_size
            if size > _MAX_BYTES:
                raise CheckpointError(
                    f"the tokenizer {self.path} has {size} bytes; expected at most {_MAX_BYTES}"
                )
            data = self.path.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"the tokenizer {self.path} could not be read: {error.strerror or error}"
            ) from error
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            if not data:
                raise ValueError("it is empty")
            self._model.LoadFromSerializedProto(data)
            self._size = int(self._model.vocab_size())
            if self._size <= 0:
                raise ValueError("it has no pieces")
            self._pieces = [self._piece(i) for i in range(self._size)]
        except Exception as error:
            raise CheckpointError(
                f"the tokenizer {self.path} is damaged ({_reason(error)}); expected a whole "
                "SentencePiece model"
            ) from error

    def _piece(self, token: int) -> str | bytes:
        """What a token prints, for good: text, or one byte of it."""
        if token in (self.padding_id, self.end_padding_id):
            return ""
        model = self._model
        if model.is_control(token) or model.is_unknown(token) or model.is_unused(token):
            return ""
        piece: str = model.id_to_piece(token)
        if byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        if model.is_byte(token):
            return _REPLACEMENT
        return piece.replace(_SPACE, " ")

    @property
    def vocab_size(self) -> int:
        """Pieces in the vocabulary."""
        return self._size

    def piece(self, token: int) -> str | bytes:
        """What one token prints: text, one byte of a character, or ""."""
        if 0 <= token < self._size:
            return self._pieces[token]
        return "" if token == -1 else _REPLACEMENT

    def encode(self, text: str) -> list[int]:
        """Tokens of the text, without begin or end of sentence."""
        clean = text.encode("utf-8", "replace").decode("utf-8")
        return [int(token) for token in self._model.encode(clean)]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the tokens, as a Detokenizer gives it."""
        stream = self.detokenizer()
        return "".join([stream.push(token) for token in tokens]) + stream.flush()

    def detokenizer(self) -> Detokenizer:
        """A new stream from tokens to text."""
        return Detokenizer(self)

    def __repr__(self) -> str:
        return f"Tokenizer({str(self.path)!r}, {self._size} pieces)"


class Detokenizer:
    """Text as the tokens come, never half a character. Broken bytes become U+FFFD."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """What can be printed after this token, maybe nothing."""
        piece = self._tokenizer.piece(token)
        if isinstance(piece, bytes):
            return self._bytes.decode(piece)
        return self.flush() + piece if piece else ""

    def flush(self) -> str:
        """What is held back, broken as it is."""
        text = self._bytes.decode(b"", final=True)
        self._bytes.reset()
        return text

    def reset(self) -> None:
        """Forgets what is held back."""
        self._bytes.reset()

    @property
    def pending(self) -> bytes:
        """What is held back: the first bytes of a character, at most three."""
        return self._bytes.getstate()[0]

    @pending.setter
    def pending(self, value: bytes) -> None:
        self._bytes.reset()
        self._bytes.decode(value[:3])
