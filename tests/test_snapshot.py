"""Snapshots and forks: a conversation goes on bit for bit, and what is damaged or foreign is
refused with the reason."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_api import FRAME, assert_same, same, sound, step_all

import moshi_c
from moshi_c import CheckpointError, Model, MoshiError, Session, SessionError
from moshi_c.audio import StreamResampler

BEFORE, AFTER = 13, 9


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with moshi_c.load(max_sessions=4) as model:
        yield model


@pytest.fixture(scope="module")
def pcm() -> NDArray[np.float32]:
    return sound(BEFORE + AFTER)


def head(pcm: NDArray[np.float32]) -> NDArray[np.float32]:
    return pcm[: BEFORE * FRAME]


def tail(pcm: NDArray[np.float32]) -> NDArray[np.float32]:
    return pcm[BEFORE * FRAME :]


# ---- a snapshot as a safetensors file ----------------------------------------------------------

Tensors = dict[str, dict[str, Any]]


def unpack(data: bytes) -> tuple[Tensors, bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def repack(header: Tensors, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def field(data: bytes, name: str, dtype: str) -> NDArray[Any]:
    """A copy of one field, to be changed and put back."""
    header, body = unpack(data)
    first, last = header[name]["data_offsets"]
    return np.frombuffer(body[first:last], dtype).copy()


def with_field(data: bytes, name: str, values: NDArray[Any]) -> bytes:
    header, body = unpack(data)
    first, last = header[name]["data_offsets"]
    assert last - first == values.nbytes
    return repack(header, body[:first] + values.tobytes() + body[last:])


# ---- going on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, BEFORE])
def test_a_restored_session_goes_on_bit_for_bit(
    model: Model, pcm: NDArray[np.float32], steps: int
) -> None:
    with Session(model, seed=5, keep_logits=True) as session:
        step_all(session, pcm[: steps * FRAME])
        data = session.snapshot()
        with Session.from_snapshot(model, data) as restored:
            assert restored.seed == 5
            if steps:
                assert all(map(same, restored.logits, session.logits))
            rest = pcm[steps * FRAME :]
            assert_same(step_all(restored, rest), step_all(session, rest))


def test_a_snapshot_is_equal_however_often_it_is_taken_and_after_a_restore(
    model: Model, pcm: NDArray[np.float32]
) -> None:
    with Session(model, seed=1) as session:
        step_all(session, head(pcm))
        data = session.snapshot()
        assert session.snapshot() == data
        with Session.from_snapshot(model, data) as restored:
            assert restored.snapshot() == data


def test_a_snapshot_goes_on_past_the_wrap_of_the_ring() -> None:
    """The ring has 128 positions here, of which 70 can be seen."""
    long = sound(160)
    with moshi_c.load(context=70, max_sessions=3) as model, Session(model, seed=2) as session:
        step_all(session, long[: 140 * FRAME])
        data = session.snapshot()
        assert unpack(data)[0]["lm.keys_values"]["shape"][3] == 70
        with Session.from_snapshot(model, data) as restored, session.fork() as fork:
            expected = step_all(session, long[140 * FRAME :])
            assert_same(step_all(restored, long[140 * FRAME :]), expected)
            assert_same(step_all(fork, long[140 * FRAME :]), expected)


def test_a_snapshot_is_of_no_more_than_what_can_be_seen(
    model: Model, pcm: NDArray[np.float32]
) -> None:
    with Session(model, seed=1) as session:
        step_all(session, head(pcm))
        header, _ = unpack(session.snapshot())
    assert header["lm.keys_values"]["shape"][3] == BEFORE
    assert header["mimi.encoder.keys_values"]["shape"][3] == 2 * (BEFORE - 1)  # a live start
    assert {"format", "version", "model", "codec", "device", "dtype"} <= set(header["__metadata__"])


def test_a_snapshot_can_be_read_in_another_process(
    model: Model, pcm: NDArray[np.float32], tmp_path: Path
) -> None:
    with Session(model, seed=4) as session:
        step_all(session, head(pcm))
        data = session.snapshot(tmp_path / "call.moshi")
        assert (tmp_path / "call.moshi").read_bytes() == data
        assert [path.name for path in tmp_path.iterdir()] == ["call.moshi"]
        np.save(tmp_path / "rest.npy", tail(pcm))
        code = (
            "import sys, numpy as np, moshi_c\n"
            "model = moshi_c.load()\n"
            "session = moshi_c.Session.from_snapshot(model, sys.argv[1])\n"
            "rest = np.load(sys.argv[2]).reshape(-1, 1920)\n"
            "np.save(sys.argv[3], np.stack([session.step(frame).pcm for frame in rest]))\n"
        )
        paths = [str(tmp_path / name) for name in ("call.moshi", "rest.npy", "out.npy")]
        subprocess.run([sys.executable, "-c", code, *paths], check=True, timeout=600)
        mine = np.stack([frame.pcm for frame in step_all(session, tail(pcm))])
    assert same(np.load(tmp_path / "out.npy"), mine)


def test_what_was_to_be_said_and_half_a_character_are_kept(model: Model) -> None:
    silence = np.zeros(FRAME, np.float32)
    with Session(model, seed=4) as session:
        session.say("hello there my friend")
        for _ in range(4):
            session.step(silence)
        left = session.saying
        assert left
        with Session.from_snapshot(model, session.snapshot()) as restored, session.fork() as fork:
            assert restored.saying == fork.saying == left
            for _ in range(20):
                expected = session.step(silence)
                assert_same([restored.step(silence)], [expected])
                assert_same([fork.step(silence)], [expected])
            assert restored.saying == session.saying == ""


@pytest.mark.parametrize("rates", [(8000, 24000), (44100, 48000), (16000, 8000)])
def test_a_library_resampler_is_primed_again(model: Model, rates: tuple[int, int]) -> None:
    rate, output = rates
    size = rate * 2 // 25
    heard = sound(60, seed=3)[: 30 * size]
    with Session(model, seed=6, sample_rate=rate, output_sample_rate=output) as session:
        for start in range(0, 15 * size, size):
            session.step(heard[start : start + size])
        with Session.from_snapshot(model, session.snapshot()) as restored:
            assert (restored.sample_rate, restored.output_sample_rate) == rates
            for start in range(15 * size, 30 * size, size):
                a = session.step(heard[start : start + size])
                b = restored.step(heard[start : start + size])
                assert a.pcm is not None and b.pcm is not None
                assert len(a.pcm) == len(b.pcm) == output * 2 // 25
                if not same(a.user_codes, b.user_codes):
                    break  # rounding may tip a code, and then the talk goes elsewhere
                np.testing.assert_allclose(a.pcm, b.pcm, atol=1e-5)
            else:
                start += size
            assert start >= 18 * size


@pytest.mark.parametrize("rates", [(44100, 24000), (8000, 24000), (24000, 16000), (11025, 48000)])
@pytest.mark.parametrize("cut", [0.02, 0.4, 3.3])
def test_a_resumed_resampler_gives_the_same_signal(rates: tuple[int, int], cut: float) -> None:
    signal = np.random.default_rng(0).standard_normal(6 * rates[0]).astype(np.float32)
    at = int(cut * rates[0])
    whole, first, second = (StreamResampler(*rates) for _ in range(3))
    expected = np.concatenate([whole.process(signal), whole.flush()])
    begun = first.process(signal[:at])
    second.resume(first.state())
    found = np.concatenate([begun, second.process(signal[at:]), second.flush()])
    assert len(found) == len(expected)
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    "options",
    [
        {"cfg_coef": 2.0, "cfg_masked_until": 3},
        {"cfg_coef": 2.0, "cfg_is_no_text": True},
        {"cfg_coef": 1.5, "conditions": {"description": "very_good"}},
    ],
)
def test_guided_and_conditioned_sessions_go_on(
    made: Any, pcm: NDArray[np.float32], options: dict[str, Any]
) -> None:
    with moshi_c.load(made.lm("hibiki"), progress=False, max_sessions=3) as model:
        frames = pcm[: 12 * model.frame_size].reshape(-1, model.frame_size)
        with Session(model, seed=2, **options) as session:
            for frame in frames[:6]:
                session.step(frame)
            with Session.from_snapshot(model, session.snapshot()) as restored:
                with session.fork() as fork:
                    expected = [session.step(frame) for frame in frames[6:]]
                    assert_same([fork.step(frame) for frame in frames[6:]], expected)
                assert_same([restored.step(frame) for frame in frames[6:]], expected)
                session.reset()
                restored.reset()
                expected = [session.step(frame) for frame in frames]
                assert_same([restored.step(frame) for frame in frames], expected)


# ---- forks -------------------------------------------------------------------------------------


def test_a_fork_goes_on_as_its_origin_and_neither_feels_the_other(
    model: Model, pcm: NDArray[np.float32]
) -> None:
    other = sound(AFTER, seed=9)
    with Session(model, seed=3) as session, Session(model, seed=3) as alone:
        step_all(session, head(pcm))
        step_all(alone, head(pcm))
        with session.fork() as fork, session.fork(seed=11) as third:
            assert (fork.seed, third.seed) == (3, 11)
            astray, mine = step_all(third, other), []
            for a, b in zip(tail(pcm).reshape(-1, FRAME), other.reshape(-1, FRAME), strict=True):
                mine.append(fork.step(a))
                session.step(b)
            assert_same(mine, step_all(alone, tail(pcm)))
            assert astray[-1].index == BEFORE + AFTER - 1


def test_a_fork_shares_the_keys_and_values_until_it_writes(
    pcm: NDArray[np.float32],
) -> None:
    with moshi_c.load(max_sessions=3) as model, Session(model, seed=3) as session:
        step_all(session, head(pcm))
        used = model._core.memory()["session_used_bytes"]
        fork = session.fork()
        assert model._core.memory()["session_used_bytes"] == used
        fork.step(pcm[:FRAME])
        assert model._core.memory()["session_used_bytes"] > used
        fork.close()
        assert model._core.memory()["session_used_bytes"] == used
        third = session.fork()
        session.close()
        assert model._core.memory()["session_used_bytes"] == used
        third.close()
        assert model._core.memory()["session_used_bytes"] == 0


def test_a_fork_with_a_seed_draws_other_numbers(model: Model, pcm: NDArray[np.float32]) -> None:
    with Session(model, seed=3, text_temperature=1.5, audio_temperature=1.5) as session:
        step_all(session, head(pcm))
        with session.fork() as same_numbers, session.fork(seed=4) as others:
            a, b, c = (step_all(s, tail(pcm)) for s in (session, same_numbers, others))
    assert_same(a, b)
    assert any(not same(x.codes, y.codes) for x, y in zip(a, c, strict=True))


def test_a_fork_without_a_free_slot_says_so(model: Model) -> None:
    sessions = [Session(model) for _ in range(4)]
    with pytest.raises(SessionError, match="all 4 sessions of this model are open"):
        sessions[0].fork()
    with pytest.raises(SessionError, match="all 4 sessions of this model are open"):
        Session.from_snapshot(model, sessions[0].snapshot())
    for session in sessions:
        session.close()
    with pytest.raises(SessionError, match="closed"):
        sessions[0].fork()
    with pytest.raises(SessionError, match="closed"):
        sessions[0].snapshot()


def test_a_reset_after_a_restore_is_a_fresh_session(model: Model, pcm: NDArray[np.float32]) -> None:
    with Session(model, seed=8) as session, Session(model, seed=8) as fresh:
        step_all(session, head(pcm))
        with Session.from_snapshot(model, session.snapshot()) as restored:
            restored.reset()
            assert_same(step_all(restored, tail(pcm)), step_all(fresh, tail(pcm)))


# ---- the codec alone ---------------------------------------------------------------------------


def test_a_codec_stream_goes_on_bit_for_bit() -> None:
    frames = sound(12).reshape(-1, FRAME)
    with moshi_c.load_mimi() as mimi, mimi.stream() as stream, mimi.stream() as other:
        heard = [stream.encode(frame) for frame in frames[:6]]
        for codes in heard[:3]:
            stream.decode(codes)
        other.restore(stream.snapshot())
        for frame, codes in zip(frames[6:], heard[3:] + heard[:3], strict=True):
            assert same(stream.encode(frame), other.encode(frame))
            assert same(stream.decode(codes), other.decode(codes))
        with mimi.stream(batch=2) as pair, pytest.raises(CheckpointError, match="batch"):
            pair.restore(stream.snapshot())
        with pytest.raises(CheckpointError, match="snapshot"):
            other.restore(b"nothing of the kind")
        with mimi.stream() as fresh:  # a refused snapshot leaves a new stream
            assert same(other.encode(frames[0]), fresh.encode(frames[0]))


# ---- refused -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(model: Model, pcm: NDArray[np.float32]) -> bytes:
    """A snapshot with everything in it."""
    with Session(model, seed=5, sample_rate=16000, keep_logits=True) as session:
        session.say("hello there my friend how are you")
        for frame in head(pcm)[: BEFORE * 1280].reshape(-1, 1280):
            session.step(frame)
        return session.snapshot()


def refused(model: Model, data: bytes, match: str) -> None:
    """One sentence, and the slot is free again."""
    with pytest.raises(CheckpointError, match=match) as raised:
        Session.from_snapshot(model, data)
    assert "\n" not in str(raised.value)


def test_another_version_model_device_dtype_and_context_are_refused(
    model: Model, data: bytes, made: Any
) -> None:
    def changed(key: str, value: str) -> bytes:
        header, body = unpack(data)
        header["__metadata__"][key] = value
        return repack(header, body)

    refused(model, changed("version", "2"), 'its version is "2", expected "1"')
    refused(model, changed("format", "safetensors"), 'its format is "safetensors"')
    refused(model, changed("device", "cuda"), 'its device is "cuda", expected "cpu"')
    refused(model, changed("dtype", "q4"), 'its dtype is "q4"')
    header, body = unpack(data)
    del header["__metadata__"]
    refused(model, repack(header, body), "it does not name its format")
    with moshi_c.load(context=17) as shorter:
        refused(shorter, data, 'its context is "[0-9]+", expected "17"')
    with moshi_c.load(made.lm("moshi"), progress=False) as other:
        refused(other, data, 'its model is "[0-9a-f]{16}", expected "[0-9a-f]{16}"')
    with (
        moshi_c.load(kv_dtype="f32") as wide,
        moshi_c.load(kv_dtype="bf16") as narrow,
        Session(wide) as session,
    ):
        refused(narrow, session.snapshot(), 'its kv_dtype is "f32", expected "bf16"')


def test_other_weights_of_the_same_shapes_make_another_model(made: Any) -> None:
    with (
        moshi_c.load(made.lm("moshi", seed=0)) as a,
        moshi_c.load(made.lm("moshi", seed=1)) as b,
        Session(a) as session,
    ):
        refused(b, session.snapshot(), "its model is")


Change = Callable[[bytes], bytes]


def set_field(name: str, dtype: str, index: int, value: float) -> Change:
    def change(data: bytes) -> bytes:
        values = field(data, name, dtype)
        values[index] = value
        return with_field(data, name, values)

    return change


def drop_field(name: str) -> Change:
    def change(data: bytes) -> bytes:
        header, body = unpack(data)
        first, last = header.pop(name)["data_offsets"]
        for key, entry in header.items():
            if key != "__metadata__" and entry["data_offsets"][0] >= last:
                entry["data_offsets"] = [at - (last - first) for at in entry["data_offsets"]]
        return repack(header, body[:first] + body[last:])

    return change


def set_note(name: str, value: Any) -> Change:
    def change(data: bytes) -> bytes:
        header, body = unpack(data)
        first, last = header["note"]["data_offsets"]
        note = json.loads(body[first:last])
        note[name] = value
        text = json.dumps(note).encode()
        assert last == len(body)
        header["note"].update(shape=[len(text)], data_offsets=[first, first + len(text)])
        return repack(header, body[:first] + text)

    return change


#: Samples that no session takes.
LOUD = base64.b64encode(np.array([1e30], "<f4").tobytes()).decode()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (set_field("lm.frames", "<i8", 0, -1), "lm.frames is -1, expected 0 to"),
        (set_field("lm.frames", "<i8", 0, 2**40), "lm.frames is 1099511627776, expected 0 to"),
        (set_field("lm.frames", "<i8", 0, 7), "lm.keys_values is .* expected"),
        (set_field("lm.offset", "<i4", 0, 3), "lm.offset is 3, expected 13 as lm.frames says"),
        (set_field("lm.position", "<i4", 0, 14), "lm.position is 14, expected 13"),
        (set_field("lm.delay.tokens", "<i4", 0, 100000), "lm.delay.tokens has 100000 in stream 0"),
        (set_field("lm.delay.tokens", "<i4", 5, -2), "lm.delay.tokens has -2 in stream"),
        (set_field("mimi.encoder.position", "<i4", 0, -5), "position is -5, expected"),
        (set_field("mimi.encoder.conv.0", "<f4", 0, np.nan), "conv.0 holds NaN or infinity"),
        (set_field("session.sampling", "<f4", 0, np.inf), "sampling holds NaN or infinity"),
        (set_field("session.settings", "<i4", 4, 7), "settings has 7 at 4, expected 0 or 1"),
        (set_field("session.settings", "<i4", 2, -9), "cfg_masked_until is -9"),
        (set_field("session.frames", "<i8", 0, -3), "session.frames is -3"),
        (set_field("session.forced", "<i4", 0, 5000), "text token 5000 is not in"),
        (set_field("session.next_audio", "<i4", 0, 4096), "code 0 is 4096"),
        (drop_field("lm.keys_values"), "the field lm.keys_values is missing"),
        (drop_field("session.seed"), "the field session.seed is missing"),
        (drop_field("note"), "note is damaged: it is no JSON"),
        (set_note("sample_rate", "fast"), "sample_rate is 'fast'; expected a whole number"),
        (set_note("sample_rate", 7), "sample_rate is 7; expected"),
        (set_note("forced", [1, 2]), "2 forced tokens; expected"),
        (set_note("power", [10**400]), r"power is .* expected a list of finite numbers"),
        (set_note("output.waiting", base64.b64encode(bytes(8)).decode()), "2 samples of output"),
        (set_note("feed.waiting", LOUD), r"feed.waiting is .* expected samples within ±100"),
        (set_note("power", ["loud"]), r"power is .* expected a list of finite numbers"),
        (set_note("feed.waiting", "?"), "feed.waiting is .* expected bytes in base 64"),
        (set_note("feed.waiting", base64.b64encode(b"abc").decode()), "whole float32 samples"),
        (set_note("feed.waiting", None), r"feed.waiting is 'None'; expected bytes in base 64"),
        (set_note("feed.started", 1), "feed.started is '1'; expected true or false"),
        (set_note("feed.resampler.given", 2**50), "expected about"),
    ],
)
def test_a_lie_in_a_field_is_refused_by_its_name(
    model: Model, data: bytes, change: Change, match: str
) -> None:
    refused(model, change(data), match)


def test_samples_that_a_snapshot_lacks_end_in_a_sentence(model: Model) -> None:
    silence = np.zeros(3840, np.float32)
    with Session(model, sample_rate=48000) as session:
        for _ in range(5):
            session.step(silence)
        lied = set_note("feed.waiting", "")(session.snapshot())
    for attempt in (Session.step, lambda *given: asyncio.run(Session.astep(*given))):
        with (
            Session.from_snapshot(model, lied) as session,
            pytest.raises(SessionError, match="snapshot that it is from was damaged"),
        ):
            for _ in range(3):
                attempt(session, silence)


def test_files_that_are_no_snapshots_are_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing.moshi.* could not be read"):
        Session.from_snapshot(model, tmp_path / "missing.moshi")
    with pytest.raises(CheckpointError, match="could not be read"):
        Session.from_snapshot(model, "a\0b")
    with pytest.raises(TypeError):
        Session.from_snapshot(model, 10**13)  # type: ignore[arg-type]
    with Session(model) as session, pytest.raises(FileNotFoundError, match=r"nowhere/call.moshi"):
        session.snapshot(tmp_path / "nowhere" / "call.moshi")
    refused(model, b"", "0 bytes are too few")
    refused(model, b"\xff" * 64, "the header claims")
    refused(model, struct.pack("<Q", 2) + b"{}", "it does not name its format")


def test_damaged_snapshots_never_crash(model: Model, data: bytes) -> None:
    """Flips, cuts and insertions: each works or is refused in one sentence."""
    rng = random.Random(0)
    silence = np.zeros(1280, np.float32)
    refusals = 0
    header_bytes = struct.unpack("<Q", data[:8])[0] + 8
    for _ in range(300):
        broken = bytearray(data)
        kind = rng.randrange(4)
        # Half of the damage goes to the header, which is a small part of the file.
        at = rng.randrange(header_bytes if rng.random() < 0.5 else len(data))
        if kind == 0:
            del broken[at:]
        elif kind == 1:
            broken[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            broken[at : at + 4] = rng.randbytes(4)
        else:
            broken[at:at] = rng.randbytes(rng.randrange(1, 9))
        try:
            session = Session.from_snapshot(model, bytes(broken))
        except CheckpointError as error:
            refusals += 1
            assert str(error).startswith("snapshot: ") and "\n" not in str(error)
            continue
        with session, contextlib.suppress(MoshiError):
            session.step(silence)
    assert refusals > 150
    with Session(model, seed=1) as session, Session(model, seed=1) as other:
        assert_same([session.step(sound(1))], [other.step(sound(1))])


# ---- asyncio -----------------------------------------------------------------------------------


def test_astep_equals_step(model: Model, pcm: NDArray[np.float32]) -> None:
    async def talk() -> list[moshi_c.Frame]:
        with Session(model, seed=2) as session:
            return [await session.astep(frame) for frame in pcm.reshape(-1, FRAME)]

    with Session(model, seed=2) as session:
        assert_same(asyncio.run(talk()), step_all(session, pcm))


def test_astep_at_another_rate_equals_step(model: Model) -> None:
    heard = sound(8)[: 8 * 1280].reshape(-1, 1280)

    async def talk() -> list[moshi_c.Frame]:
        with Session(model, seed=2, sample_rate=16000) as session:
            return [await session.astep(frame) for frame in heard]

    with Session(model, seed=2, sample_rate=16000) as session:
        assert_same(asyncio.run(talk()), [session.step(frame) for frame in heard])


def test_64_tasks_on_one_event_loop(pcm: NDArray[np.float32]) -> None:
    frames = pcm.reshape(-1, FRAME)[:6]

    async def talk(session: Session, first: int) -> list[moshi_c.Frame]:
        return [await session.astep(frames[(first + i) % 6]) for i in range(6)]

    async def everybody(sessions: list[Session]) -> list[list[moshi_c.Frame]]:
        ticks = 0

        async def clock() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.001)
                ticks += 1

        watch = asyncio.create_task(clock())
        talks = await asyncio.gather(*(talk(s, i) for i, s in enumerate(sessions)))
        watch.cancel()
        assert ticks > 0  # the loop was free meanwhile
        return talks

    with moshi_c.load(max_sessions=64) as model:
        sessions = [Session(model, seed=i) for i in range(64)]
        talks = asyncio.run(everybody(sessions))
        for session in sessions:
            session.close()
        for i in (0, 31, 63):
            with Session(model, seed=i) as session:
                assert_same(talks[i], [session.step(frames[(i + t) % 6]) for t in range(6)])


def test_a_cancelled_astep_leaves_the_session_whole(model: Model, pcm: NDArray[np.float32]) -> None:
    frames = pcm.reshape(-1, FRAME)

    async def talk(session: Session) -> list[int]:
        indices = []
        for frame in frames:
            task = asyncio.create_task(session.astep(frame))
            for _ in range(len(indices) % 3):
                await asyncio.sleep(0)
            task.cancel()
            try:
                indices.append((await task).index)
            except asyncio.CancelledError:
                indices.append((await session.astep(frame)).index)
        return indices

    with Session(model, seed=2) as session:
        indices = asyncio.run(talk(session))
        assert all(b - a in (1, 2) for a, b in pairwise(indices))
        assert session.step(frames[0]).index == indices[-1] + 1


def test_a_cancelled_astep_that_had_begun_is_stepped(
    model: Model, pcm: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However early: the core is asked whether the frame can be taken back, and says no."""
    frames = pcm.reshape(-1, FRAME)

    class TooLate:
        def __init__(self, core: Any) -> None:
            self._core = core

        def withdraw(self) -> bool:
            return False

        def __getattr__(self, name: str) -> Any:
            return getattr(self._core, name)

    async def talk(session: Session) -> None:
        task = asyncio.create_task(session.astep(frames[0]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with Session(model, seed=2) as session, Session(model, seed=2) as other:
        monkeypatch.setattr(session, "_core", TooLate(session._core))
        asyncio.run(talk(session))
        step_all(other, frames[0])
        assert_same([session.step(frames[1])], [other.step(frames[1])])
        asyncio.run(talk(session))
        session.close()
        assert session.closed


def test_a_withdrawn_frame_never_happened(model: Model, pcm: NDArray[np.float32]) -> None:
    """Many sessions keep the engine busy, so that a frame waits long enough to be taken back."""
    frames = pcm.reshape(-1, FRAME)

    async def talk(sessions: list[Session]) -> None:
        others = [asyncio.create_task(s.astep(frames[1])) for s in sessions[1:]]
        await asyncio.sleep(0)
        task = asyncio.create_task(sessions[0].astep(frames[0]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.gather(*others)

    with Session(model, seed=2) as alone:
        expected = [alone.step(frames[t]) for t in range(3)]
    sessions = [Session(model, seed=2) for _ in range(4)]
    withdrawn = 0
    for _ in range(40):
        sessions[0].reset()
        asyncio.run(talk(sessions))
        withdrawn += not sessions[0]._core.in_flight
        if not sessions[0]._core.in_flight:
            assert_same([sessions[0].step(frames[t]) for t in range(3)], expected)
    for session in sessions:
        session.close()
    assert withdrawn > 0


def test_astep_while_a_step_is_in_flight_is_refused(model: Model, pcm: NDArray[np.float32]) -> None:
    frames = pcm.reshape(-1, FRAME)

    async def talk(session: Session) -> None:
        first = asyncio.create_task(session.astep(frames[0]))
        await asyncio.sleep(0)
        for attempt in (lambda: session.step(frames[1]), session.snapshot, session.fork):
            with pytest.raises(SessionError, match="in use"):
                attempt()
        with pytest.raises(SessionError, match="in use"):
            await session.astep(frames[1])
        with pytest.raises(SessionError, match="in use"):
            session.close()
        assert (await first).index == 0

    with Session(model) as session:
        asyncio.run(talk(session))
    with pytest.raises(SessionError, match="closed"):
        asyncio.run(session.astep(frames[0]))


def test_a_session_closes_its_descriptor(model: Model, pcm: NDArray[np.float32]) -> None:
    descriptors = Path("/proc/self/fd")

    def count() -> int:
        return len(list(descriptors.iterdir()))

    before = count()
    for _ in range(20):
        with Session(model) as session:
            asyncio.run(session.astep(pcm[:FRAME]))  # type: ignore[arg-type]
    assert count() <= before + 1
