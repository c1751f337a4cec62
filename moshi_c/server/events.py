"""Messages that are JSON in text, and sound in them as base64."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from aiohttp import WSMessage, WSMsgType

from .call import Ignored

#: Brackets and commas of an event. Sound has none; a message full of them would take a second and
#: a hundred times its size to read.
_MOST_MARKS = 20_000


def read_event(message: WSMessage, key: str) -> tuple[str, dict[str, Any]]:
    """An event, and what it is by the `key` of its kind.

    Raises:
        Ignored: it is none.
    """
    if message.type != WSMsgType.TEXT:
        raise Ignored("messages are text here")
    if sum(map(message.data.count, "[{,")) > _MOST_MARKS:
        raise Ignored(f"an event has more than {_MOST_MARKS} brackets and commas")
    try:
        event = json.loads(message.data)
        kind = event[key]
    except (ValueError, TypeError, KeyError, RecursionError):
        kind = None
    if not isinstance(kind, str):
        raise Ignored(f'messages are JSON objects with a "{key}"')
    return kind, event


def read_sound(text: Any) -> bytes:
    """The bytes of base64.

    Raises:
        Ignored: it is none.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise Ignored("the sound is no base64") from None


def shown(value: Any) -> str:
    """A value of an event, for a sentence: not all of a long one."""
    if isinstance(value, str):
        return repr(value[:40])
    if isinstance(value, (int, float, type(None))):
        return str(value)[:40]
    return f"a {type(value).__name__}"


def part(of: Any, name: str) -> dict[str, Any]:
    """What an event has under a name, if that is an object, else an empty one."""
    found = of.get(name) if isinstance(of, dict) else None
    return found if isinstance(found, dict) else {}


def write_sound(data: bytes) -> str:
    """Bytes as base64."""
    return base64.b64encode(data).decode()
