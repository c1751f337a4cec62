"""The examples do what they say; Python's and C's hold the same conversation."""

from __future__ import annotations

import datetime
import importlib.util
import io
import json
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


@pytest.fixture(autouse=True)
def _scripts_find_what_lies_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do for users; the tests under the sanitizers are told otherwise."""
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)


@pytest.fixture(scope="module")
def session_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/session.c with the core that the C tests are linked with."""
    program = tmp_path_factory.mktemp("session") / "session"
    core = "build/test/libmoshi.a"
    subprocess.run(["make", "--no-print-directory", "-j2", core], cwd=ROOT, check=True)
    source, libraries = ROOT / "examples" / "session.c", ["-lopus", "-logg", "-pthread", "-lm"]
    command = ["cc", f"-I{ROOT / 'csrc'}", source, ROOT / core, "-o", program, *libraries, "-ldl"]
    subprocess.run(command, check=True)
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


def example(name: str, *arguments: str, cwd: Path) -> str:
    """What an example prints."""
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    done = subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True)
    assert not done.stderr
    return done.stdout


def test_batch_gives_each_recording_its_answer_and_timed_words(tmp_path: Path) -> None:
    printed = example("batch", cwd=tmp_path)
    assert "say-the-numbers-seven-twelve.wav: seven@" in printed and "5 answers" in printed
    answers = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("answers/*.json")}
    assert len(answers) == 5
    assert answers["what-is-the-opposite-of-hot"]["text"] == "the opposite of hot is cold"
    for stem, answer in answers.items():
        times = [time for word in answer["words"] for time in (word["start"], word["end"])]
        assert times and times == sorted(times) and times[-1] < answer["duration"]
        voice, _ = soundfile.read(tmp_path / "answers" / f"{stem}.wav")
        assert len(voice) == round(answer["duration"] * 24000) and np.abs(voice).max() > 0.05
    # One after the other, from a folder: the same bytes.
    example("batch", "answers/questions", "--out", "one", "--at-once", "1", cwd=tmp_path)
    for path in sorted(tmp_path.glob("answers/*.wav")):
        assert (tmp_path / "one" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("batch", ["nosuch"], "No such file or directory: 'nosuch'"),
        ("duet", ["--out", "talk.nosuch"], "talk.nosuch has the suffix '.nosuch'"),
        ("fact", ["--fact", "日"], "this model's vocabulary has no '日'"),
        ("fork", ["--model", "nosuch"], "nosuch does not exist"),
        ("phone", ["nosuch.ulaw"], "No such file or directory: 'nosuch.ulaw'"),
    ],
)
def test_what_is_wrong_is_one_line(
    name: str, arguments: list[str], sentence: str, tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(f"{name}.py: ")
    assert sentence in done.stderr and done.stderr.count("\n") == 1


def test_two_models_talk(tmp_path: Path) -> None:
    printed = example("duet", "--seconds", "12", cwd=tmp_path)
    turns = [line.split(maxsplit=3)[2:] for line in printed.splitlines() if " s  " in line]
    assert turns[0] == ["right", "my name is moshi"]
    assert {name for name, _ in turns} == {"left", "right"}
    sides, _ = soundfile.read(tmp_path / "duet.wav")
    assert sides.shape == (12 * 24000, 2) and min(np.abs(sides).max(axis=0)) > 0.05


def test_a_fact_is_said_in_place_of_an_answer(tmp_path: Path) -> None:
    fact = "it is about ten past four"
    by_itself, told_at, told, _ = example("fact", "--fact", fact, cwd=tmp_path).splitlines()
    assert by_itself == "by itself: it is time to talk"
    assert 1.0 < float(told_at.split(" s:")[0]) < 2.5
    assert told == f"told:      {fact}"
    call, _ = soundfile.read(tmp_path / "fact.wav")
    assert np.abs(call[round(2.5 * 24000) :]).max() > 0.05  # the fact is heard


@pytest.mark.parametrize(
    ("clock", "words"),
    [
        ((12, 0), "it is about twelve"),
        ((16, 11), "it is about ten past four"),
        ((16, 31), "it is about half past four"),
        ((16, 44), "it is about a quarter to five"),
        ((23, 59), "it is about twelve"),
    ],
)
def test_the_fact_is_the_time(clock: tuple[int, int], words: str) -> None:
    spec = importlib.util.spec_from_file_location("fact", ROOT / "examples" / "fact.py")
    assert spec and spec.loader
    fact = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        spec.loader.exec_module(fact)
    finally:
        sys.path.remove(str(ROOT / "examples"))
    assert fact.time_in_words(datetime.time(*clock)) == words


def test_a_call_forks_three_ways(tmp_path: Path) -> None:
    lines = example("fork", cwd=tmp_path).splitlines()
    said = [line.removeprefix("   -> ") for line in lines if line.startswith("   -> ")]
    expected = [
        "i am fine thank you",
        "the opposite of early is late",
        "your book is blue",
        "four nine",
    ]
    assert said == expected
    voices = [soundfile.read(tmp_path / "futures" / f"{i}.wav")[0] for i in (1, 2, 3)]
    past = 50 * 1920
    for voice in voices[1:]:
        np.testing.assert_array_equal(voice[:past], voices[0][:past])
        assert np.abs(voice[past:] - voices[0][past:]).max() > 0.05
    # A future is what it would have been alone.
    example("fork", "my book is blue", "--out", "alone", cwd=tmp_path)
    assert (tmp_path / "alone" / "1.wav").read_bytes() == (tmp_path / "futures/2.wav").read_bytes()


def test_a_phone_call_is_mu_law_both_ways(tmp_path: Path) -> None:
    printed = example("phone", cwd=tmp_path)
    words = [line.split()[-1] for line in printed.splitlines()[:-1]]
    assert " ".join(words) == "yes i can hear you"
    caller, answer = ((tmp_path / name).read_bytes() for name in ("caller.ulaw", "answer.ulaw"))
    assert len(answer) % 640 == 0 and len(caller) - 1280 < len(answer) <= len(caller)
    heard, _ = soundfile.read(
        io.BytesIO(answer), samplerate=8000, channels=1, format="RAW", subtype="ULAW"
    )
    assert np.abs(heard).max() > 0.05 and np.abs(heard[:4000]).max() < 0.01
    # The same call from the file.
    again = example("phone", "caller.ulaw", "--out", "again.ulaw", cwd=tmp_path)
    assert again.splitlines()[:-1] == printed.splitlines()[:-1]
    assert (tmp_path / "again.ulaw").read_bytes() == answer
