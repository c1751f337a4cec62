"""The examples hold the same conversation from Python and from C."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sound
import soundfile

pytestmark = pytest.mark.python

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "moshi_c" / "data" / "moshi-tiny"


@pytest.fixture(scope="module")
def session_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/session.c and the core, compiled as setup.py compiles them."""
    compiler = shutil.which("cc")
    assert compiler, "expected a C compiler named cc"
    program = tmp_path_factory.mktemp("session") / "session"
    core = sorted((ROOT / "csrc").glob("*.c")) + sorted((ROOT / "csrc" / "cpu").glob("*.c"))
    flags = ["-std=gnu11", "-O2", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
    sources = [str(ROOT / "examples" / "session.c"), *map(str, core)]
    libraries = ["-lopus", "-logg", "-pthread", "-lm"]
    subprocess.run([compiler, *flags, *sources, "-o", str(program), *libraries], check=True)
    return program


def converse(source: Path, target: Path, *options: str) -> None:
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "examples" / "converse.py"),
            str(source),
            str(target),
            *options,
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def test_c_and_python_give_the_same_sound_bit_for_bit(
    session_program: Path, tmp_path: Path
) -> None:
    question = sound.speech("what is the opposite of hot")
    pcm = np.concatenate([question, np.zeros(24000 + 777, np.float32)]).astype("<f4")
    raw, wav = tmp_path / "in.f32", tmp_path / "in.wav"
    pcm.tofile(raw)
    soundfile.write(wav, pcm, 24000, subtype="FLOAT")

    subprocess.run(
        [str(session_program), str(MODEL), str(raw), str(tmp_path / "c.f32")], check=True
    )
    converse(raw, tmp_path / "python.f32", "--raw")
    converse(wav, tmp_path / "python.wav")

    from_c = np.fromfile(tmp_path / "c.f32", "<f4")
    frames = -(-len(pcm) // 1920) + 1
    assert len(from_c) == frames * 1920 and np.abs(from_c).max() > 0.01
    assert (tmp_path / "python.f32").read_bytes() == (tmp_path / "c.f32").read_bytes()
    written, rate = soundfile.read(tmp_path / "python.wav", dtype="float32")
    assert rate == 24000
    assert np.abs(written - from_c).max() <= 1 / 32768  # 16 bit


def test_the_c_example_says_what_is_wrong_in_one_line(
    session_program: Path, tmp_path: Path
) -> None:
    (tmp_path / "in.f32").write_bytes(b"")
    done = subprocess.run(
        [str(session_program), str(tmp_path / "none"), str(tmp_path / "in.f32"), "out.f32"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "none" in done.stderr


def test_hello_asks_and_shows_the_answer(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "hello.py"), "how are you", "--out", "made"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    you, model, _, axis, *rows = done.stdout.splitlines()
    assert you == "you    how are you" and model.startswith("model  ") and "1 s" in axis
    assert rows[0].startswith("you") and rows[1].startswith("model")
    asked, rate = soundfile.read(tmp_path / "made" / "question.wav", dtype="float32")
    answer, _ = soundfile.read(tmp_path / "made" / "answer.wav", dtype="float32")
    assert rate == 24000 and np.abs(asked).max() > 0.05 and np.abs(answer).max() > 0.05
    assert (tmp_path / "made" / "conversation.png").read_bytes().startswith(b"\x89PNG")
    # What it wrote can be asked again, and the same seed says the same.
    command[2:5] = ["made/question.wav", "--out", "again"]
    again = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert model.removeprefix("model  ") in again.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nofile.wav"], "hello.py: nofile.wav does not exist"),
        (["hello", "--voice", "nosuch"], "espeak-ng can't say it: "),
        (["--model", "nosuch"], "hello.py: nosuch does not exist"),
    ],
)
def test_hello_says_what_is_wrong_in_one_line(
    tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    command = [sys.executable, str(ROOT / "examples" / "hello.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(sentence) and done.stderr.count("\n") == 1
