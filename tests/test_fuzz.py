"""The readers of files on damaged files: the part that is quick. `make fuzz` goes on for longer."""

from __future__ import annotations

import filecmp
import subprocess
import sys
from pathlib import Path

import pytest

import moshi_c

FUZZ = Path(__file__).resolve().parent / "fuzz"


def test_a_damaged_file_gives_a_result_or_a_sentence(tmp_path: Path) -> None:
    script = [sys.executable, str(FUZZ / "fuzz_python.py"), "--found", str(tmp_path)]
    done = subprocess.run([*script, "--inputs", "300"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parity
def test_the_committed_seeds_are_those_the_script_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(FUZZ / "make_corpus.py"), str(tmp_path)], check=True)
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("seed-*")}
    kept = {path.relative_to(FUZZ) for path in FUZZ.rglob("seed-*")}
    assert made == kept
    # What an encoder of sound writes changes with its version, snapshots within rounding.
    compared = [
        path for path in made if not {"audio", "ogg_opus", "snapshot", "note"} & set(path.parts)
    ]
    assert len(compared) > 50
    same = {path: filecmp.cmp(tmp_path / path, FUZZ / path, shallow=False) for path in compared}
    assert [path for path, equal in same.items() if not equal] == []


def test_the_seeds_of_snapshots_can_be_restored() -> None:
    seeds = [
        path for path in (FUZZ / "corpus" / "snapshot").glob("seed-*") if "stream" not in path.name
    ]
    assert len(seeds) >= 4
    with moshi_c.load(FUZZ / "model") as model:
        for seed in seeds:
            moshi_c.Session.from_snapshot(model, seed.read_bytes()).close()
