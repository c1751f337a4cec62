"""Compares two results of the same benchmark and names what moved.

    python benchmarks/history.py OLD.json NEW.json

A time moved when it differs by more than its spread in either result (from the median to 99 of 100
calls), and by more than 3 %; so did a ratio between two sides of an interleaved comparison, whose
spread is that of its blocks. Exit code 0: nothing got slower; 1: something did; 2: the two can't be
compared.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LEAST = 0.03  # of a time; what is less is never called a change


def timings(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, float, float]]:
    """Name, median and relative spread of every time and every ratio.

    Ratios are other times over ours, so that a larger one is better: they go in inverted."""
    if not isinstance(value, dict):
        return
    name = ".".join(path)
    if {"median", "least", "greatest"} <= value.keys() and value["median"] > 0:
        spread = max(value["greatest"] - value["median"], value["median"] - value["least"])
        yield f"{name} (inverted)", 1 / value["median"], spread / value["median"]
    for median, high in (("p50_ms", "p99_ms"), ("p50", "p99")):
        if value.get(median, 0) > 0:
            yield name, value[median], (value[high] - value[median]) / value[median]
    for key, inner in value.items():
        yield from timings(inner, (*path, key))


def moved(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, float, bool]]:
    """Name, new over old, and whether that is beyond the spread of both."""
    before = {name: (median, spread) for name, median, spread in timings(old)}
    found = []
    for name, median, spread in timings(new):
        if name in before:
            ratio = median / before[name][0]
            found.append((name, ratio, abs(ratio - 1) > max(LEAST, spread, before[name][1])))
    return found


def read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} could not be read: {error}") from None
    if not isinstance(result, dict) or "benchmark" not in result:
        raise SystemExit(f"{path} is not the result of a benchmark")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args()
    try:
        old, new = read(options.old), read(options.new)
        if old["benchmark"] != new["benchmark"]:
            raise SystemExit(f"one is of {old['benchmark']}, the other of {new['benchmark']}")
        rows = moved(old, new)
        if not rows:
            raise SystemExit("the two have no time in common")
    except SystemExit as error:
        print(error)
        return 2
    if old.get("machine") != new.get("machine"):
        print("the machines differ: only ratios between two sides tell something")
    slower = 0
    for name, ratio, beyond in rows:
        word = "" if not beyond else "SLOWER" if ratio > 1 else "faster"
        slower += word == "SLOWER"
        print(f"{ratio:6.3f}  {word:<7} {name}")
    print(f"{slower} of {len(rows)} slower beyond their spread")
    return 1 if slower else 0


if __name__ == "__main__":
    raise SystemExit(main())
