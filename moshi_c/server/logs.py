"""The command's log: lines on stderr, written by a thread of their own.

Who reads stderr may be slow, and a disk may be full; no call waits for either. What does not fit
is lost.
"""

from __future__ import annotations

import logging
import logging.handlers
import queue
import select
from collections.abc import Iterator
from contextlib import contextmanager

_MOST_LINES = 1000


class _Hand(logging.handlers.QueueHandler):
    """Hands lines over without waiting."""

    def handleError(self, record: logging.LogRecord) -> None:
        """A full queue."""


class _Stream(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes them, as long as somebody reads: who does not must not keep the process alive."""

    def emit(self, record: logging.LogRecord) -> None:
        """A line fits where select says so."""
        try:
            fits = bool(select.select([], [self.stream], [], 0)[1])
        except (OSError, ValueError, TypeError):
            fits = True
        if fits:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk, or a reader who has gone."""


@contextmanager
def logging_to_stderr() -> Iterator[None]:
    """Shows the server's log while it lasts."""
    lines: queue.Queue[logging.LogRecord] = queue.Queue(_MOST_LINES)
    hand, stream = _Hand(lines), _Stream()
    stream.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    listener = logging.handlers.QueueListener(lines, stream)
    logger = logging.getLogger("moshi_c.server")
    before = logger.level
    logger.addHandler(hand)
    logger.setLevel(logging.INFO)
    listener.start()
    try:
        yield
    finally:
        logger.removeHandler(hand)
        logger.setLevel(before)
        listener.stop()
