"""`moshi-c chat`: a conversation over a sound card, which is a double here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sound

import moshi_c
from moshi_c import chat, soundcard
from moshi_c.cli import main
from moshi_c.soundcard import EchoGate, Loudspeaker

pytestmark = pytest.mark.python

DOUBLES = Path(__file__).parent / "doubles"
RATE, FRAME = 24000, 1920
LOUD = np.full((FRAME, 1), 0.1, np.float32)


@pytest.fixture
def question() -> sound.Sound:
    return sound.question(after=2.0)


@pytest.fixture
def card(question: sound.Sound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of the double, which is what `import sounddevice` finds."""
    question.tofile(tmp_path / "in.f32")
    environment = {
        "SOUND_IN": str(tmp_path / "in.f32"),
        "SOUND_OUT": str(tmp_path / "out.f32"),
        "SOUND_END": "gone",
        "SOUND_PACE": "0",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(DOUBLES))
    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    yield environment
    sys.modules.pop("sounddevice", None)


def test_the_model_hears_every_block_of_the_microphone(
    question: sound.Sound,
    card: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(chat, "_MOST_BLOCKS", 10_000)
    assert main(["chat", "--seed", "7", "--no-echo-gate"]) == 1
    with moshi_c.load() as model, moshi_c.Session(model, seed=7) as session:
        expected = "".join(frame.text for frame in session.push(question))
    shown = capsys.readouterr()
    assert shown.out.strip() == expected.strip() and expected.strip()
    first, last = shown.err.splitlines()
    assert first == "listening; Ctrl-C ends it (seed 7)"
    assert last == "moshi-c: the microphone has stopped; expected it to go on"


def test_blocks_that_come_faster_than_the_model_are_left_out(
    card: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "--seed", "7"]) == 1
    assert "s of the microphone were left out: a step took" in capsys.readouterr().err


def test_a_conversation_in_real_time_is_heard_and_ends_with_ctrl_c(card: dict[str, str]) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(DOUBLES),
        "SOUND_PACE": "0.08",
        "SOUND_END": "ctrl-c",
    }
    done = subprocess.run(
        [sys.executable, "-m", "moshi_c", "chat", "--seed", "7"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    assert done.stdout.strip() and done.stdout.endswith("\n")
    assert done.stderr.splitlines()[-1] == "moshi-c: stopped"
    played = np.fromfile(card["SOUND_OUT"], np.float32)
    assert np.abs(played).max() > 0.05


def test_missing_packages_and_devices_are_one_sentence(
    card: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "--speaker", "none"]) == 1
    assert "loudspeaker 'none' cannot be used: No device matching" in capsys.readouterr().err
    assert main(["chat", "--microphone", "none"]) == 1
    assert "microphone 'none' cannot be used" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert main(["chat"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install 'moshi_c[audio]'" in err


def test_the_gate_is_shut_while_the_loudspeaker_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(soundcard.time, "monotonic", lambda: now)
    speaker = Loudspeaker(RATE)
    gate, headphones = EchoGate(speaker), EchoGate(speaker, shut=False)
    said = np.ones(FRAME, np.float32)
    out = np.empty((FRAME, 1), np.float32)
    assert gate(said) is said
    speaker.play(np.full(2 * FRAME, 0.001, np.float32))  # a hum of -60 dBFS
    speaker._fill(out, FRAME, None, None)
    assert gate(said) is said
    speaker.play(LOUD[:, 0])
    speaker._fill(np.empty((2 * FRAME, 1), np.float32), 2 * FRAME, None, None)
    assert not gate(said).any() and headphones(said) is said
    now += soundcard.ECHO_SECONDS / 2
    assert not gate(said).any()
    now += soundcard.ECHO_SECONDS
    assert gate(said) is said


def test_the_loudspeaker_plays_all_of_it_in_order() -> None:
    speaker = Loudspeaker(RATE)
    pcm = np.arange(1, 3 * FRAME + 1, dtype=np.float32) / (3 * FRAME)
    for start in range(0, len(pcm), FRAME):
        speaker.play(pcm[start : start + FRAME])
    out = np.empty((100, 1), np.float32)
    played = []
    for _ in range(70):
        speaker._fill(out, 100, None, None)
        played.append(out[:, 0].copy())
    slack = round(soundcard.SLACK_SECONDS * RATE)
    heard = np.concatenate(played)
    assert not heard[:slack].any() and not heard[slack + len(pcm) :].any()
    np.testing.assert_array_equal(heard[slack : slack + len(pcm)], pcm)


def test_the_loudspeaker_never_falls_far_behind() -> None:
    speaker = Loudspeaker(RATE)
    for index in range(50):
        speaker.play(np.full(FRAME, index, np.float32))
    out = np.empty((round(soundcard.MOST_SECONDS * RATE), 1), np.float32)
    speaker._fill(out, len(out), None, None)
    speaker._fill(out, len(out), None, None)
    assert not out.any()
