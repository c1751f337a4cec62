"""What a snapshot keeps beside the core's state: values by name, as JSON."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np

from .audio import Pcm, ResamplerState
from .errors import CheckpointError

_LARGEST = 2**53


class Note:
    """Values by name. What is read comes from strangers: every getter checks what it finds and
    raises CheckpointError."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def encode(self) -> bytes:
        """For `decode`."""
        return json.dumps(self._values).encode()

    @classmethod
    def decode(cls, data: bytes) -> Note:
        """The note of these bytes."""
        note = cls()
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise note.damaged("it is no JSON") from error
        if not isinstance(values, dict):
            raise note.damaged(f"it is a {type(values).__name__}; expected names and values")
        note._values = values
        return note

    @staticmethod
    def damaged(what: str) -> CheckpointError:
        """The exception for a note that cannot be used."""
        return CheckpointError(f"snapshot: the field note is damaged: {what}")

    def _get(self, name: str) -> Any:
        if name not in self._values:
            raise self.damaged(f"{name} is missing")
        return self._values[name]

    def _wrong(self, name: str, expected: str) -> CheckpointError:
        return self.damaged(f"{name} is {str(self._values[name])[:40]!r}; expected {expected}")

    def put_number(self, name: str, value: int) -> None:
        """A whole number, 0 or more."""
        self._values[name] = value

    def number(self, name: str) -> int:
        """Of put_number."""
        value = self._get(name)
        if not _is_count(value):
            raise self._wrong(name, "a whole number, 0 or more")
        return int(value)

    def put_numbers(self, name: str, values: list[int]) -> None:
        """Whole numbers, 0 or more."""
        self._values[name] = values

    def numbers(self, name: str) -> list[int]:
        """Of put_numbers."""
        values = self._get(name)
        if not isinstance(values, list) or not all(map(_is_count, values)):
            raise self._wrong(name, "a list of whole numbers, 0 or more")
        return values

    def put_floats(self, name: str, values: list[float]) -> None:
        """Finite numbers."""
        self._values[name] = values

    def floats(self, name: str) -> list[float]:
        """Of put_floats."""
        values = self._get(name)
        if not isinstance(values, list) or not all(map(_is_finite, values)):
            raise self._wrong(name, "a list of finite numbers")
        return [float(value) for value in values]

    def put_flag(self, name: str, value: bool) -> None:
        """True or False."""
        self._values[name] = value

    def flag(self, name: str) -> bool:
        """Of put_flag."""
        value = self._get(name)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def put_bytes(self, name: str, value: bytes) -> None:
        """Any bytes."""
        self._values[name] = base64.b64encode(value).decode()

    def bytes(self, name: str) -> bytes:
        """Of put_bytes."""
        value = self._get(name)
        try:
            return base64.b64decode(value, validate=True)
        except (ValueError, TypeError) as error:
            raise self._wrong(name, "bytes in base 64") from error

    def put_array(self, name: str, value: Pcm) -> None:
        """float32[n]."""
        self.put_bytes(name, np.asarray(value, "<f4").tobytes())

    def array(self, name: str, largest: float) -> Pcm:
        """Of put_array; no sample may be larger than `largest`."""
        data = self.bytes(name)
        if len(data) % 4:
            raise self._wrong(name, "whole float32 samples")
        values = np.frombuffer(data, "<f4").astype(np.float32)
        if not (np.abs(values) <= largest).all():
            raise self._wrong(name, f"samples within ±{largest:g}")
        return values

    def put_resampler(self, name: str, state: ResamplerState) -> None:
        """Where a resampler is."""
        self.put_number(f"{name}.first", state.first)
        self.put_array(f"{name}.history", state.history)
        self.put_number(f"{name}.given", state.given)

    def resampler(self, name: str, largest: float) -> ResamplerState:
        """Of put_resampler; no sample of its history may be larger than `largest`."""
        return ResamplerState(
            self.number(f"{name}.first"),
            self.array(f"{name}.history", largest),
            self.number(f"{name}.given"),
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _is_finite(value: object) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < _LARGEST
    return isinstance(value, float) and math.isfinite(value)
