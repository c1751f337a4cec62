"""Two sessions that talk: each hears the other, questions wait for silence, the file is stereo."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sound
import soundfile

import moshi_c
from moshi_c.cli import main
from moshi_c.duet import PAUSE_FRAMES, duet

pytestmark = pytest.mark.python


@pytest.fixture(scope="module")
def model() -> moshi_c.Model:
    return moshi_c.load()


def asked(text: str) -> sound.Sound:
    return np.float32(0.5) * sound.speech(text, "en-us+m3", 150)


def test_each_hears_what_the_other_said_a_frame_ago(model: moshi_c.Model) -> None:
    question = asked("my dog is black")
    with moshi_c.Session(model, seed=7) as left, moshi_c.Session(model, seed=8) as right:
        talk = list(itertools.islice(duet(left, right, [question]), 80))
    *sides, heard = zip(*talk, strict=True)
    said = ["".join(frame.text for frame in side).strip() for side in sides]
    assert said[0].startswith("your ") and said[1].startswith("your ")
    for seed, side in ((7, 0), (8, 1)):
        with moshi_c.Session(model, seed=seed) as session:
            pcm = np.zeros(1920, np.float32)
            for frame, both in zip(sides[side], heard, strict=True):
                again = session.step(pcm)
                np.testing.assert_array_equal(again.user_codes, frame.user_codes)
                np.testing.assert_array_equal(again.pcm, frame.pcm)
                pcm = both[:, 1 - side]
    # The question is in the left one's place, and nothing else is added.
    voices = np.concatenate([np.stack([a.pcm, b.pcm], axis=1) for a, b, _ in talk])
    both = np.concatenate(heard)
    np.testing.assert_array_equal(both[:, 1], voices[:, 1])
    added = np.flatnonzero(np.abs(both - voices)[:, 0] > 0.01)
    assert 0.4 < added[0] / 24000 < 1.0
    assert len(question) - 12000 < added[-1] - added[0] < len(question)


def test_a_further_question_waits_until_both_are_silent(model: moshi_c.Model) -> None:
    questions = [asked("how are you"), asked("what is your name")]
    with moshi_c.Session(model, seed=7) as left, moshi_c.Session(model, seed=8) as right:
        talk = list(itertools.islice(duet(left, right, questions), 160))
    said = "".join(frame.text for _, frame, _ in talk).strip()
    assert said == "i am fine thank you my name is moshi"
    asking = [frame.level > -40 for _, frame, _ in talk]
    speaking = [a.speaking or b.speaking for a, b, _ in talk]
    answered = speaking.index(True)
    assert any(asking[:answered])
    silent = speaking.index(False, answered)
    second = asking.index(True, silent)
    assert not any(speaking[silent:second])
    assert PAUSE_FRAMES <= second - silent <= PAUSE_FRAMES + 10


def test_a_duet_needs_two_sessions_at_the_rate_of_the_model(model: moshi_c.Model) -> None:
    with moshi_c.Session(model) as left, moshi_c.Session(model, sample_rate=8000) as right:
        with pytest.raises(moshi_c.AudioError, match=r"at 8000 Hz; expected 24000 Hz"):
            next(duet(left, right))
        with pytest.raises(ValueError, match="twice"):
            next(duet(left, left))


def test_the_command_writes_both_sides_and_says_who_spoke(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "question.wav", asked("what is your name"), 24000)
    out = tmp_path / "duet.wav"
    command = ["duet", str(out), "--first", str(tmp_path / "question.wav"), "--seed", "7"]
    assert main([*command, "--seconds", "4"]) == 0
    captured = capsys.readouterr()
    first = captured.out.splitlines()[0]
    assert first.split()[1:] == ["s", "right", "my", "name", "is", "moshi"]
    assert "4.00 s, seeds 7 and 8" in captured.err
    sides, rate = soundfile.read(out)
    assert (len(sides), rate) == (96000, 24000)
    assert min(np.abs(sides).max(axis=0)) > 0.05
    written = out.read_bytes()
    assert main([*command, "--seconds", "4"]) == 0
    assert out.read_bytes() == written


def test_an_interrupted_duet_keeps_what_was_said(tmp_path: Path) -> None:
    out = tmp_path / "long.wav"
    arguments = ["duet", str(out), "--seconds", "86400", "--seed", "7"]
    with subprocess.Popen(
        [sys.executable, "-m", "moshi_c", *arguments], stderr=subprocess.PIPE, text=True
    ) as process:
        while not out.exists() or out.stat().st_size < 200_000:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == f"moshi-c: stopped; {out} holds what was done by then\n"
    sides, _ = soundfile.read(out)
    assert sides.shape[1] == 2 and 40_000 < len(sides) < 86400 * 24000
