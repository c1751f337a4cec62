"""`/api/chat`: the published clients, and Opus that is not what it should be.

Upstream's Python client runs unmodified, with sound cards that are made up; LiveKit's plug-in for
PersonaPlex does in integrations/test_livekit_client.py. The web pages, Kyutai's and PersonaPlex's,
are played by their messages: what they send, in which order and size, and what they make of what
comes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any
from urllib.parse import urlencode

import numpy as np
import ogg
import pytest
import sound
from callers import (
    PATIENT,
    calling,
    chatting,
    converse,
    eventually,
    reset,
    scenario,
    serving,
    value,
)
from sound import FRAME, RATE, Sound, question
from test_ogg_opus import bad_packets, file_of_libsndfile, garbage

import moshi_c
from moshi_c import Model, OggOpusReader, OggOpusWriter, Session
from moshi_c.server import Server

pytestmark = pytest.mark.python


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with moshi_c.load(max_sessions=8) as model:
        yield model


def written(pcm: Sound, size: int = FRAME) -> list[bytes]:
    """Pieces of a stream, each of so many samples."""
    writer = OggOpusWriter(serial=1)
    return [writer.append(pcm[i : i + size]) for i in range(0, len(pcm), size)]


def understood(pieces: list[bytes]) -> Sound:
    """What a server makes of them."""
    reader = OggOpusReader()
    pcm = np.concatenate([reader.append(piece) for piece in pieces])
    return pcm[: len(pcm) // FRAME * FRAME]


# ---- what is heard -----------------------------------------------------------------------------


@scenario
async def test_the_sound_over_opus_is_the_sound_of_the_session(model: Model) -> None:
    pieces = written(question())
    with Session(model, seed=3) as session:
        frames = session.push(understood(pieces))
    expected = np.concatenate([frame.pcm for frame in frames])
    async with serving(model, **PATIENT) as server, chatting(server, "?seed=3") as caller:
        await caller.ready()
        await caller.say(pieces, 0.08)
        await caller.until(lambda: len(caller.kind(1)) == len(frames))
        assert caller.messages[0][1] == b"\x00"
        reader = OggOpusReader()
        heard = np.concatenate([reader.append(piece) for piece in caller.kind(1)])
        assert len(heard) == len(expected)
        late = reader.pre_skip
        correlation = np.corrcoef(heard[late:], expected[: len(expected) - late])[0, 1]
        assert correlation > 0.95, correlation
        assert caller.text == "".join(frame.text for frame in frames)
        assert value(server, "moshi_silence_steps_total") == 0
    # the header pages come with the first sound, a page for each packet of 40 ms afterwards
    first = ogg.pages(caller.kind(1)[0])
    assert first[0].packets[0].startswith(b"OpusHead") and len(first) == 4
    assert [len(ogg.pages(piece)) for piece in caller.kind(1)[1:]] == [2] * (len(frames) - 1)


# ---- upstream's client -------------------------------------------------------------------------


class Stream:
    """A sound card's stream: a thread that calls back every 80 ms."""

    def __init__(
        self, samplerate: float, channels: int, blocksize: int, callback: Callable[..., None]
    ) -> None:
        assert (samplerate, channels, blocksize) == (RATE, 1, FRAME)
        self.callback = callback
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def __enter__(self) -> Stream:
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.over.set()
        self.thread.join()

    def run(self) -> None:
        begin, number = time.monotonic(), 0
        while not self.over.wait(max(0.0, begin + number * 0.08 - time.monotonic())):
            self.block(number)
            number += 1

    def block(self, number: int) -> None:
        raise NotImplementedError


def sound_cards(said: Sound, heard: list[Sound]) -> types.ModuleType:
    """A module like sounddevice, whose microphone says something and whose speaker is written
    down."""

    class InputStream(Stream):
        def block(self, number: int) -> None:
            frame = said[number * FRAME : (number + 1) * FRAME]
            frame = np.pad(frame, (0, FRAME - len(frame)))
            self.callback(frame[:, None], FRAME, None, None)

    class OutputStream(Stream):
        def block(self, number: int) -> None:
            out = np.empty((FRAME, 1), np.float32)
            self.callback(out, FRAME, None, None)
            heard.append(out[:, 0].copy())

    module = types.ModuleType("sounddevice")
    module.InputStream, module.OutputStream = InputStream, OutputStream  # type: ignore[attr-defined]
    return module


class Printer:
    """What upstream's client prints to."""

    def __init__(self) -> None:
        self.text = ""
        self.logs: list[tuple[str, str]] = []

    def print_header(self) -> None: ...
    def print_pending(self) -> None: ...
    def print_lag(self) -> None: ...
    def print_token(self, token: str) -> None:
        self.text += token

    def log(self, level: str, message: str) -> None:
        self.logs.append((level, message))


@pytest.mark.parity
@scenario
async def test_upstreams_python_client_holds_a_call(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Package moshi 0.2.13, `moshi.client.run`, unmodified: microphone to speaker."""
    heard: list[Sound] = []
    monkeypatch.setitem(sys.modules, "sounddevice", sound_cards(question(), heard))
    monkeypatch.delitem(sys.modules, "moshi.client", raising=False)
    import moshi.client

    monkeypatch.delitem(sys.modules, "moshi.client")
    printer = Printer()
    # greedy, so that the answer is the same each time
    greedy = {"text_temperature": "0", "audio_temperature": "0"}
    async with serving(model, **PATIENT) as server:
        url = f"ws://127.0.0.1:{server.port}"
        arguments = argparse.Namespace(url=url, host=None, port=None, https=False)
        monkeypatch.setattr(
            "moshi_c.server.app.read_sampling",
            lambda query, model: read_sampling({**greedy, "seed": "1"}, model),
        )
        from moshi_c.server.settings import read_sampling

        client = asyncio.create_task(moshi.client.run(printer, arguments))
        await eventually(lambda: "cold" in printer.text or client.done())
        await asyncio.sleep(1.0)
        assert not client.done(), client
        client.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await client
    assert "cold" in printer.text
    voice = np.concatenate(heard)
    assert np.abs(voice).max() > 0.1
    # it does not know the handshake, and says so; nothing else is unusual
    assert [entry for entry in printer.logs if entry[0] != "info"] == [
        ("warning", "unknown message kind 0")
    ]


# ---- the web pages -----------------------------------------------------------------------------

#: What Kyutai's page puts into its URL.
PAGE_QUERY = urlencode(
    {
        "text_temperature": "0.7",
        "text_topk": "25",
        "audio_temperature": "0.8",
        "audio_topk": "250",
        "pad_mult": "0",
        "text_seed": "123456",
        "audio_seed": "654321",
        "repetition_penalty_context": "64",
        "repetition_penalty": "1",
    }
)
PLEX_QUERY = f"{PAGE_QUERY}&" + urlencode(
    {"text_prompt": "You are a teacher.", "voice_prompt": "NATF2.pt"}
)


def page_pieces(pcm: Sound) -> list[bytes]:
    """As opus-recorder sends: first the header pages, then a page of two packets of 20 ms each."""
    stream = ogg.pages(file_of_libsndfile(pcm))
    packets = [packet for page in stream[2:] for packet in page.packets]
    pieces = [ogg.join(stream[:2])]
    for number in range(0, len(packets), 2):
        granule = 960 * (number + 2)
        page = ogg.page(
            packets[number : number + 2], 2 + number // 2, granule, serial=stream[0].serial
        )
        pieces.append(bytes(page))
    return pieces


def web_message(data: bytes) -> str:
    """What the pages make of a message; they throw at a kind that they do not know."""
    kinds = ("handshake", "audio", "text", "control", "metadata", "error", "ping")
    if data[0] == 2:
        data[1:].decode()
    if data[0] == 3:
        assert data[1] < 4
    if data[0] == 4:
        json.loads(data[1:])
    return kinds[data[0]]


@scenario
async def test_the_messages_of_the_web_pages_make_a_call(model: Model) -> None:
    """Kyutai's page and PersonaPlex's: they wait for the handshake, then send pages of 40 ms."""
    pieces = page_pieces(question())

    async def call(server: Server, query: str) -> None:
        async with chatting(server, f"?{query}") as caller:
            await caller.ready()
            await caller.send(pieces[0])
            await caller.say(pieces[1:], 0.04)
            heard = [web_message(data) for _, data in caller.messages]
            assert heard[0] == "handshake" and heard.count("handshake") == 1
            assert set(heard) <= {"handshake", "audio", "text", "ping"}
            assert "audio" in heard
            # the pages hang up after 10 s without a message
            times = [at for at, _ in caller.messages]
            assert max(b - a for a, b in pairwise(times)) < 5

    async with serving(model, keepalive_seconds=0.5) as server:
        await asyncio.gather(*[call(server, query) for query in (PAGE_QUERY, PLEX_QUERY)])
        assert value(server, "moshi_ignored_messages_total") == 0


# ---- silence ----------------------------------------------------------------------------------


@scenario
async def test_dtx_is_asked_for_by_url_or_setting(model: Model) -> None:
    pieces = written(sound.silence(1.2))

    page = "http://page.example"

    async def call(
        options: dict[str, Any], query: str, quiet: bool, origin: str | None = None
    ) -> None:
        async with (
            serving(model, **options) as server,
            chatting(server, query, origin) as caller,
        ):
            await caller.ready()
            await caller.say(pieces, 0.08)
            await eventually(lambda: value(server, "moshi_total_steps_total") >= len(pieces))
            assert bool(caller.kind(1)) != quiet, (options, query)

    await asyncio.gather(
        call({}, "", False),
        call({}, "?dtx=0", False),
        call({}, "?dtx=1", True),
        call({}, "?voice_prompt=NATF2.pt", True),
        call({"origins": (page,)}, "?voice_prompt=NATF2.pt", False, page),
        call({"dtx": True}, "", True),
    )


@scenario
async def test_fault_23_an_overrun_is_told_to_who_asks(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Session.astep

    async def slow(self: Session, pcm: Any, **options: Any) -> Any:
        await asyncio.sleep(0.1)
        return await step(self, pcm, **options)

    monkeypatch.setattr(Session, "astep", slow)
    pieces = written(sound.silence(1.0))

    async def call(server: Server, query: str) -> list[Any]:
        async with chatting(server, query) as caller:
            await caller.ready()
            await caller.say(pieces, 0.08)
            await caller.until(lambda: len(caller.kind(1)) > 5)
            return [json.loads(note) for note in caller.kind(6)]

    async with serving(model, keepalive_seconds=60.0) as server:
        told, untold = await asyncio.gather(call(server, "?events=1"), call(server, ""))
        assert "overrun" in {note["type"] for note in told} <= {"overrun", "lagging"}
        assert untold == []


# ---- the line ----------------------------------------------------------------------------------


@scenario
async def test_fault_17_who_waits_is_told_so_and_hears_the_model_afterwards(model: Model) -> None:
    """No mute socket: pings with the place in the line, which the clients pass over."""
    pieces = written(sound.speech("hello"))
    async with (
        serving(model, sessions=1, keepalive_seconds=0.2) as server,
        calling(server) as first,
        chatting(server) as second,
        chatting(server) as third,
    ):
        await first.ready()
        for number, caller in ((1, second), (2, third)):
            await caller.until(lambda c=caller: len(c.kind(6)) > 3)
            assert json.loads(caller.kind(6)[0]) == {"position": number}
            assert all(web_message(data) == "ping" for _, data in caller.messages)
        # what is said in the line is not heard, but its header counts
        await second.say(pieces[:4], 0.02)
        await asyncio.sleep(0.3)
        await first.socket.close()
        await second.ready()
        await second.say(pieces[4:], 0.08)
        await second.until(lambda: second.kind(1))
        assert json.loads(third.kind(6)[-1]) == {"position": 1}
        assert value(server, "moshi_ignored_messages_total") == 0
        assert value(server, "moshi_dropped_frames_total", direction="in") == 0


@scenario
async def test_fault_12_audio_before_the_handshake_is_kept(model: Model) -> None:
    """Upstream's clients do not wait for it."""
    pieces = written(sound.speech("hello"))
    async with serving(model, **PATIENT) as server, chatting(server) as caller:
        await caller.say(pieces, 0.08)
        await caller.until(lambda: len(caller.kind(1)) >= len(understood(pieces)) // FRAME)
        assert caller.messages[0][1] == b"\x00"


# ---- faults ------------------------------------------------------------------------------------


@scenario
async def test_fault_12_messages_of_every_kind_and_none_are_survived(
    model: Model,
) -> None:
    pieces = written(sound.speech("hello"))
    async with serving(model, **PATIENT) as server:
        async with chatting(server) as caller:
            await caller.ready()
            for data in (b"", b"\x00", b"\x00\x00\x00", b"\x01", b"\x03\x09", b"\x04{", b"\x06"):
                await caller.socket.send_bytes(data)
            await caller.socket.send_bytes(b"\xff" * 100)
            await caller.socket.send_str("hello")
            await caller.say(pieces, 0.08)
            await caller.until(lambda: len(caller.kind(1)) >= len(understood(pieces)) // FRAME)
            assert value(server, "moshi_ignored_messages_total") == 3
        async with chatting(server) as caller:
            with contextlib.suppress(ConnectionError):
                for _ in range(200):
                    await caller.socket.send_bytes(b"\x77")
            await caller.finished()
            assert caller.code == 1003 and b"no kind 119" in caller.kind(5)[0]


@scenario
async def test_fault_12_a_byte_at_a_time_is_the_same_sound(model: Model) -> None:
    stream = b"".join(written(sound.speech("hi")))
    frames = len(understood([stream])) // FRAME
    async with (
        serving(model, **PATIENT, messages_per_second=100_000) as server,
        chatting(server) as caller,
    ):
        await caller.ready()
        for byte in stream:
            await caller.send(bytes([byte]))
        await caller.until(lambda: len(caller.kind(1)) >= frames)
        assert value(server, "moshi_ignored_messages_total") == 0


@pytest.mark.parametrize("make", [garbage, bad_packets])
def test_fault_10_garbage_ends_one_call_with_4400(model: Model, make: Callable[[], bytes]) -> None:
    voice = sound.speech("good morning")[: 16 * FRAME]
    with Session(model, seed=1) as session:
        expected = session.run(voice).pcm

    @scenario
    async def test() -> None:
        async with serving(model, **PATIENT) as server:
            neighbour = asyncio.create_task(converse(server, voice, seed=1))
            async with chatting(server) as caller:
                await caller.ready()
                data = make()
                with contextlib.suppress(ConnectionError):
                    for start in range(0, len(data), 1000):
                        await caller.send(data[start : start + 1000])
                await caller.finished()
                assert caller.code == 4400
                assert b"without sound" in caller.kind(5)[0]
            assert (await neighbour).pcm.tobytes() == expected.tobytes()
            assert value(server, "moshi_ended_total", reason="bad_audio") == 1

    test()


@scenario
async def test_fault_10_and_11_a_damaged_stream_is_heard_on(model: Model) -> None:
    """Pages lost, doubled, cut short, packets that are noise: the call goes on."""
    rng = np.random.default_rng(4)
    pieces = written(question())
    damaged = []
    for number, piece in enumerate(pieces):
        if number % 7 == 3:
            continue
        if number % 7 == 5:
            piece = piece[: len(piece) // 2]
        if number % 11 == 6:
            piece = piece[:-20] + rng.bytes(20)
        damaged.append(piece)
    async with serving(model) as server, chatting(server) as caller:
        await caller.ready()
        await caller.say(damaged, 0.08)
        assert not caller.over and not caller.kind(5)
        assert len(caller.kind(1)) > len(pieces) // 2


@scenario
async def test_fault_11_few_bytes_that_hold_hours_are_refused(model: Model) -> None:
    """Packets of 120 ms in three bytes each."""
    head = ogg.join(ogg.pages(written(sound.silence(0.08))[0])[:2])
    packet = bytes([0xFB, 0x06, 0xFF])
    pages = [ogg.page([packet] * 250, 2 + i) for i in range(20)]
    async with serving(model) as server, chatting(server) as caller:
        await caller.ready()
        with contextlib.suppress(ConnectionError):
            await caller.send(head + ogg.join(pages))
        await caller.finished()
        assert caller.code == 4400


@scenario
async def test_fault_16_a_reset_over_opus_frees_the_slot(model: Model) -> None:
    pieces = written(sound.speech("hello"))
    async with serving(model, sessions=1) as server:
        for stage in ("upgraded", "header", "frames"):
            async with chatting(server) as caller:
                if stage == "header":
                    await caller.send(pieces[0][:40])
                if stage == "frames":
                    await caller.say(pieces, 0.02)
                    await caller.until(lambda c=caller: c.kind(1))
                reset(caller)
                await eventually(lambda: server._admission.busy == 0, 20)


def test_the_streams_of_the_pages_are_what_they_are_said_to_be() -> None:
    pieces = page_pieces(question())
    assert pieces[0].startswith(b"OggS") and b"OpusTags" in pieces[0]
    assert all(len(ogg.pages(piece)[0].packets) == 2 for piece in pieces[1:-1])
