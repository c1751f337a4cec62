"""`moshi-c serve`: what callers get, and what a server has to survive. Fault numbers are those of
the project's list of faults."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import callers
import numpy as np
import pytest
from callers import (
    FRAME,
    PATIENT,
    UPGRADE,
    Caller,
    all_over,
    calling,
    connected,
    converse,
    eventually,
    get,
    raw,
    reset,
    scenario,
    serving,
    value,
)
from test_api import sound

import moshi_c
from moshi_c import Model, Session, SessionError
from moshi_c.server import Server, Settings
from moshi_c.server import call as call_module
from moshi_c.server.listener import neighbourhood

pytestmark = pytest.mark.python


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with moshi_c.load(max_sessions=8) as model:
        yield model


@pytest.fixture(scope="module")
def pcm() -> np.ndarray:
    return sound(25.3)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the server has logged."""
    caplog.set_level(logging.INFO, logger="moshi_c.server")
    return lambda: [record.getMessage() for record in caplog.records]


# ---- what a caller gets ------------------------------------------------------------------------


@scenario
async def test_a_file_gives_what_run_gives_bit_for_bit(model: Model, pcm: np.ndarray) -> None:
    with Session(model, seed=5) as session:
        expected = session.run(pcm)
    async with serving(model) as server:
        caller = await converse(server, pcm, float("inf"), live=0, seed=5)
    assert caller.code == 1000
    assert caller.pcm.tobytes() == expected.pcm.tobytes()
    assert caller.text == expected.text
    assert caller.kinds("ready")[0]["seed"] == 5


@scenario
async def test_a_live_call_gives_what_run_gives_bit_for_bit(model: Model, pcm: np.ndarray) -> None:
    with Session(model, seed=6) as session:
        expected = session.run(pcm)
    async with serving(model, **PATIENT) as server:
        callers = await asyncio.gather(*[converse(server, pcm, seed=6) for _ in range(8)])
        for caller in callers:
            assert caller.pcm.tobytes() == expected.pcm.tobytes()
            assert caller.text == expected.text
        assert value(server, "moshi_silence_steps_total") == 0
        assert value(server, "moshi_dropped_frames_total", direction="in") == 0


@scenario
async def test_fault_8_any_cut_of_the_samples_gives_the_same(model: Model, pcm: np.ndarray) -> None:
    pcm = pcm[: 3 * FRAME + 5]
    with Session(model, seed=1) as session:
        expected = session.run(pcm).pcm.tobytes()
    data = pcm.tobytes()
    async with serving(model, messages_per_second=100_000) as server:
        for size in (1, 3, 1919 * 4 + 2, len(data)):
            async with calling(server, live=0, seed=1) as caller:
                for start in range(0, len(data), size):
                    await caller.socket.send_bytes(data[start : start + size])
                await caller.end()
                await caller.finished()
                assert caller.pcm.tobytes() == expected, size


@scenario
async def test_other_formats_and_rates_are_what_run_gives(model: Model) -> None:
    voice = sound(12.4)
    ints = np.rint(voice * 32767).astype("<i2")
    with Session(model, seed=2) as session:
        expected = session.run(ints).pcm
    async with serving(model) as server:
        async with calling(server, live=0, seed=2, format="s16") as caller:
            await caller.socket.send_bytes(ints.tobytes())
            await caller.end()
            await caller.finished()
            heard = np.frombuffer(b"".join(map(bytes, caller.heard)), "<i2")
            assert np.abs(heard / 32768 - np.clip(expected, -1, 32767 / 32768)).max() < 1 / 60000
        low = voice[::3].copy()
        with Session(model, seed=2, sample_rate=8000, output_sample_rate=8000) as session:
            expected = session.run(low).pcm
        caller = await converse(server, low, float("inf"), live=0, seed=2, rate=8000)
        assert caller.pcm.tobytes() == expected.tobytes()


@scenario
async def test_options_of_the_url_are_the_session_s(model: Model, pcm: np.ndarray) -> None:
    with Session(model, seed=3, text_temperature=0.0, audio_temperature=0.0) as session:
        expected = session.run(pcm).pcm
    async with serving(model) as server:
        options = {"text_temperature": "0", "audio_temperature": "0.0", "pad_mult": "0"}
        caller = await converse(server, pcm, float("inf"), live=0, text_seed=3, **options)
        assert caller.pcm.tobytes() == expected.tobytes()
        async with serving(model, seed=9) as seeded:
            for query, seed in (({}, 9), ({"seed": "-1"}, 9), ({"seed": "4"}, 4)):
                async with calling(seeded, **query) as caller:
                    assert (await caller.ready())["seed"] == seed
        for name, text in (
            ("seed", "-2"),
            ("seed", "x"),
            ("text_temperature", "nan"),
            ("audio_temperature", "-1"),
            ("audio_topk", "1e3"),
            ("format", "mp3"),
            ("rate", "44101"),
            ("rate", "10**9"),
            ("live", "yes"),
        ):
            status, body, _ = await get(server, "/ws/pcm", params={name: text})
            assert status == 400 and name.split("_")[0] in body, (name, text, body)


# ---- pages -------------------------------------------------------------------------------------


@scenario
async def test_the_pages_say_what_they_promise(model: Model) -> None:
    async with serving(model, sessions=3) as server:
        async with calling(server) as caller:
            await caller.ready()
            status, text, headers = await get(server, "/")
            assert status == 200 and "<html" in text
            policy = headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
            assert headers["X-Content-Type-Options"] == "nosniff"
            async with (
                aiohttp.ClientSession() as client,
                client.get(server.url + "/api/info") as response,
            ):
                info = await response.json()
            assert (info["sessions"], info["busy"], info["waiting"]) == (3, 1, 0)
            assert info["family"] == "moshi" and info["frame_size"] == FRAME
            assert info["token"] is False and "text_temperature" in info["defaults"]
            assert (await get(server, "/health"))[0] == 200
            status, text, _ = await get(server, "/ready")
            assert status == 200 and '"busy": 1' in text
            await caller.say(sound(4), float("inf"))
            await caller.until(lambda: len(caller.heard) >= 4)
            status, text, _ = await get(server, "/metrics")
            assert status == 200
            for name in (
                'moshi_connect_total{protocol="/ws/pcm"} 1.0',
                "moshi_open_channels 1.0",
                "moshi_waiting 0.0",
                "moshi_total_steps_total 4.0",
                "moshi_model_step_duration_bucket",
                "moshi_late_frames_total",
            ):
                assert name in text, name
        assert (await get(server, "/ws/pcm"))[0] == 426


@scenario
async def test_what_is_not_there_is_refused_as_everything_else_is(model: Model) -> None:
    async with serving(model) as server, aiohttp.ClientSession() as client:
        async with client.get(f"{server.url}/nowhere") as response:
            assert response.status == 404
            assert await response.json() == {"error": "path", "reason": "there is no '/nowhere'"}
            assert response.headers["X-Content-Type-Options"] == "nosniff"
        async with client.delete(f"{server.url}/health") as response:
            assert response.status == 405 and response.headers["Allow"] == "GET, HEAD"
            reason = "the method is DELETE; expected GET or HEAD"
            assert await response.json() == {"error": "method", "reason": reason}
        for label in ("path", "method"):
            assert value(server, "moshi_refused_total", reason=label) == 1


@scenario
async def test_the_page_s_folder_is_all_that_can_be_read(model: Model) -> None:
    async with serving(model) as server:
        for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/page//etc/passwd", "/page/", "/x"):
            assert (await get(server, path))[0] == 404, path
        reader, writer = await raw(
            server.port, b"GET /page/../app.py HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        )
        assert b" 404 " in await reader.readline()
        writer.close()


# ---- messages ----------------------------------------------------------------------------------


@scenario
async def test_fault_7_samples_that_are_not_finite_are_silence(
    model: Model, lines: Callable[[], list[str]]
) -> None:
    voice = sound(6)
    voice[100:200] = np.nan
    voice[5000] = np.inf
    voice[6000] = -3e38
    clean = np.clip(np.where(np.isfinite(voice), voice, 0), -100, 100).astype(np.float32)
    with Session(model, seed=1) as session:
        expected = session.run(clean).pcm
    async with serving(model) as server:
        caller = await converse(server, voice, float("inf"), live=0, seed=1)
        assert caller.pcm.tobytes() == expected.tobytes()
        assert value(server, "moshi_bad_samples_total") == 101
        await eventually(lambda: any("101 samples not finite" in line for line in lines()))


@scenario
async def test_fault_12_messages_without_meaning_are_ignored_up_to_a_number(
    model: Model, lines: Callable[[], list[str]]
) -> None:
    voice = sound(4)
    with Session(model, seed=1) as session:
        expected = session.run(voice).pcm
    async with serving(model, messages_per_second=100_000) as server:
        async with calling(server, live=0, seed=1) as caller:
            for text in ("", "hello", "[]", "{}", '{"type": 7}', '{"type": "x"}', "[" * 9000):
                await caller.socket.send_str(text)
            await caller.socket.send_bytes(b"")
            await caller.send(voice)
            await caller.end()
            await caller.finished()
            assert caller.code == 1000
            assert caller.pcm.tobytes() == expected.tobytes()
        async with calling(server) as caller:
            with contextlib.suppress(ConnectionError):
                for _ in range(200):
                    await caller.socket.send_str("hello")
            await caller.finished()
            assert caller.code == 1003
            assert "100 messages" in caller.kinds("error")[0]["reason"]
        await eventually(lambda: sum("ended: " in line for line in lines()) == 2)


@scenario
async def test_fault_12_a_message_too_large_ends_the_call_with_1009(
    model: Model, lines: Callable[[], list[str]]
) -> None:
    async with serving(model, message_bytes=1 << 16) as server:
        async with calling(server) as caller:
            await caller.ready()
            with contextlib.suppress(ConnectionError):
                await caller.socket.send_bytes(bytes(1 << 20))
            await caller.finished()
            assert caller.code == 1009
        # in fragments, of which none is large
        reader, writer = await raw(server.port, UPGRADE % b"/ws/pcm")
        await reader.readuntil(b"\r\n\r\n")
        piece = bytes([0x00, 0x80 | 126, 0x40, 0x00]) + bytes(4) + bytes(0x4000)
        with contextlib.suppress(ConnectionError):
            writer.write(bytes([0x02]) + piece[1:])
            for _ in range(10):
                writer.write(piece)
                await writer.drain()
        with contextlib.suppress(ConnectionError):
            assert b"\x03\xf1" in await reader.read()  # 1009
        writer.close()
        await eventually(lambda: sum("more than 65536 bytes" in line for line in lines()) == 2)
        assert server._admission.busy == 0


@scenario
async def test_fault_12_a_flood_of_messages_is_read_slowly_and_hurts_nobody(model: Model) -> None:
    voice = sound(20)
    with Session(model, seed=1) as session:
        expected = session.run(voice).pcm
    async with serving(model, **PATIENT) as server:
        reader, writer = await raw(server.port, UPGRADE % b"/ws/pcm")
        await reader.readuntil(b"\r\n\r\n")
        pong = bytes([0x8A, 0x80, 0, 0, 0, 0])
        empty = bytes([0x82, 0x80, 0, 0, 0, 0])

        async def flood() -> None:
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write((empty + pong) * 2000)
                    await writer.drain()
                    await asyncio.sleep(0)

        flooding = asyncio.create_task(flood())
        caller = await converse(server, voice, seed=1)
        flooding.cancel()
        assert caller.pcm.tobytes() == expected.tobytes()
        writer.close()


# ---- time --------------------------------------------------------------------------------------


@scenario
async def test_fault_13_ten_times_too_fast_is_answered_in_real_time(model: Model) -> None:
    async with serving(model) as server, calling(server) as caller:
        await caller.ready()
        begin = time.monotonic()
        await caller.say(sound(400), 10.0)
        seconds = time.monotonic() - begin
        assert len(caller.heard) <= seconds * 12.5 * 1.02 + 8
        assert caller.kinds("lagging")
        assert value(server, "moshi_dropped_frames_total", direction="in") > 100
        assert value(server, "moshi_silence_steps_total") == 0


@scenario
async def test_fault_14_a_stalled_caller_still_hears_the_model(
    model: Model, lines: Callable[[], list[str]]
) -> None:
    async with serving(model, idle_seconds=2.0) as server:
        async with calling(server) as caller:
            await caller.ready()
            await caller.say(sound(5))
            await caller.until(lambda: len(caller.heard) > 15)
            await caller.say(sound(5))  # and it is taken up again
            await caller.finished()
            assert caller.code == 4408
            assert caller.kinds("error")[0]["reason"] == "no sound came for 2 s"
        assert value(server, "moshi_silence_steps_total") > 15
        assert value(server, "moshi_dropped_frames_total", direction="in") == 0
        assert value(server, "moshi_ended_total", reason="idle") == 1
        assert re.search(r"no sound came for 2 s \(.* of silence for late input\)", lines()[-1])


@scenario
async def test_fault_14_who_says_nothing_at_all_is_hung_up_on(model: Model) -> None:
    async with serving(model, idle_seconds=0.5) as server, calling(server) as caller:
        await caller.finished()
        assert caller.code == 4408
        assert value(server, "moshi_total_steps_total") == 0


@scenario
async def test_a_call_ends_when_its_time_is_up(model: Model) -> None:
    async with serving(model, max_seconds=1.0) as server, calling(server) as caller:
        with contextlib.suppress(ConnectionError):
            await caller.say(sound(50))
        await caller.finished()
        assert caller.code == 1000
        assert "1 s, the most here" in caller.kinds("error")[0]["reason"]


@scenario
async def test_fault_15_a_slow_reader_loses_sound_and_is_hung_up_on(
    model: Model, lines: Callable[[], list[str]]
) -> None:
    async with serving(model, slow_seconds=2.0, backlog_seconds=0.5) as server:
        reader, writer = await raw(server.port, UPGRADE % b"/ws/pcm")
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.pause_reading()
        writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        other = asyncio.create_task(converse(server, sound(60), seed=1))

        async def talk() -> None:
            frame = bytes([0x82, 0x80 | 126]) + (FRAME * 4).to_bytes(2, "big") + bytes(4)
            with contextlib.suppress(ConnectionError):
                while not writer.transport.is_closing():
                    writer.write(frame + bytes(FRAME * 4))
                    await asyncio.sleep(0.08)

        talking = asyncio.create_task(talk())
        await eventually(lambda: any("nothing was read for 2 s" in line for line in lines()))
        talking.cancel()
        assert value(server, "moshi_dropped_frames_total", direction="out") > 5
        assert "of output dropped" in next(line for line in lines() if "nothing was read" in line)
        assert len((await other).pcm) == 61 * FRAME
        writer.close()


@scenario
async def test_a_reader_of_a_file_may_be_slow(model: Model) -> None:
    """It holds the steps back, and loses nothing."""
    voice = sound(150)
    with Session(model, seed=1) as session:
        expected = session.run(voice).pcm
    async with (
        serving(model, slow_seconds=20.0) as server,
        calling(server, live=0, seed=1) as caller,
    ):
        await caller.ready()
        transport = caller.socket._response.connection.transport
        transport.pause_reading()
        saying = asyncio.create_task(caller.say(voice, float("inf")))
        await eventually(lambda: value(server, "moshi_total_steps_total") > 10)
        await asyncio.sleep(1)
        assert value(server, "moshi_total_steps_total") < 150
        transport.resume_reading()
        await saying
        await caller.end()
        await caller.finished()
        assert caller.pcm.tobytes() == expected.tobytes()


@scenario
async def test_fault_20_a_full_context_ends_no_call() -> None:
    with moshi_c.load(context=30, max_sessions=1) as model:
        voice = sound(100)
        with Session(model, seed=1) as session:
            expected = session.run(voice).pcm
        async with serving(model) as server:
            caller = await converse(server, voice, float("inf"), live=0, seed=1)
            assert caller.code == 1000
            assert caller.pcm.tobytes() == expected.tobytes()


@scenario
async def test_fault_23_late_answers_are_counted_and_no_lag_grows(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Session.astep

    async def slow(self: Session, pcm: Any, **options: Any) -> Any:
        await asyncio.sleep(0.12)
        return await step(self, pcm, **options)

    monkeypatch.setattr(Session, "astep", slow)
    async with serving(model, backlog_seconds=0.5) as server, calling(server) as caller:
        await caller.ready()
        await caller.say(sound(40))
        assert value(server, "moshi_late_frames_total") > 10
        assert value(server, "moshi_dropped_frames_total", direction="in") > 5
        assert value(server, "moshi_silence_steps_total") == 0
        assert caller.kinds("lagging")
        told = [note["late"] for note in caller.kinds("overrun")]
        late = value(server, "moshi_late_frames_total")
        assert 1 <= len(told) < late / 4 and told == sorted(set(told)) and told[-1] <= late
        # by the names of vLLM-Omni's load driver
        await caller.socket.close()
        await all_over(server)
        intervals = value(server, "moshi_client_audio_packet_interval_ms_sum")
        assert intervals > 110 * value(server, "moshi_client_audio_packet_interval_ms_count") > 0
        assert value(server, "moshi_client_first_audio_after_stream_start_ms_sum") > 110
        assert value(server, "moshi_client_send_lateness_ms_count") == 40
        assert value(server, "moshi_client_stream_rtf_sum") > 1.25
        assert value(server, "moshi_frame_deficit_total") > 5
        assert 0 < value(server, "moshi_frame_coverage_ratio_sum") < 0.9
        assert value(server, "moshi_audio_underrun_s_total") > 0.1
        assert value(server, "moshi_audio_underrun_event_count_total") > 0


@scenario
async def test_fault_25_a_change_of_the_time_of_day_does_not_matter(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    voice = sound(15)
    with Session(model, seed=1) as session:
        expected = session.run(voice).pcm
    now = time.time
    jumps = iter(range(10**9))
    async with serving(model, **PATIENT) as server:
        monkeypatch.setattr(time, "time", lambda: now() + 1e6 * (-1) ** next(jumps))
        caller = await converse(server, voice, seed=1)
        assert caller.pcm.tobytes() == expected.tobytes()
        assert value(server, "moshi_silence_steps_total") == 0


# ---- who goes away -----------------------------------------------------------------------------


async def freed(server: Server) -> None:
    """The promise is a second, on a machine that is not busy with other things; no ping and no idle
    time would do it within these ten."""
    await eventually(lambda: server._admission.busy == 0, 10.0)


@scenario
async def test_fault_16_a_reset_at_any_stage_frees_the_slot(
    model: Model, lines: Callable[[], list[str]]
) -> None:
    async with serving(model, sessions=1) as server:
        # before and in the middle of the request, and of the upgrade
        for text in (b"", b"GET /ws/pcm HT", (UPGRADE % b"/ws/pcm")[:-2], UPGRADE % b"/ws/pcm"):
            _, writer = await raw(server.port, text)
            callers.reset_socket(writer.transport.get_extra_info("socket"))
            writer.transport.abort()
        await freed(server)
        for stage in ("upgraded", "ready", "frames", "stalled", "half a message", "end"):
            async with calling(server) as caller:
                if stage != "upgraded":
                    await caller.ready()
                if stage in ("frames", "stalled", "end"):
                    await caller.say(sound(5))
                if stage == "stalled":
                    await caller.until(lambda: len(caller.heard) > 7)
                if stage == "half a message":
                    connection = caller.socket._response.connection
                    connection.transport.write(bytes([0x82, 0x80 | 126, 0x40]))
                if stage == "end":
                    await caller.end()
                reset(caller)
                await freed(server)
        # the next caller is served
        assert (await converse(server, sound(2), float("inf"), live=0)).code == 1000
        await all_over(server)
        assert model.memory.used < model.memory.session * 2
        ended = [line for line in lines() if " ended: " in line]
        assert len(ended) in (7, 8)
        assert all(re.search(r"connection was lost|input has ended", line) for line in ended)


@scenario
async def test_fault_16_a_reset_in_the_line_gives_up_the_place(model: Model) -> None:
    async with serving(model, sessions=1, queue=2) as server, calling(server) as first:
        await first.ready()
        async with calling(server) as second, calling(server) as third:
            await third.until(lambda: third.kinds("waiting"))
            assert third.kinds("waiting")[0]["position"] == 2
            reset(second)
            await third.until(lambda: third.kinds("waiting")[-1]["position"] == 1)
            await first.socket.close()
            await third.ready()


@scenario
async def test_fault_16_a_half_open_connection_is_found_out(
    model: Model, monkeypatch: pytest.MonkeyPatch, lines: Callable[[], list[str]]
) -> None:
    from moshi_c.server import app

    monkeypatch.setattr(app, "_HEARTBEAT", 0.5)
    monkeypatch.setattr(app, "_FIRST_REQUEST", 0.5)
    async with serving(model) as server:
        # upgraded, then deaf and mute
        reader, writer = await raw(server.port, UPGRADE % b"/ws/pcm")
        await reader.readuntil(b"\r\n\r\n")
        # connected, without a word
        mute, other = await raw(server.port, b"")
        half, third = await raw(server.port, b"GET / HTTP/1.1\r\nHo")
        assert await mute.read() == b"" and await half.read() == b""
        await eventually(lambda: any("did not answer a ping" in line for line in lines()))
        assert server._admission.busy == 0
        for each in (writer, other, third):
            each.close()


@scenario
async def test_a_model_error_ends_one_call_and_no_other(
    model: Model, monkeypatch: pytest.MonkeyPatch, lines: Callable[[], list[str]]
) -> None:
    voice = sound(20)
    with Session(model, seed=1) as session:
        expected = session.run(voice).pcm
    step = Session.astep

    async def failing(self: Session, pcm: Any, **options: Any) -> Any:
        if self.seed == 666 and self.stats.frames == 5:
            raise SessionError("the model's weights give no numbers")
        if self.seed == 667:
            raise ZeroDivisionError
        return await step(self, pcm, **options)

    monkeypatch.setattr(Session, "astep", failing)
    async with serving(model, **PATIENT) as server:
        good, *bad = await asyncio.gather(
            converse(server, voice, seed=1),
            *[unlucky(server, voice, seed) for seed in (666, 667)],
        )
        assert good.pcm.tobytes() == expected.tobytes()
        assert [caller.code for caller in bad] == [1011, 1011]
        assert bad[0].kinds("error")[0]["reason"] == "the model's weights give no numbers"
        assert "server's own" in bad[1].kinds("error")[0]["reason"]
        assert server._admission.busy == 0
    assert sum(" ended: " in line for line in lines()) == 3


async def unlucky(server: Server, voice: np.ndarray, seed: int) -> Caller:
    async with calling(server, seed=seed) as caller:
        await caller.ready()
        with contextlib.suppress(ConnectionError):
            await caller.say(voice)
        await caller.finished()
        return caller


# ---- who is let in -----------------------------------------------------------------------------


@scenario
async def test_fault_17_a_full_house_has_a_line_and_then_refuses_at_once(model: Model) -> None:
    async with serving(model, sessions=2, queue=1) as server:
        async with calling(server) as a, calling(server) as b:
            await a.ready()
            await b.ready()
            async with calling(server) as waiting:
                await waiting.until(lambda: waiting.kinds("waiting"))
                assert waiting.kinds("waiting") == [{"type": "waiting", "position": 1}]
                status, text, headers = await get(
                    server,
                    "/ws/pcm",
                    headers={
                        "Upgrade": "websocket",
                        "Connection": "Upgrade",
                        "Sec-WebSocket-Version": "13",
                        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
                    },
                )
                assert status == 503 and int(headers["Retry-After"]) > 0
                assert "2 sessions and 1 places" in text
                assert (await get(server, "/ready"))[0] == 503
                assert not waiting.kinds("ready")
                await a.socket.close()
                await waiting.ready()
                await waiting.say(sound(3), float("inf"))
                await waiting.until(lambda: len(waiting.heard) == 3)
        assert value(server, "moshi_refused_total", reason="full") == 1


@scenario
async def test_a_slot_that_others_took_is_refused_with_a_reason(model: Model) -> None:
    async with serving(model) as server:
        with contextlib.ExitStack() as stack:
            for _ in range(8):
                stack.enter_context(Session(model))
            async with calling(server) as caller:
                await caller.finished()
                assert caller.code == 1013
                assert "sessions of this model are open" in caller.kinds("error")[0]["reason"]


@scenario
async def test_fault_18_a_token_is_asked_for_before_the_upgrade(
    model: Model, lines: Callable[[], list[str]]
) -> None:
    token = "täglich-frisch"
    async with serving(model, token=token) as server:
        for headers, query in (
            ({}, {}),
            ({"Authorization": "Bearer wrong"}, {}),
            ({"Authorization": f"Basic {token}"}, {}),
            ({}, {"token": "wrong"}),
            ({"Authorization": "Bearer \xff\xfe"}, {"token": "wrong"}),
        ):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                async with calling(server, headers=headers, **query):
                    pass
            assert refused.value.status == 401, (headers, query)
            assert (await get(server, "/metrics", headers=headers, params=query))[0] == 401
        for query in ({"token": token},):
            async with calling(server, **query) as caller:
                await caller.ready()
        ascii_token = "correct-horse"
        assert (await get(server, "/api/info"))[0] == 200
        assert '"token": true' in (await get(server, "/api/info"))[1]
        for text in (b"GET /?token=%s HTTP/9.9\r\n\r\n", b"GET /?token=%s\r\n\x00\r\n\r\n"):
            reader, writer = await raw(server.port, text % token.encode())
            await reader.read()
            writer.close()
    async with serving(model, token=ascii_token) as server:
        async with calling(server, headers={"Authorization": f"Bearer {ascii_token}"}) as caller:
            await caller.ready()
        assert (await get(server, "/metrics", params={"token": ascii_token}))[0] == 200
    assert lines() and not any(token in line or ascii_token in line for line in lines())


@scenario
async def test_fault_18_pages_of_other_hosts_may_not_connect(model: Model) -> None:
    async with serving(model, origins=("https://friend.example",)) as server:
        own, local = f"127.0.0.1:{server.port}", f"localhost:{server.port}"
        for headers, expected in (
            ({"Origin": "http://evil.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Origin": "null", "Host": ""}, 403),
            ({"Origin": f"http://127.0.0.1:{server.port + 1}"}, 403),
            # a name of theirs that leads here
            ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
            ({"Host": "evil.example"}, 403),
            ({"Origin": f"http://{own}"}, 101),
            ({"Host": local, "Origin": f"http://{local}"}, 101),
            ({"Origin": "https://friend.example"}, 101),
            ({"Host": "friend.example", "Origin": "https://friend.example"}, 101),
            ({}, 101),
        ):
            try:
                async with calling(server, headers=headers) as caller:
                    await caller.ready()
                    status = 101
            except aiohttp.WSServerHandshakeError as error:
                status = error.status
            assert status == expected, headers


def test_fault_18_no_host_that_others_reach_without_a_token() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org", ""):
        with pytest.raises(ValueError, match="there is no token"):
            Settings(host=host)
        assert Settings(host=host, token="long enough")
        assert Settings(host=host, insecure=True)
    for host in ("127.0.0.1", "127.3.2.1", "localhost", "::1"):
        assert Settings(host=host)
    with pytest.raises(ValueError, match="8 or more"):
        Settings(token="short")
    for origin in ("example.org", "null", "https://", "", "*", "ftp://example.org", "http://a/b"):
        with pytest.raises(ValueError, match="expected one like https"):
            Settings(origins=(origin,))


@scenario
async def test_one_address_has_only_so_many_calls(model: Model) -> None:
    async with serving(model, per_address=2) as server:
        async with calling(server) as a, calling(server) as b:
            await a.ready()
            await b.ready()
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                async with calling(server):
                    pass
            assert refused.value.status == 429
            assert refused.value.headers is not None and refused.value.headers["Retry-After"]
        await all_over(server)
        async with calling(server) as caller:
            await caller.ready()


@scenario
async def test_there_are_only_so_many_connections(model: Model) -> None:
    async with serving(model, connections=3) as server:
        open_ones = [await raw(server.port, b"") for _ in range(3)]
        await eventually(lambda: len(server._runner.server.connections) == 3)
        reader, writer = await raw(server.port, b"")
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        for _, each in open_ones:
            each.close()
        await eventually(lambda: len(server._runner.server.connections) == 0)
        assert (await get(server, "/health"))[0] == 200


HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def closed(reader: asyncio.StreamReader) -> bool:
    """Whether the server hung up without a word."""
    with contextlib.suppress(ConnectionError):
        return await asyncio.wait_for(reader.read(), 60) == b""
    return True


@scenario
async def test_one_address_cannot_take_all_connections(model: Model) -> None:
    async with serving(model, per_address=1) as server:
        silent = [await raw(server.port, b"") for _ in range(4)]
        reader, writer = await raw(server.port, HEALTH)
        assert await closed(reader)
        assert value(server, "moshi_refused_total", reason="connections_of_address") == 1
        for source in ("127.0.0.2", "127.0.0.3"):
            other, its_writer = await raw(server.port, HEALTH, source)
            assert b"200 OK" in await other.readline()
            its_writer.close()
        silent[0][1].close()  # and has its place again
        await eventually(lambda: len(server._runner.server.connections) == 3)
        assert (await get(server, "/health"))[0] == 200
        for _, each in silent:
            each.close()
        writer.close()
    async with serving(model, per_address=0) as server:  # behind a proxy
        silent = [await raw(server.port, b"") for _ in range(20)]
        assert (await get(server, "/health"))[0] == 200
        for _, each in silent:
            each.close()


def test_an_address_is_what_one_household_has() -> None:
    for first, second, same in (
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8::1", "2001:db8::ffff:1:2:3", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
    ):
        assert (neighbourhood(first) == neighbourhood(second)) is same, (first, second)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A certificate for 127.0.0.1, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key)),
            *("-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return str(certificate), str(key)


@scenario
async def test_a_handshake_of_tls_takes_a_place_and_no_longer_than_it_may(
    model: Model, certificate: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moshi_c.server.app._FIRST_REQUEST", 4.0)
    trusting = ssl.create_default_context(cafile=certificate[0])
    async with serving(model, tls=certificate, connections=2) as server:
        half = [await raw(server.port, text) for text in (b"", b"\x16\x03\x01\x02\x00")]
        third, writer = await raw(server.port, b"")
        assert await closed(third)
        assert value(server, "moshi_refused_total", reason="connections") == 1
        for reader, _ in half:  # the time for it is over
            assert await closed(reader)
        assert (await get(server, "/health", ssl=trusting))[0] == 200
        for each in (writer, *(each for _, each in half)):
            each.close()


@scenario
async def test_a_handshake_that_fails_in_whatever_way_gives_its_place_back(
    model: Model, certificate: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    trusting = ssl.create_default_context(cafile=certificate[0])
    async with serving(model, tls=certificate, connections=1) as server:
        with monkeypatch.context() as patch:
            patch.setattr(ssl.SSLContext, "wrap_bio", no_memory)
            reader, writer = await raw(server.port, b"")
            assert await closed(reader)
        assert (await get(server, "/health", ssl=trusting))[0] == 200
        writer.close()


@scenario
async def test_tls_serves_https_and_wss(model: Model, certificate: tuple[str, str]) -> None:
    trusting = ssl.create_default_context(cafile=certificate[0])
    voice = sound(3)
    async with serving(model, tls=certificate) as server:
        assert server.url.startswith("https://")
        assert (await get(server, "/health", ssl=trusting))[0] == 200
        async with connected(server, "/ws/pcm?live=0", Caller, ssl=trusting) as caller:
            await caller.send(voice)
            await caller.end()
            await caller.finished()
            assert caller.code == 1000 and len(caller.pcm) == 4 * FRAME
    with pytest.raises(OSError, match="are not a certificate and its key"):
        await Server(model, Settings(port=0, tls=certificate[1:] * 2)).start()


# ---- the process -------------------------------------------------------------------------------


class Process:
    """`moshi-c serve` as users start it."""

    def __init__(self, *arguments: str, **options: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moshi_c", "serve", "--port", "0", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        assert self.process.stderr is not None
        self.lines: list[str] = []
        for line in self.process.stderr:
            self.lines.append(line)
            if match := re.search(r"listening on (\S+),", line):
                self.url = match[1]
                return
        raise AssertionError(f"it did not start: {self.lines}")

    def finish(self, seconds: float = 60) -> int:
        _, text = self.process.communicate(timeout=seconds)
        self.lines += text.splitlines(keepends=True)
        return self.process.returncode


@pytest.fixture
def process() -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(*arguments: str, **options: Any) -> Process:
        started.append(Process(*arguments, **options))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()


@scenario
async def test_fault_25_sigterm_lets_calls_end_and_takes_no_new_ones(
    process: Callable[..., Process],
) -> None:
    server = process("--sessions", "1", "--drain-seconds", "3")
    async with calling(server.url) as talking, calling(server.url) as waiting:
        await talking.ready()
        await waiting.until(lambda: waiting.kinds("waiting"))
        await talking.say(sound(3))
        server.process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        await waiting.finished()
        assert waiting.code == 1012
        with pytest.raises((aiohttp.ClientError, OSError)):
            async with calling(server.url):
                pass
        before = len(talking.heard)
        with contextlib.suppress(ConnectionError):
            await talking.say(sound(50))
        await talking.finished()
        assert talking.code == 1012 and time.monotonic() - begin > 2.5
        assert len(talking.heard) > before + 10, "the call went on while draining"
    assert await asyncio.to_thread(server.finish) == 0
    ended = [line for line in server.lines if "ended: " in line]
    assert len(ended) == 2 and all("the server is stopping" in line for line in ended)


@scenario
async def test_ctrl_c_stops_at_once(process: Callable[..., Process]) -> None:
    server = process()
    async with calling(server.url) as caller:
        await caller.ready()
        server.process.send_signal(signal.SIGINT)
        await caller.finished()
        assert caller.code == 1012
    assert await asyncio.to_thread(server.finish) == 130
    assert "Traceback" not in "".join(server.lines)


def test_fault_25_a_port_in_use_is_a_clear_error(process: Callable[..., Process]) -> None:
    port = process().url.rsplit(":", 1)[1]
    second = subprocess.run(
        [sys.executable, "-m", "moshi_c", "serve", "--port", port], capture_output=True, text=True
    )
    assert second.returncode == 1
    said = f"moshi-c: 127.0.0.1:{port} cannot be listened on: it is in use; give another port\n"
    assert second.stderr == said


@scenario
async def test_fault_25_a_log_that_cannot_be_written_stops_no_call() -> None:
    """Nobody reads stderr: its pipe is full after some lines."""
    reading, writing = os.pipe()
    flags = {"stderr": writing, "stdout": subprocess.DEVNULL}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moshi_c", "serve", "--port", str(port)], **flags
    )
    try:
        url = f"http://127.0.0.1:{port}"

        async def up() -> bool:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                return (await get(url, "/health"))[0] == 200
            return False

        while not await up():
            assert process.poll() is None
            await asyncio.sleep(0.1)
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, bytes(4096))
        os.set_blocking(writing, True)
        for _ in range(3):
            caller = await converse(url, sound(3), float("inf"), live=0)
            assert caller.code == 1000
    finally:
        process.kill()
        process.wait()
        os.close(reading)
        os.close(writing)


@pytest.mark.slow
@scenario
async def test_two_hundred_connects_a_second_disturb_no_call(model: Model) -> None:
    """For ten seconds: connects that say nothing, half requests, upgrades that hang up."""
    voice = sound(125)
    with Session(model, seed=1) as session:
        expected = session.run(voice).pcm
    async with serving(model, **PATIENT) as server:
        kinds = (b"", b"GET / HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")

        async def connect(number: int) -> None:
            with contextlib.suppress(OSError):
                text = (*kinds, UPGRADE % b"/ws/pcm")[number % 4]
                reader, writer = await raw(server.port, text)
                if number % 4 > 1:
                    await asyncio.wait_for(reader.read(1), 30)
                writer.close()

        async def storm() -> None:
            begin = time.monotonic()
            running = set()
            for number in range(2000):
                await asyncio.sleep(max(0.0, begin + number / 200 - time.monotonic()))
                running.add(asyncio.create_task(connect(number)))
            await asyncio.wait(running)

        storming = asyncio.create_task(storm())
        caller = await converse(server, voice, seed=1)
        await storming
        assert caller.pcm.tobytes() == expected.tobytes()
        await all_over(server)
        assert (await get(server, "/health"))[0] == 200


@pytest.mark.slow
@scenario
async def test_short_calls_leave_nothing_behind(model: Model) -> None:
    async with serving(model) as server:

        async def some(count: int) -> tuple[int, int]:
            for _ in range(count):
                caller = await converse(server, sound(1), float("inf"), live=0)
                assert caller.code == 1000
            await eventually(lambda: not server._calls and not server._runner.server.connections)
            import gc

            gc.collect()
            status = Path("/proc/self/status").read_text()
            resident = int(re.search(r"VmRSS:\s+(\d+)", status)[1])
            return resident, len(list(Path("/proc/self/fd").iterdir()))

        await some(50)
        before = await some(50)
        after = await some(200)
        assert after[1] <= before[1]
        assert after[0] < before[0] + 4096, (before, after)


def test_the_server_says_nothing_of_its_callers_words() -> None:
    """No file is opened for writing, and no text or sound is logged."""
    folder = Path(call_module.__file__).parent
    for path in folder.glob("*.py"):
        source = path.read_text()
        assert not re.search(r"\bopen\(|write_(?:text|bytes)|tofile|\bsave\(", source), path
        for line in re.findall(r"log\.\w+\(.*", source):
            assert "text" not in line and "pcm" not in line and "query" not in line, line


def test_an_address_that_cannot_be_had_is_an_error(model: Model) -> None:
    async def start() -> None:
        with pytest.raises(OSError, match="cannot be listened on") as error:
            await Server(model, Settings(host="192.0.2.1", insecure=True, port=1)).start()
        assert error.value.errno in (errno.EADDRNOTAVAIL, errno.EACCES)

    asyncio.run(start())
