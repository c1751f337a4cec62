"""A progress bar on stderr, counted in seconds of sound."""

from __future__ import annotations

from typing import Any


class Bar:
    """Shows how much of `seconds` is done, when `shown`. A context manager."""

    def __init__(self, shown: bool, seconds: float) -> None:
        self._bar: Any = None
        if shown:
            from tqdm import tqdm

            layout = "{percentage:3.0f}%|{bar}| {n:.1f} of {total:.1f} s [{elapsed}<{remaining}]"
            self._bar = tqdm(total=seconds, bar_format=layout)

    def update(self, seconds: float) -> None:
        """That much more is done."""
        if self._bar is not None:
            # Sums of fractions may end a little above the whole, which tqdm warns of.
            self._bar.update(min(seconds, self._bar.total - self._bar.n))

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()
