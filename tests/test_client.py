"""`moshi-c client`: a call to a server, which is a small one made here: it says what it hears."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sound
import soundfile
from aiohttp import WSMsgType, web
from callers import scenario, serving

import moshi_c
from moshi_c import OggOpusReader, OggOpusWriter, client
from moshi_c.audio import read_audio
from moshi_c.cli import main

pytestmark = pytest.mark.python

RATE, FRAME = 24000, 1920
DOUBLES = Path(__file__).parent / "doubles"


class Echo:
    """A server of `/api/chat` in a thread. Tests change what it does by its fields."""

    def __init__(self) -> None:
        self.handshake = b"\0"
        self.before: list[bytes | str] = []
        self.after_frames: dict[int, Callable[[Any], Any]] = {}
        self.refuse = 0
        self.heard: list[np.ndarray] = []
        self.kinds: list[int] = []
        self.early = 0
        self.headers: dict[str, str] = {}
        self.query: dict[str, str] = {}
        self.some_heard = threading.Event()
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        app.router.add_get("/api/chat", self._chat)
        runner = web.AppRunner(app, shutdown_timeout=1.0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        self._started.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.headers, self.query = dict(request.headers), dict(request.query)
        if self.refuse:
            return web.Response(status=self.refuse)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for message in self.before:
            await (
                socket.send_str(message) if isinstance(message, str) else socket.send_bytes(message)
            )
        with contextlib.suppress(asyncio.TimeoutError):
            await socket.receive(timeout=0.2)
            self.early += 1
        await socket.send_bytes(self.handshake)
        reader, writer, frames = OggOpusReader(), OggOpusWriter(), 0
        async for message in socket:
            assert message.type == WSMsgType.BINARY
            self.kinds.append(message.data[0])
            pcm = reader.append(message.data[1:])
            self.heard.append(pcm)
            await socket.send_bytes(b"\1" + writer.append(pcm))
            frames += 1
            self.some_heard.set()
            if frames in self.after_frames:
                await self.after_frames[frames]((request, socket, self))
        return socket

    def __enter__(self) -> Echo:
        self._thread.start()
        assert self._started.wait(60)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
def server() -> Iterator[Echo]:
    with Echo() as echo:
        yield echo


@pytest.fixture
def question(tmp_path: Path) -> Path:
    """1.0 s and a bit."""
    path = tmp_path / "question.wav"
    soundfile.write(
        path, sound.speech("could you tell me how far it is to the station")[: RATE + 77], RATE
    )
    return path


def says(*messages: bytes) -> Callable[[Any], Any]:
    async def send(call: Any) -> None:
        for message in messages:
            await call[1].send_bytes(message)

    return send


def call(server: Echo, question: Path, *more: object) -> int:
    out = question.parent / "answer.wav"
    return main(["client", server.url, "--in", str(question), "--out", str(out), *map(str, more)])


def answer(question: Path) -> np.ndarray:
    pcm, rate = soundfile.read(question.parent / "answer.wav", dtype="float32")
    assert rate == RATE
    return pcm


@pytest.mark.parametrize("handshake", [b"\0", b"\0\0\0\0\0\0\0\0\0", b"\0hello"])
def test_a_file_is_said_in_real_time_and_the_answer_kept(
    server: Echo, question: Path, handshake: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    server.handshake = handshake
    began = time.monotonic()
    assert call(server, question) == 0
    assert time.monotonic() - began > 12 * 0.08
    assert server.early == 0 and set(server.kinds) == {1}
    said, _ = soundfile.read(question, dtype="float32")
    heard = np.concatenate(server.heard)
    assert len(heard) == len(answer(question)) == 13 * FRAME
    # 2.5 ms of delay each way
    assert np.corrcoef(heard[60 : len(said)], said[:-60])[0, 1] > 0.97
    assert np.corrcoef(answer(question)[120 : len(said)], said[:-120])[0, 1] > 0.95
    assert capsys.readouterr().err == "1.04 s said, 1.04 s heard\n"


def test_text_is_printed_as_it_comes_and_cannot_touch_the_terminal(
    server: Echo, question: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    euro = "€".encode()
    server.after_frames = {
        2: says(b"\2 Hello", b"\2 \xf0\x9f\x98", b"\2\x80"),
        4: says(b"\2 5 " + euro[:1], b"\2" + euro[1:], b"\2\x1b[2J\x07\n end \xff"),
    }
    assert call(server, question) == 0
    assert capsys.readouterr().out == "Hello 😀 5 €[2J  end \ufffd\n"


def test_what_means_nothing_is_ignored(
    server: Echo, question: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.before = [
        b'\4{"model": 1}',
        b"\6",
        b'\6{"position": 3}',
        b'\6{"position": []}',
        b"\6\xff",
        b"",
        "text",
        b"\xee\0",
        b"\3\1",
    ]
    server.after_frames = {3: says(b"\x07\1red", b"\6", b"\1", b"\0")}
    assert call(server, question) == 0
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("waiting; place 3 in the line\n1.04 s said")


def test_token_and_wishes_reach_the_server(server: Echo, question: Path) -> None:
    assert call(server, question, "--token", "secret", "--seed", 5, "--after", 0.2) == 0
    assert server.headers["Authorization"] == "Bearer secret"
    assert server.query == {"seed": "5"}
    assert len(answer(question)) == 16 * FRAME


def test_a_refusal_is_one_sentence(
    server: Echo, question: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.refuse = 401
    assert call(server, question) == 1
    err = capsys.readouterr().err
    address = f"ws://127.0.0.1:{server.port}/api/chat"
    assert err == f"moshi-c: {address} refused the call: 401 Unauthorized\n"


async def lose(call: Any) -> None:
    call[0].transport.abort()


async def hang_up(call: Any) -> None:
    await call[1].close(code=4400, message=b"no good packet")


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        (says(b"\5the house is\nfull\x1b[0m"), "ended the call: the house is full[0m"),
        (hang_up, "ended the call: no good packet"),
        (lose, "ended the call: the connection was lost"),
        (says(b"\1" + bytes(200_000)), "without sound; expected Opus in Ogg"),
        (says(bytes(2 << 20)), "ended the call: "),
    ],
    ids=["error", "close", "reset", "garbage", "huge"],
)
def test_a_call_that_the_server_ends_keeps_what_was_heard(
    server: Echo,
    question: Path,
    what: Callable[[Any], Any],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.after_frames = {6: what}
    assert call(server, question) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and sentence in err
    assert 5 * FRAME <= len(answer(question)) <= 6 * FRAME


async def close(call: Any) -> None:
    await call[1].close()


async def keep_silent(call: Any) -> None:
    """From here on it says nothing, and hangs up when it has heard all."""
    while len(call[2].kinds) < 13:
        call[2].kinds.append((await call[1].receive()).data[0])
    await call[1].close()


@pytest.mark.parametrize(
    ("frames", "how", "said"),
    [
        (6, close, "(0.48|0.56) s of 1.04 s were said, 0.48 s heard"),
        (10, keep_silent, "1.04 s of 1.04 s were said, 0.80 s heard"),
    ],
    ids=["input missing", "answers missing"],
)
def test_a_server_that_hangs_up_in_the_middle_of_a_file_is_an_error(
    server: Echo,
    question: Path,
    frames: int,
    how: Callable[[Any], Any],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.after_frames = {frames: how}
    assert call(server, question) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(rf"moshi-c: ws://\S+ hung up before the end: {said}\n", err), err
    assert len(answer(question)) == frames * FRAME


def test_a_server_that_hangs_up_when_all_is_said_and_answered_is_none(
    server: Echo, question: Path
) -> None:
    server.after_frames = {13: close}
    assert call(server, question) == 0
    assert len(answer(question)) == 13 * FRAME


@scenario
async def test_our_server_says_over_opus_what_a_session_says(tmp_path: Path) -> None:
    asked, out = Path(__file__).parents[1] / "examples" / "question.ogg", tmp_path / "answer.wav"
    said = np.concatenate([read_audio(asked, RATE), sound.silence(2.0)])
    said = np.pad(said, (0, -len(said) % FRAME))
    heard = OggOpusReader().append(OggOpusWriter().append(said))
    with moshi_c.load(max_sessions=1) as model:
        with moshi_c.Session(model, seed=5) as session:
            expected = np.concatenate([frame.pcm for frame in session.push(heard)])
        # a loaded machine is late, and must not be given silence instead
        async with serving(model, silence_after=60.0, backlog_seconds=60.0) as server:
            options = ["--in", str(asked), "--out", str(out)]
            more = ["--seed", "5", "--after", "2"]
            assert await asyncio.to_thread(main, ["client", server.url, *options, *more]) == 0
    found, _ = soundfile.read(out, dtype="float32")
    assert np.abs(found).max() > 0.05
    assert np.corrcoef(found[60:], expected[: len(found) - 60])[0, 1] > 0.95


def test_ctrl_c_keeps_what_was_heard(server: Echo, question: Path) -> None:
    out = question.parent / "answer.wav"
    command = [sys.executable, "-m", "moshi_c", "client", server.url, "--in", str(question)]
    with subprocess.Popen(
        [*command, "--out", str(out), "--after", "600"], stderr=subprocess.PIPE, text=True
    ) as process:
        assert server.some_heard.wait(300)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err == f"moshi-c: stopped; {out} holds what was done by then\n"
    assert len(answer(question)) % FRAME == 0


def test_the_microphone_is_sent_and_the_answer_played(
    server: Echo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pcm = sound.speech("could you tell me how far it is to the station")[: 12 * FRAME]
    pcm.tofile(tmp_path / "in.f32")
    monkeypatch.setenv("SOUND_IN", str(tmp_path / "in.f32"))
    monkeypatch.setenv("SOUND_OUT", str(tmp_path / "out.f32"))
    monkeypatch.setenv("SOUND_END", "gone")
    monkeypatch.setenv("SOUND_PACE", "0.08")
    monkeypatch.syspath_prepend(str(DOUBLES))
    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    assert main(["client", server.url, "--no-echo-gate"]) == 1
    sys.modules.pop("sounddevice")
    heard = np.concatenate(server.heard)
    assert len(heard) >= 6 * FRAME  # what was said before the handshake is not
    played = np.fromfile(tmp_path / "out.f32", np.float32)
    assert np.abs(played).max() > 0.02


def test_missing_packages_are_one_sentence(
    question: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert main(["client", "localhost:1", "--in", str(question)]) == 1
    assert "pip install 'moshi_c[audio]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    assert main(["client", "localhost:1"]) == 1
    assert capsys.readouterr().err == (
        "moshi-c: the client needs aiohttp: pip install 'moshi_c[server]'\n"
    )


def test_mistakes_are_found_before_the_call(
    question: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, sentence in (
        (["ftp://host"], "ftp://host is no address of a server"),
        (["ws://"], "is no address of a server"),
        ([str(question)], f"expected the address of a server, and --in {question}"),
        (["host", "--in", "none.wav", "--out", "a.wav"], "none.wav does not exist"),
        (["host", "--out", "a.xyz"], "'.xyz'"),
        (["host", "--in", str(question), "--out", str(question)], "is the input"),
    ):
        assert main(["client", *arguments]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and sentence in err


def test_a_server_that_is_not_there_is_one_sentence(
    question: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(question.parent / "a.wav")
    assert main(["client", "127.0.0.1:1", "--in", str(question), "--out", out]) == 1
    err = capsys.readouterr().err
    assert err.startswith("moshi-c: ws://127.0.0.1:1/api/chat cannot be reached: ")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("localhost:8998", "ws://localhost:8998/api/chat"),
        ("https://host/", "wss://host/api/chat"),
        ("http://host:80/other?a=1", "ws://host:80/other?a=1&seed=3"),
        (f"ws://host/a?token={'x' * 300}", f"ws://host/a?token={'x' * 300}"),
    ],
    ids=["name", "https", "path", "token"],
)
def test_addresses_are_made_whole(url: str, expected: str) -> None:
    assert client.address(url, 3 if "seed" in expected else None) == expected
