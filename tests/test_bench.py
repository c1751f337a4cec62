"""`moshi-c bench`: what it says of the machine and of a model. No time is judged here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import test_open_large

import moshi_c
from moshi_c import _core, bench, hub
from moshi_c.cli import main

LIMITS = bench.Limits({1: 10.0, 2: 20.0}, {1: 50.0, 2: 80.0})


def test_the_command_reports_stages_sessions_and_a_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SESSIONS", (1, 2))
    out = tmp_path / "bench.json"
    assert main(["bench", "--threads", "1", "--frames", "3", "--json", str(out)]) == 0
    told = capsys.readouterr().out
    report = json.loads(out.read_text())
    for stage in ("encode", "temporal", "depth", "decode"):
        entry = report["stages"][stage]
        assert entry["bytes"] > 0 and 0 < entry["p50"] <= entry["p99"] <= entry["max"]
        assert entry["gb_s"] > 0 and entry["share_of_floor"] > 0
        assert stage in told
    assert report["frame"]["p50"] > report["stages"]["temporal"]["p50"]
    assert report["limits"]["read_gb_s"]["1"] > 0 and report["limits"]["gflop_s"]["1"] > 0
    assert "1" in report["sessions"]
    assert told.splitlines()[-1] == report["verdict"]
    assert "moshi-tiny in bf16" in report["verdict"]


def test_what_is_wrong_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--json", str(tmp_path / "no" / "bench.json")]) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert main(["bench", str(tmp_path)]) == 1
    assert "the folder has" in capsys.readouterr().err


def test_limits_are_asked_for_with_sense() -> None:
    for threads, seconds in ((-1, 0.0), (5000, 0.0), (1, -1.0), (1, float("nan"))):
        with pytest.raises(ValueError, match="expected 1 to 1024 for 0 to 60 s"):
            _core.measure(threads, seconds)


def test_the_estimate_counts_the_7b_as_it_is_published() -> None:
    """By names and shapes of the published file: what is no table or norm is read in each frame."""
    shapes = test_open_large.published_tensors()
    read = [name for name in shapes if "emb" not in name and "norm" not in name]
    total = 0
    for name in read:
        rows, columns = shapes[name]
        total += rows * columns
    weights, remembered = bench.language_weights(hub.BUILT_IN_CONFIG)
    assert weights == total
    assert remembered == 2 * 32 * 4096 * 3000


@pytest.mark.slow
def test_the_estimate_counts_the_codec_as_the_core_does(mimi_full: Path) -> None:
    with moshi_c.load_mimi(mimi_full / "mimi.safetensors") as mimi:
        info = mimi._info
    sides = ("encode", "decode")
    found = tuple((info[f"{side}_bytes"], info[f"{side}_flops"]) for side in sides)
    assert found == bench.MIMI_COST


@pytest.mark.parametrize("dtype", ["bf16", "q8", "q4"])
def test_bytes_of_a_frame_are_those_of_the_matrices(dtype: Any) -> None:
    with moshi_c.load(dtype=dtype) as model:
        config, info = model.config, model._info
    weights, _ = bench.language_weights(config)
    read = info["temporal_bytes"] + info["depth_bytes"]
    # panels are padded to whole tiles
    assert weights * bench.BITS[dtype] / 8 <= read <= 1.25 * weights * bench.BITS[dtype] / 8


def report(p99: dict[int, float], estimates: dict[str, float]) -> dict[str, Any]:
    return {
        "model": {"source": "x", "dtype": "q4"},
        "frame_budget_ms": 80.0,
        "sessions": {str(n): {"p50": t, "p99": t, "max": t} for n, t in p99.items()},
        "estimates": {"moshi_7b_ms": estimates},
    }


@pytest.mark.parametrize(
    ("p99", "estimates", "words"),
    [
        ({1: 10.0, 2: 30.0, 4: 90.0}, {"q4": 50.0, "q8": 90.0}, ["holds", "2 at once", "in q4 ("]),
        ({1: 10.0, 2: 81.0}, {"q4": 81.0}, ["holds a conversation with x in q4", "could not be"]),
        ({1: 81.0}, {"q4": 81.0}, ["does not hold a conversation", "81.0 ms of 80 ms"]),
    ],
)
def test_the_verdict_says_whether_a_frame_fits(
    p99: dict[int, float], estimates: dict[str, float], words: list[str]
) -> None:
    said = bench.verdict(report(p99, estimates))
    for word in words:
        assert word in said


def test_floors_take_the_slower_of_reading_and_multiplying() -> None:
    assert LIMITS.least(2e9, 0) == 0.1
    assert LIMITS.least(2e9, 16e9) == 0.2
