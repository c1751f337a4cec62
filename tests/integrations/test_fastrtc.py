"""MoshiHandler, called as FastRTC's streams call it: over a websocket, and as a WebRTC track."""

from __future__ import annotations

import asyncio
import audioop
import base64
import fractions
import importlib.util
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import calls
import numpy as np
import pytest
from aiortc import MediaStreamTrack
from aiortc.mediastreams import MediaStreamError
from fastapi import FastAPI
from fastapi.testclient import TestClient
from fastrtc import AdditionalOutputs, CloseStream
from fastrtc.tracks import AudioCallback
from fastrtc.utils import Context
from numpy.typing import NDArray

import moshi_c
from moshi_c.integrations.fastrtc import MoshiHandler


class Call:
    """One connection's copy of a handler, driven by a test."""

    def __init__(self, model: moshi_c.Model | None, **options: Any) -> None:
        self.handler = MoshiHandler(model, seed=calls.SEED, **options).copy()
        self.voice: list[NDArray[np.int16]] = []
        self.facts: list[dict[str, Any]] = []
        self.closed: str | None = None

    async def __aenter__(self) -> Call:
        self.task = asyncio.create_task(self.handler.start_up())
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.handler.shutdown()

    async def hear(self, pcm: NDArray[np.int16], rate: int = calls.RATE) -> None:
        step = rate // 50
        for i in range(0, len(pcm), step):
            await self.handler.receive((rate, pcm[None, i : i + step]))

    async def until(self, done: Callable[[], bool]) -> None:
        """Takes what is emitted."""
        while not done():
            output = await asyncio.wait_for(self.handler.emit(), 60)
            if isinstance(output, AdditionalOutputs):
                self.facts += output.args
            elif isinstance(output, CloseStream):
                self.closed = output.msg
            else:
                assert output[0] == calls.RATE and output[1].dtype == np.int16
                self.voice.append(output[1][0])

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [facts for facts in self.facts if facts["type"] == kind]

    def replied(self) -> bool:
        return bool(self.of("reply"))


@pytest.mark.parametrize("rate", [16000, 24000, 48000])
def test_a_question_in_a_wav_file_is_answered_in_another(
    model: moshi_c.Model, tmp_path: Path, rate: int
) -> None:
    async def call() -> Call:
        async with Call(model) as made:
            await made.hear(*calls.read(calls.write(tmp_path / "in.wav", calls.question(), rate)))
            await made.until(made.replied)
        return made

    made = asyncio.run(call())
    assert "".join(facts["text"] for facts in made.of("text")).strip() == calls.ANSWER
    (reply,) = made.of("reply")
    assert reply["text"] == calls.ANSWER and 0.5 < reply["seconds"] < 4
    assert reply["latency"] == pytest.approx(0.4, abs=0.3)
    assert reply["output_tokens"] == reply["input_tokens"] // 8 * 9 > 0
    turns = [(facts["who"], facts["speaking"]) for facts in made.of("speaking")]
    assert sorted(turns) == [("model", False), ("model", True), ("user", False), ("user", True)]
    voice = np.concatenate(made.voice).astype(np.float32) / 32768
    spoken, _ = calls.read(calls.write(tmp_path / "out.wav", voice))
    loud = np.flatnonzero(np.abs(spoken) > 1000) / calls.RATE
    assert reply["start"] <= loud[0] < reply["start"] + 0.8


def test_the_voice_is_bit_for_bit_the_session_s(model: moshi_c.Model, tmp_path: Path) -> None:
    pcm, _ = calls.read(calls.write(tmp_path / "in.wav", calls.question()))

    async def call() -> Call:
        async with Call(model, silence_after=None) as made:
            await made.hear(pcm)
            await made.until(lambda: len(made.voice) == len(pcm) // calls.FRAME)
        return made

    assert np.array_equal(np.concatenate(asyncio.run(call()).voice), calls.alone(model, pcm)[0])


@pytest.mark.parametrize("running", [False, True])
def test_text_that_is_set_as_input_is_spoken(model: moshi_c.Model, running: bool) -> None:
    async def call() -> Call:
        async with Call(model) as made:
            if running:  # as a page's own thread does
                await made.hear(np.zeros(calls.RATE, np.int16))
                await made.until(lambda: len(made.voice) > 2)
                await asyncio.to_thread(made.handler.set_args, ["my name is anna"])
            else:
                made.handler.set_args(["my name is anna"])
            await made.until(made.replied)  # without any sound: the model speaks first
        return made

    made = asyncio.run(call())
    assert made.of("reply")[0]["text"] == "my name is anna"
    assert np.abs(np.concatenate(made.voice)).max() > 3000


def test_shutdown_frees_the_slot_and_late_sound_is_ignored(single: moshi_c.Model) -> None:
    async def call() -> None:
        async with Call(single) as made:
            await made.hear(np.zeros(calls.RATE, np.int16))
            await made.until(lambda: len(made.voice) > 2)
            assert not calls.is_free(single)
        assert calls.is_free(single) and made.task.done()
        await made.hear(np.zeros(calls.RATE, np.int16))
        assert made.handler.stats is None

    asyncio.run(call())


def test_a_full_model_closes_the_stream_with_a_sentence(single: moshi_c.Model) -> None:
    async def call() -> Call:
        with moshi_c.Session(single):
            async with Call(single) as made:
                await made.until(lambda: made.closed is not None)
        return made

    made = asyncio.run(call())
    assert made.closed and made.of("error") == [{"type": "error", "error": made.closed}]
    assert "session" in made.closed


def test_two_calls_share_a_model_and_an_event_loop(model: moshi_c.Model) -> None:
    pcm = (32767 * calls.question()).astype(np.int16)

    async def one() -> Call:
        async with Call(model) as made:
            await made.hear(pcm)
            await made.until(made.replied)
        return made

    async def both() -> tuple[list[Call], int]:
        async with calls.Ticks() as ticks:
            return await asyncio.gather(one(), one()), ticks.count

    made, ticks = asyncio.run(both())
    assert [call.of("reply")[0]["text"] for call in made] == [calls.ANSWER] * 2
    assert ticks > len(made[0].voice) // 2  # the loop came around meanwhile


def example() -> ModuleType:
    path = Path(__file__).parent.parent.parent / "examples" / "fastrtc_page.py"
    spec = importlib.util.spec_from_file_location("fastrtc_page", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_s_page_shows_what_is_said() -> None:
    facts = [
        {"type": "speaking", "who": "model", "speaking": True, "time": 0.0},
        {"type": "text", "text": " hello", "time": 0.0},
        {"type": "reply", "text": "hello"},
    ]
    shown = ""
    for each in facts:
        shown = example().show(shown, each)
    assert shown == " hello\n"


def test_the_example_holds_a_websocket_s_call_and_frees_the_slot_when_it_closes(
    single: moshi_c.Model,
) -> None:
    app = FastAPI()
    example().page(single).mount(app)
    pcm = (32767 * calls.question()).astype("<i2")
    voice = bytearray()
    with TestClient(app) as client:
        with client.websocket_connect("/websocket/offer") as socket:
            socket.send_json({"event": "start", "websocket_id": "one"})
            for i in range(0, len(pcm), 480):
                payload = audioop.lin2ulaw(pcm[i : i + 480].tobytes(), 2)
                media = {"payload": base64.b64encode(payload).decode()}
                socket.send_json({"event": "media", "media": media})
            while len(voice) < len(pcm):
                message = socket.receive_json()
                if message["event"] == "media":
                    voice += base64.b64decode(message["media"]["payload"])
            assert not calls.is_free(single)
        freed = threading.Event()
        for _ in range(600):
            if calls.is_free(single):
                break
            freed.wait(0.1)
        assert calls.is_free(single)
    samples = np.frombuffer(audioop.ulaw2lin(bytes(voice), 2), "<i2")
    assert np.abs(samples).max() > 3000


class Microphone(MediaStreamTrack):
    """A WAV file as WebRTC gives it: 20 ms of stereo at 48 kHz, faster than its time."""

    kind = "audio"

    def __init__(self, pcm: NDArray[np.int16]) -> None:
        super().__init__()
        self._pcm, self._at = pcm, 0

    async def recv(self) -> av.AudioFrame:
        await asyncio.sleep(0)
        piece = self._pcm[self._at : self._at + 960]
        if len(piece) < 960:
            raise MediaStreamError
        frame = av.AudioFrame.from_ndarray(np.repeat(piece, 2)[None], "s16", "stereo")
        frame.sample_rate, frame.pts = 48000, self._at
        frame.time_base = fractions.Fraction(1, 48000)
        self._at += 960
        return frame


class Channel:
    """The data channel of a connection."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def send(self, message: str) -> None:
        self.messages.append(json.loads(message))


def test_a_webrtc_track_plays_the_answer(model: moshi_c.Model, tmp_path: Path) -> None:
    path = calls.write(tmp_path / "in.wav", calls.question(after=1.0), 48000)

    async def call() -> tuple[NDArray[np.int16], list[dict[str, Any]]]:
        handler = MoshiHandler(model, seed=calls.SEED).copy()
        facts: list[dict[str, Any]] = []
        track = AudioCallback(
            Microphone(calls.read(path)[0]),
            handler,
            Context("one"),
            set_additional_outputs=lambda outputs: facts.extend(outputs.args),
        )
        track.set_channel(Channel())
        played = [np.zeros(1, np.int16)]
        # The track plays in real time, what is told of it comes before.
        while not facts or facts[-1]["type"] != "reply" or np.abs(played[-1]).max() < 3000:
            frame = await asyncio.wait_for(track.recv(), 60)
            assert frame.sample_rate == calls.RATE
            played.append(frame.to_ndarray()[0, ::2])
        track.stop()
        await handler.shutdown()
        return np.concatenate(played), facts

    played, facts = asyncio.run(call())
    assert [each["text"] for each in facts if each["type"] == "reply"] == [calls.ANSWER]
    assert len(played) > calls.RATE
