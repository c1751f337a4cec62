"""A progress bar on stderr, counted in seconds of sound, or in another unit."""

from __future__ import annotations

from typing import Any


class Bar:
    """Shows how much of `total` is done, when `shown`. A context manager."""

    def __init__(self, shown: bool, total: float, unit: str = "s") -> None:
        self._bar: Any = None
        if shown:
            from tqdm import tqdm

            done = "{percentage:3.0f}%|{bar}| {n:.1f} of {total:.1f} "
            self._bar = tqdm(total=total, bar_format=done + unit + " [{elapsed}<{remaining}]")

    def update(self, done: float) -> None:
        """That much more is done."""
        if self._bar is not None:
            # Sums of fractions may end a little above the whole, which tqdm warns of.
            self._bar.update(min(done, self._bar.total - self._bar.n))

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()
