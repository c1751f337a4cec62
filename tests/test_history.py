"""benchmarks/history.py: what moved between two results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.python

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "history.py"


def result(p50: float, p99: float, ratio: float = 2.0, name: str = "step") -> dict[str, Any]:
    times = {"p50_ms": p50, "p99_ms": p99, "max_ms": p99, "calls": 9}
    ratios = {"median": ratio, "least": 0.95 * ratio, "greatest": 1.05 * ratio}
    return {"benchmark": name, "ours": times, "peer_over_ours": ratios}


def history(tmp_path: Path, old: Any, new: Any) -> tuple[int, str]:
    for name, value in (("old", old), ("new", new)):
        (tmp_path / name).write_text(json.dumps(value))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "old", "new"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_what_moved_beyond_its_spread_is_named(tmp_path: Path) -> None:
    code, told = history(tmp_path, result(10, 11), result(12, 13))
    assert code == 1
    assert "1.200  SLOWER  ours\n" in told and "1 of 2 slower" in told


def test_within_the_spread_nothing_moved(tmp_path: Path) -> None:
    code, told = history(tmp_path, result(10, 12), result(11, 12))
    assert code == 0
    assert "SLOWER" not in told and "faster" not in told


def test_faster_is_told_and_no_failure(tmp_path: Path) -> None:
    code, told = history(tmp_path, result(10, 10.1), result(8, 8.1))
    assert code == 0
    assert "0.800  faster  ours\n" in told


def test_a_ratio_that_shrinks_is_slower(tmp_path: Path) -> None:
    code, told = history(tmp_path, result(10, 10.1, 2.0), result(10, 10.1, 1.6))
    assert code == 1
    assert "1.250  SLOWER  peer_over_ours (inverted)" in told


def test_what_cannot_be_compared_is_code_2(tmp_path: Path) -> None:
    assert history(tmp_path, result(1, 1), result(1, 1, name="mimi")) == (
        2,
        "one is of step, the other of mimi\n",
    )
    assert history(tmp_path, [], result(1, 1))[0] == 2
    assert history(tmp_path, {"benchmark": "x"}, {"benchmark": "x"})[0] == 2
