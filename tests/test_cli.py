"""The command `moshi-c`: files, exit codes, and one line on stderr when something is wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

import moshi_c
from moshi_c.audio import write_audio
from moshi_c.cli import main
from moshi_c.codec_file import CodecFile, read_codec_file, write_codec_file

Capture = pytest.CaptureFixture[str]

COMMANDS = (
    "run",
    "duet",
    "chat",
    "encode",
    "decode",
    "quantize",
    "info",
    "bench",
    "serve",
    "client",
)


def cli(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "moshi_c", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds and a bit at another rate, in two channels."""
    rng = np.random.default_rng(0)
    noise = 0.1 * rng.standard_normal((35_000, 2)) * (np.arange(35_000) % 4000 < 2000)[:, None]
    path = tmp_path_factory.mktemp("voice") / "voice.flac"
    soundfile.write(path, noise, 16000)
    return path


def test_run_writes_what_the_session_says(voice: Path, tmp_path: Path) -> None:
    out, words = tmp_path / "out.wav", tmp_path / "words.json"
    done = cli("run", voice, out, "--seed", 7, "--words", words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with moshi_c.load() as model, moshi_c.Session(model, seed=7) as session:
        recording = session.run(voice)
    recording.save(tmp_path / "expected.wav")
    assert out.read_bytes() == (tmp_path / "expected.wav").read_bytes()
    assert done.stdout == recording.text.strip() + "\n"
    assert json.loads(words.read_text()) == recording.to_dict()
    assert "real-time factor 0." in done.stderr
    for part in ("encode", "temporal", "depth", "decode", "other", "seed 7"):
        assert part in done.stderr


def test_run_prints_the_text_as_it_comes(voice: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["run", str(voice), str(tmp_path / "a.wav"), "--seed", "7", "--after", "2"]) == 0
    at_the_end = capsys.readouterr().out
    out = str(tmp_path / "b.wav")
    assert main(["run", str(voice), out, "--seed", "7", "--after", "2", "--text"]) == 0
    assert capsys.readouterr().out.strip() == at_the_end.strip()
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()
    frames = soundfile.info(out).frames
    assert frames == (-(-(35_000 * 3 // 2 + 48_000) // 1920) + 1) * 1920


def test_run_writes_words_alone(voice: Path, tmp_path: Path) -> None:
    assert main(["run", str(voice), str(tmp_path / "out.json"), "--seed", "7"]) == 0
    assert set(json.loads((tmp_path / "out.json").read_text())) == {"duration", "text", "words"}


def test_codes_make_the_way_through_a_file(voice: Path, tmp_path: Path) -> None:
    done = cli("encode", voice, tmp_path / "a.mimi", "--codebooks", 5)
    assert done.returncode == 0, done.stderr
    assert "28 frames of 5 codes, 2.19 s" in done.stderr
    done = cli("decode", tmp_path / "a.mimi", tmp_path / "a.wav")
    assert done.returncode == 0, done.stderr
    with moshi_c.load_mimi(codebooks=5) as mimi:
        codes = mimi.encode(voice)
        np.testing.assert_array_equal(read_codec_file(tmp_path / "a.mimi").codes, codes)
        write_audio(tmp_path / "expected.wav", mimi.decode(codes)[:52_500], 24000)
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "expected.wav").read_bytes()


PEAK = """
import sys
from moshi_c.cli import main
assert main(sys.argv[1:]) == 0
status = open("/proc/self/status").read()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.slow  # the sanitizers keep what is freed
def test_memory_of_the_codec_commands_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peaks: dict[str, list[int]] = {"encode": [], "decode": []}
    for minutes in (1, 6):
        sound, codes = tmp_path / f"{minutes}.wav", tmp_path / f"{minutes}.mimi"
        second = (3000 * np.random.default_rng(0).standard_normal(24000)).astype(np.int16)
        with soundfile.SoundFile(sound, "w", 24000, 1) as file:
            for _ in range(60 * minutes):
                file.write(second)
        for command, source, target in (
            ("encode", sound, codes),
            ("decode", codes, tmp_path / f"{minutes}-again.wav"),
        ):
            done = subprocess.run(
                [sys.executable, "-c", PEAK, command, source, target],
                capture_output=True, text=True, timeout=600, check=True,
            )  # fmt: skip
            peaks[command].append(int(done.stdout))
    # Five minutes are 28.8 MB of samples, and 0.12 MB of codes.
    for command, (short, long) in peaks.items():
        assert long - short < 8000, f"{command}: {short} kB, then {long} kB"


@pytest.mark.parametrize("arguments", [[], ["FOLDER"], ["--model", "FOLDER"]])
def test_info_says_what_is_there(arguments: list[str], capsys: Capture) -> None:
    folder = str(moshi_c.hub.packaged_model())
    assert main(["info", *[folder if part == "FOLDER" else part for part in arguments]]) == 0
    text = capsys.readouterr().out
    for part in (moshi_c.__version__, "cpu", "moshi", "8 of the model", "400 pieces", "bf16"):
        assert part in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"example: moshi-c {command} " in " ".join(text.split())
    common = ("--model", "--device", "--dtype", "--seed", "--threads")
    for option in common:
        some = {"quantize": ("--dtype", "--threads"), "client": ("--seed",)}
        assert (option in text) == (option in some.get(command, common)), option


def test_the_version_is_told(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"moshi-c {moshi_c.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [[], ["speak"], ["run"], ["run", "a.wav"], ["run", "a", "b", "--seed", "-1"],
     ["run", "a", "b", "--threads", "0"], ["run", "a", "b", "--after", "-1"],
     ["encode", "a", "b", "--codebooks", "x"], ["info", "a", "b"]],
)  # fmt: skip
def test_a_wrong_command_line_is_code_2(arguments: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: moshi-c" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "gone.wav", "o.wav"], "gone.wav does not exist"),
        (["run", "bad.wav", "o.wav"], "bad.wav could not be read"),
        (["run", "VOICE", "o.xyz"], "o.xyz has the suffix '.xyz'; expected one of .wav"),
        (["run", "VOICE", "no/o.wav"], "there is no folder no"),
        (["run", "VOICE", "o.wav", "--words", "no/o.json"], "there is no folder no"),
        (["run", "VOICE", "VOICE"], "is the input; give another OUT"),
        (["run", "VOICE", "o.wav", "--model", "./gone"], "gone does not exist; expected a folder"),
        (["run", "VOICE", "o.wav", "--model", "."], "the folder has"),
        (["run", "VOICE", "o.wav", "--device", "cuda:9"], "available"),
        (["run", "VOICE", "o.wav", "--dtype", "q3"], "dtype is 'q3'; expected one of auto"),
        (["encode", "VOICE", "o.wav"], "o.wav has the suffix '.wav'; expected .mimi"),
        (["encode", "VOICE", "o.mimi", "--codebooks", "9"], "9"),
        (["bench", "--json", "."], ". cannot be written: it is a folder"),
        (["decode", "VOICE", "o.wav"], "is not a .mimi file"),
        (["decode", "gone.mimi", "o.wav"], "gone.mimi could not be read"),
        (["decode", "other.mimi", "o.wav"], "has 100 entries in a codebook, the codec has 512"),
        (["info", "no.safetensors"], "no.safetensors does not exist"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str],
    sentence: str,
    voice: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    write_codec_file("other.mimi", CodecFile(np.zeros((8, 1), np.int32), 100, 1920, 24000, 1920))
    assert main([str(voice) if part == "VOICE" else part for part in arguments]) == 1
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("moshi-c: ")
    assert sentence in lines[0]
    assert not (tmp_path / "o.wav").exists()
    assert not (tmp_path / "o.mimi").exists()


def test_an_error_ends_the_process_with_1(tmp_path: Path) -> None:
    done = cli("run", "gone.wav", "out.wav", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "moshi-c: gone.wav does not exist\n"
    assert cli().returncode == 2


def test_an_interrupt_keeps_what_was_written(tmp_path: Path) -> None:
    source, out, words = tmp_path / "long.wav", tmp_path / "out.wav", tmp_path / "out.json"
    write_audio(source, np.zeros(24000 * 600, np.float32), 24000)
    command = [sys.executable, "-m", "moshi_c", "run", str(source), str(out), "--words", str(words)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (out.exists() and out.stat().st_size > 20_000):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert errors == f"moshi-c: stopped; {out} holds what was done by then\n"
    frames = soundfile.info(out).frames
    assert 0 < frames < 24000 * 600
    assert frames % 1920 == 0
    duration = json.loads(words.read_text())["duration"]
    assert duration == pytest.approx(frames / 24000, abs=0.081)


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    command = f"{sys.executable} -m moshi_c info | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=600, check=False
    )
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 1)


def test_the_example_says_what_run_says(voice: Path, tmp_path: Path) -> None:
    example = Path(__file__).parent.parent / "examples" / "converse.py"
    raw = tmp_path / "voice.f32"
    pcm = moshi_c.audio.read_audio(voice, 24000)
    pcm.astype("<f4").tofile(raw)
    with moshi_c.load() as model, moshi_c.Session(model, seed=7) as session:
        expected = session.run(pcm).pcm
    assert expected is not None
    for arguments in ([raw, tmp_path / "out.f32", "--raw"], [voice, tmp_path / "out.wav"]):
        done = subprocess.run(
            [sys.executable, str(example), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.f32").read_bytes() == expected.astype("<f4").tobytes()
    write_audio(tmp_path / "expected.wav", expected, 24000)
    assert (tmp_path / "out.wav").read_bytes() == (tmp_path / "expected.wav").read_bytes()
