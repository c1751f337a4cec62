"""The Python surface, on the small model of the package: what docs/api.md promises."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import moshi_c
from moshi_c import Frame, Model, Session
from moshi_c.recording import assemble_words

FRAME = 1920
SEED = 7


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with moshi_c.load(max_sessions=6) as model:
        yield model


def sound(frames: float, seed: int = 0) -> NDArray[np.float32]:
    """Something like a voice: harmonics that come and go, over a little noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(frames * FRAME)) / 24000
    pitch = 120 + 20 * np.sin(2 * np.pi * 1.3 * time + seed)
    phase = 2 * np.pi * np.cumsum(pitch) / 24000
    voice = sum(np.sin(k * phase) / k for k in range(1, 8)) * (np.sin(2 * np.pi * 3 * time) > 0)
    return (0.1 * voice + 0.002 * rng.standard_normal(len(time))).astype(np.float32)


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, None and all."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return bool(a == b)


def assert_same(left: Sequence[Frame], right: Sequence[Frame]) -> None:
    """Every field of every frame, bit for bit."""
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for field in dataclasses.fields(Frame):
            assert same(getattr(a, field.name), getattr(b, field.name)), (a.index, field.name)


def step_all(session: Session, pcm: NDArray[np.float32]) -> list[Frame]:
    return [session.step(frame) for frame in pcm.reshape(-1, session.frame_size)]


# ---- names -------------------------------------------------------------------------------------


def test_every_public_name_is_documented() -> None:
    for name in moshi_c.__all__:
        thing = getattr(moshi_c, name)
        assert name == "__version__" or thing.__doc__, name
        for part, value in vars(thing).items() if isinstance(thing, type) else ():
            if not part.startswith("_") and callable(value):
                assert value.__doc__, f"{name}.{part}"
    assert (Path(moshi_c.__file__).parent / "py.typed").exists()


def test_what_is_not_built_is_absent() -> None:
    for name in ("transcribe", "speak", "translate", "generate"):
        assert not hasattr(moshi_c, name)


def test_errors_are_of_the_promised_kinds() -> None:
    for error, kind in (
        (moshi_c.CheckpointError, ValueError),
        (moshi_c.DeviceError, RuntimeError),
        (moshi_c.AudioError, ValueError),
        (moshi_c.SessionError, RuntimeError),
    ):
        assert issubclass(error, moshi_c.MoshiError)
        assert issubclass(error, kind)


# ---- model -------------------------------------------------------------------------------------


def test_a_model_says_what_it_is(model: Model) -> None:
    assert (model.family, model.device, model.dtype) == ("moshi", "cpu", "bf16")
    assert (model.sample_rate, model.frame_rate, model.frame_size) == (24000, 12.5, FRAME)
    assert model.config["lm_gen_config"]["top_k_text"] == 10
    assert model.config["moshi_name"] == "model.safetensors"
    assert (len(model.delays), model.max_delay) == (17, 1)
    assert model.tokenizer is not None
    assert model.tokenizer.vocab_size == 400
    assert (model.mimi.codebooks, model.mimi.sample_rate, model.mimi.dtype) == (8, 24000, "f32")
    assert "moshi-tiny" in repr(model)
    memory = model.memory
    assert memory.weights > 16_000_000
    assert memory.session > 0
    assert memory["free"] == dict(memory)["free"]


def test_devices_name_the_cpu() -> None:
    cpu = moshi_c.devices()[0]
    assert (cpu.name, cpu.usable, cpu.reason) == ("cpu", True, "")
    assert cpu.description
    assert cpu.memory > 0
    assert cpu["name"] == "cpu"
    assert all(device.usable or device.reason for device in moshi_c.devices())


def test_a_device_that_is_not_built_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOSHI_C_CUDA_LIBRARY", "not_built.so")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(moshi_c.DeviceError, match="no CUDA device is available: not_built"):
            moshi_c.load(device=device)
    card = moshi_c.devices()[1]
    assert (card.name, card.usable) == ("cuda", False)
    assert "not_built.so" in card.reason
    with moshi_c.load(device="auto") as model:
        assert model.device == "cpu"
    with pytest.raises(moshi_c.DeviceError, match="device is 'tpu'; expected 'auto', 'cpu'"):
        moshi_c.load_mimi(device="tpu")
    monkeypatch.setenv("MOSHI_C_DEVICE", "cuda")
    with pytest.raises(moshi_c.DeviceError, match="no CUDA device is available"):
        moshi_c.load()
    moshi_c.load(device="cpu").close()
    monkeypatch.setenv("MOSHI_C_DEVICE", "cpu")
    moshi_c.load().close()


@pytest.mark.parametrize(
    ("option", "value"),
    [("dtype", "q3"), ("kv_dtype", "f64"), ("context", 0), ("max_sessions", 0), ("threads", -1)],
)
def test_options_out_of_range_are_refused(option: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option} is {value!r}; expected"):
        moshi_c.load(**{option: value})


def test_a_weight_file_that_is_damaged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(moshi_c.CheckpointError, match=r"model\.safetensors"):
        moshi_c.load(path)


def test_weights_alone_have_no_text_and_no_codec(tmp_path: Path) -> None:
    folder = moshi_c.hub.packaged_model()
    (tmp_path / "lm.safetensors").symlink_to(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    for key in ("moshi_name", "mimi_name", "tokenizer_name", "mimi_config_name"):
        del config[key]
    (tmp_path / "settings.json").write_text(json.dumps(config))
    with moshi_c.load(tmp_path / "lm.safetensors", config=tmp_path / "settings.json") as model:
        assert model.tokenizer is None
        with pytest.raises(moshi_c.CheckpointError, match=r"load\(\.\.\., mimi=\.\.\.\)"):
            _ = model.mimi
        session = Session(model, seed=SEED)
        frames = [session.step_codes(np.zeros(8, np.int32)) for _ in range(4)]
        assert {frame.text for frame in frames} == {""}
        assert frames[-1].text_token >= 0
        assert frames[-1].pcm is None
        with pytest.raises(moshi_c.CheckpointError, match="say needs a tokenizer"):
            session.say("hello")
        session.force_text([5])
        assert session.saying == ""


def test_a_model_closes_when_its_sessions_have() -> None:
    model = moshi_c.load()
    session = Session(model)
    with pytest.raises(moshi_c.SessionError, match="1 open session"):
        model.close()
    session.close()
    model.close()
    model.close()
    assert model.closed
    assert "closed" in repr(model)
    with pytest.raises(moshi_c.SessionError, match="this model is closed"):
        Session(model)


def test_leaving_a_model_closes_its_sessions() -> None:
    with moshi_c.load() as model:
        session = Session(model)
        stream = model.mimi.stream()
    assert session.closed
    assert stream.closed
    assert model.closed


def test_a_session_needs_a_free_slot() -> None:
    with moshi_c.load(max_sessions=1) as model:
        first = Session(model)
        with pytest.raises(moshi_c.SessionError):
            Session(model)
        first.close()
        Session(model).close()


# ---- frames ------------------------------------------------------------------------------------


def test_the_first_frames(model: Model) -> None:
    with Session(model, seed=SEED) as session:
        frames = step_all(session, sound(4))
    first, second = frames[:2]
    assert first.pcm is not None
    assert first.pcm.shape == (FRAME,)
    assert first.pcm.dtype == np.float32
    assert not first.pcm.any()
    assert (first.text, first.text_token, first.codes) == ("", -1, None)
    assert second.codes is not None
    assert second.codes.shape == (8,)
    assert second.codes.dtype == np.int32
    assert second.text_token >= 0
    assert [frame.index for frame in frames] == [0, 1, 2, 3]
    assert frames[3].time == pytest.approx(0.24)
    assert all(frame.user_codes.shape == (8,) for frame in frames)
    assert all(-60 < frame.level < 0 for frame in frames)
    assert (first.heads, first.event) == (None, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.text = "no"  # type: ignore[misc]


def test_silence_is_minus_120_decibels(model: Model) -> None:
    with Session(model, seed=SEED) as session:
        assert session.step(np.zeros(FRAME, np.float32)).level == -120
        full = np.where(np.arange(FRAME) % 2, 1.0, -1.0).astype(np.float32)
        assert session.step(full).level == pytest.approx(0.0, abs=1e-4)


def test_what_a_frame_may_be(model: Model) -> None:
    ints = (sound(1) * 32767).astype(np.int16)
    floats = ints.astype(np.float32) / 32768
    strided = np.repeat(floats, 2)[::2]
    with Session(model, seed=SEED) as session:
        expected = session.step(floats)
        for given_frame, dtype in (
            (ints, None),
            (strided, None),
            (floats.data, None),
            (floats[None], None),
            (floats.tobytes(), "float32"),
            (ints.tobytes(), "int16"),
        ):
            session.reset()
            assert_same([session.step(given_frame, dtype=dtype)], [expected])


@pytest.mark.parametrize(
    ("pcm", "sentence"),
    [
        (np.zeros(1919, np.float32), "pcm has 1919 samples; a frame is 1920"),
        (np.zeros(0, np.float32), "pcm has 0 samples"),
        (np.zeros((2, FRAME), np.float32), r"shape \(2, 1920\); expected one channel"),
        (np.zeros(FRAME), r"float64; expected float32 or int16: convert with .*astype"),
        (np.zeros(FRAME, np.int32), "int32; expected float32 or int16"),
        (np.full(FRAME, np.nan, np.float32), "(?i)nan|finite"),
        (np.full(FRAME, -np.inf, np.float32), "(?i)inf|finite"),
        (bytes(4 * FRAME), "raw bytes, which do not tell their type"),
        ("text", "str"),
        (None, "NoneType"),
    ],
)
def test_a_wrong_frame_changes_nothing(model: Model, pcm: Any, sentence: str) -> None:
    voice = sound(2)
    with Session(model, seed=SEED) as session, Session(model, seed=SEED) as other:
        session.step(voice[:FRAME])
        with pytest.raises(moshi_c.AudioError, match=sentence):
            session.step(pcm)
        assert_same([session.step(voice[FRAME:])], step_all(other, voice)[1:])


def test_decoding_can_be_left_out(model: Model) -> None:
    voice = sound(5)
    with Session(model, seed=SEED) as session, Session(model, seed=SEED) as other:
        for a, b in zip(voice.reshape(-1, FRAME), step_all(other, voice), strict=True):
            frame = session.step(a, decode=False)
            assert frame.pcm is None
            assert (frame.text, same(frame.codes, b.codes)) == (b.text, True)


def test_codes_replace_sound(model: Model) -> None:
    voice = sound(6)
    with Session(model, seed=SEED) as session, Session(model, seed=SEED) as other:
        frames = step_all(other, voice)
        again = [session.step_codes(frame.user_codes) for frame in frames]
        assert {frame.level for frame in again} == {-120.0}
        assert_same([dataclasses.replace(f, level=-120.0) for f in frames], again)
        for codes in (np.zeros(7, np.int32), np.full(8, 10_000), np.zeros(8), [0] * 9):
            with pytest.raises(moshi_c.AudioError):
                session.step_codes(codes)
        assert session.step_codes([0] * 8).index == len(frames)


def test_speaking_follows_words_and_sound(model: Model) -> None:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    with Session(model, seed=SEED) as session:
        session.force_text(tokenizer.encode("hello"))
        frames = step_all(session, np.zeros(10 * FRAME, np.float32))
        first = next(i for i, frame in enumerate(frames) if frame.text)
        assert all(frame.speaking for frame in frames[first : first + 9])
        assert not any(frame.speaking for frame in frames[:1])


# ---- same in, same out -------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes(model: Model) -> None:
    voice = sound(12)
    options: dict[str, Any] = {"audio_temperature": 5.0, "audio_top_k": 250}
    with Session(model, seed=SEED, **options) as session:
        first = step_all(session, voice)
    with Session(model, seed=SEED, **options) as session:
        assert_same(step_all(session, voice), first)
    with Session(model, seed=SEED + 1, **options) as session:
        others = step_all(session, voice)
    assert not all(same(a.codes, b.codes) for a, b in zip(first, others, strict=True))


def test_reset_equals_fresh(model: Model) -> None:
    voice = sound(10)
    with Session(model, seed=SEED) as session:
        first = step_all(session, voice)
        session.push(voice[:100])
        session.say("hello paris")
        session.reset()
        assert session.seed == SEED
        assert session.saying == ""
        assert session.stats.frames == 0
        assert_same(step_all(session, voice), first)
        session.reset(SEED + 1)
        assert session.seed == SEED + 1
        with Session(model, seed=SEED + 1) as other:
            assert_same(step_all(session, voice), step_all(other, voice))


def test_seeds(model: Model) -> None:
    with Session(model) as one, Session(model) as two:
        assert one.seed != two.seed
        assert 0 <= one.seed < 2**64
    for seed in (0, 2**64 - 1):
        with Session(model, seed=seed) as session:
            assert session.seed == seed
    for bad in (-1, 2**64):
        with pytest.raises(ValueError, match="seed is"):
            Session(model, seed=bad)
    with pytest.raises(TypeError):
        Session(model, seed="7")  # type: ignore[arg-type]


VOICE = sound(7.4, seed=3)


@pytest.fixture(scope="module")
def stepped(model: Model) -> list[Frame]:
    """Frames of VOICE, stepped one by one with silence at its end."""
    padded = np.concatenate([VOICE, np.zeros(-len(VOICE) % FRAME + FRAME, np.float32)])
    with Session(model, seed=SEED) as session:
        return step_all(session, padded)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cuts=st.lists(st.integers(0, len(VOICE)), max_size=12), as_int=st.booleans())
def test_any_chunking_gives_the_same_frames(
    model: Model, stepped: list[Frame], cuts: list[int], as_int: bool
) -> None:
    edges = [0, *sorted(cuts), len(VOICE)]
    with Session(model, seed=SEED) as session:
        frames: list[Frame] = []
        for a, b in pairwise(edges):
            buffer = VOICE[a:b].copy()
            frames += session.push(buffer.astype(np.float64) if as_int else buffer)
            buffer[:] = 1.0  # what was pushed is the session's
        assert len(frames) == len(VOICE) // FRAME
        assert_same(frames + session.flush(), stepped)


def test_pieces_of_every_awkward_size(model: Model, stepped: list[Frame]) -> None:
    for size in (1, 1919, 1921, 240_000):
        voice = VOICE[: 2 * FRAME] if size == 1 else VOICE
        with Session(model, seed=SEED) as session:
            frames = [
                f for i in range(0, len(voice), size) for f in session.push(voice[i : i + size])
            ]
            assert_same(frames, stepped[: len(voice) // FRAME])


def test_step_goes_on_after_push(model: Model, stepped: list[Frame]) -> None:
    with Session(model, seed=SEED) as session:
        frames = session.push(VOICE[:1000])
        frames += [session.step(VOICE[1000 + i * FRAME :][:FRAME]) for i in range(3)]
        with pytest.raises(moshi_c.AudioError, match="pcm has 7 samples; a frame is 1920"):
            session.step(VOICE[:7])
        with pytest.raises(moshi_c.AudioError, match="pcm is float64"):
            session.step(np.zeros(FRAME))
        frames += session.push(VOICE[1000 + 3 * FRAME :])
        assert_same(frames + session.flush(), stepped)


def test_what_push_refuses_changes_nothing(model: Model, stepped: list[Frame]) -> None:
    with Session(model, seed=SEED) as session:
        frames = session.push(VOICE[:3000])
        for bad in (np.array([np.nan]), np.zeros((2, 5)), np.zeros(5, np.int32), b"1234"):
            with pytest.raises(moshi_c.AudioError):
                session.push(bad)
        frames += session.push(VOICE[3000:])
        assert_same(frames + session.flush(), stepped)


def test_flush_steps_the_delay(model: Model) -> None:
    with Session(model, seed=SEED) as session:
        assert len(session.flush()) == model.max_delay
        session.push(np.zeros(1, np.float32))
        assert len(session.flush()) == 1 + model.max_delay
        assert session.step(np.zeros(FRAME, np.float32)).index == 1 + 2 * model.max_delay


@pytest.mark.parametrize("decode", [True, False])
def test_sessions_stepped_together_equal_sessions_stepped_alone(model: Model, decode: bool) -> None:
    voices = [sound(6, seed) for seed in range(3)]
    alone = []
    for seed, voice in enumerate(voices):
        with Session(model, seed=seed) as session:
            alone.append([session.step(f, decode=decode) for f in voice.reshape(-1, FRAME)])
    sessions = [Session(model, seed=seed) for seed in range(3)]
    sessions[1].push(voices[1][:500])  # not at a frame's edge
    voices[1] = np.roll(voices[1], -500)
    together: list[list[Frame]] = [[], [], []]
    for i in range(6):
        frames = [voice[i * FRAME : (i + 1) * FRAME] for voice in voices]
        for kept, frame in zip(
            together, moshi_c.step_many(sessions, frames, decode=decode), strict=True
        ):
            kept.append(frame)
    for left, right in zip(together, alone, strict=True):
        assert_same(left, right)
    for session in sessions:
        session.close()


def test_step_many_steps_all_or_none(model: Model) -> None:
    silent = np.zeros(FRAME, np.float32)
    assert moshi_c.step_many([], []) == []
    with Session(model, seed=1) as one, Session(model, seed=2) as two, moshi_c.load() as other:
        two.push(silent[:10])
        for bad in (np.full(FRAME, np.nan, np.float32), silent[1:], np.zeros(FRAME)):
            for pair in ([silent, bad], [bad, silent]):
                with pytest.raises(moshi_c.AudioError):
                    moshi_c.step_many([one, two], pair)
        with pytest.raises(ValueError, match="2 sessions and 1 frames"):
            moshi_c.step_many([one, two], [silent])
        with pytest.raises(ValueError, match="one session twice"):
            moshi_c.step_many([one, one], [silent, silent])
        stranger = Session(other)
        with pytest.raises(ValueError, match="different models"):
            moshi_c.step_many([one, stranger], [silent, silent])
        closed = Session(model)
        closed.close()
        with pytest.raises(moshi_c.SessionError, match="closed"):
            moshi_c.step_many([one, closed], [silent, silent])
        assert [frame.index for frame in moshi_c.step_many([one, two], [silent] * 2)] == [0, 0]


# ---- other rates -------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
def test_pushing_at_another_rate_equals_resampling_first(model: Model, rate: int) -> None:
    voice = soxr.resample(VOICE, 24000, rate)
    with Session(model, seed=SEED) as session:
        expected = session.push(soxr.resample(voice, rate, 24000)) + session.flush()
    with Session(model, seed=SEED, sample_rate=rate) as session:
        assert session.frame_size == rate * 2 // 25
        frames = [f for i in range(0, len(voice), 999) for f in session.push(voice[i : i + 999])]
        assert_same(frames + session.flush(), expected)


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
def test_every_step_at_another_rate_gives_a_frame(model: Model, rate: int) -> None:
    size = rate * 2 // 25
    voice = soxr.resample(sound(12), 24000, rate)[: 12 * size]
    with Session(model, seed=SEED, sample_rate=rate, output_sample_rate=rate) as session:
        frames = step_all(session, voice)
        assert [frame.index for frame in frames] == list(range(12))
        assert {frame.pcm.shape for frame in frames if frame.pcm is not None} == {(size,)}
        assert max(frame.level for frame in frames) > -40
        session.reset()
        assert_same(session.push(voice), frames) if rate == 24000 else None
        session.reset()
        again = [session.step((frame * 32768).astype(np.int16)) for frame in
                 np.round(voice.reshape(-1, size) * 32768) / 32768]  # fmt: skip
        assert len(again) == 12
        with pytest.raises(moshi_c.AudioError, match=f"a frame is {size} "):
            session.step(np.zeros(size + 1, np.float32))


def test_step_is_refused_where_it_has_no_frame(model: Model) -> None:
    with Session(model, seed=SEED, sample_rate=16000) as session:
        session.push(np.zeros(100, np.float32))
        with pytest.raises(moshi_c.SessionError, match="go on with push, or end with flush"):
            session.step(np.zeros(1280, np.float32))
        session.flush()
        session.step(np.zeros(1280, np.float32))
        session.push(np.zeros(5000, np.float32))
        session.step(np.zeros(1280, np.float32))


@pytest.mark.parametrize("rate", [24001, 22052, 0, -24000, 999, 10**9, 24000.5, "24000"])
@pytest.mark.parametrize("name", ["sample_rate", "output_sample_rate"])
def test_rates_are_checked(model: Model, name: Any, rate: Any) -> None:
    with pytest.raises((moshi_c.AudioError, ValueError), match=f"{name} is"):
        Session(model, **{name: rate})


def test_a_recording_at_another_rate_stays_in_time(model: Model) -> None:
    with Session(model, seed=SEED) as session:
        expected = session.run(VOICE)
    assert expected.pcm is not None
    with Session(model, seed=SEED, output_sample_rate=16000) as session:
        recording = session.run(VOICE)
    assert recording.pcm is not None
    assert recording.sample_rate == 16000
    np.testing.assert_array_equal(recording.pcm, soxr.resample(expected.pcm, 24000, 16000))
    assert recording.words == expected.words


# ---- whole recordings --------------------------------------------------------------------------


def test_run_listens_on_for_as_long_as_it_is_told(model: Model) -> None:
    with Session(model, seed=SEED) as session:
        expected = session.run(np.concatenate([VOICE, np.zeros(12000, np.float32)]))
    with Session(model, seed=SEED) as session:
        recording = session.run(VOICE, after=0.5)
        assert recording.pcm is not None and same(recording.pcm, expected.pcm)
        for after in (-1, 3601, float("nan")):
            with pytest.raises(ValueError, match="expected 0 to 3600"):
                session.run(VOICE, after=after)


def test_a_session_is_of_a_model() -> None:
    with pytest.raises(TypeError, match=r"Session got str, expected a Model from load\(\)"):
        Session("moshi-tiny")  # type: ignore[arg-type]


def test_run_is_push_then_flush(model: Model, stepped: list[Frame], tmp_path: Path) -> None:
    soundfile.write(tmp_path / "voice.wav", VOICE, 24000, subtype="FLOAT")
    for audio in (VOICE, str(tmp_path / "voice.wav"), tmp_path / "voice.wav"):
        with Session(model, seed=SEED) as session:
            recording = session.run(audio)
        assert recording.pcm is not None
        voice = np.concatenate([frame.pcm for frame in stepped if frame.pcm is not None])
        assert same(recording.pcm, voice)
        assert recording.text == "".join(frame.text for frame in stepped)
        codes = [frame.codes for frame in stepped if frame.codes is not None]
        assert same(recording.codes, np.stack(codes, 1))
        assert recording.codes.shape == (8, len(stepped) - model.max_delay)
        assert same(recording.user_codes, np.stack([frame.user_codes for frame in stepped], 1))
        assert recording.duration == pytest.approx(len(stepped) * 0.08)
        assert recording.sample_rate == 24000


def test_an_empty_recording(model: Model) -> None:
    with Session(model, seed=SEED) as session:
        recording = session.run(np.zeros(0, np.float32))
    assert recording.pcm is not None
    assert recording.pcm.shape == (model.max_delay * FRAME,)
    assert recording.codes.shape == (8, 0)
    assert recording.words == []


def test_what_it_was_made_to_say_is_in_the_recording(model: Model, tmp_path: Path) -> None:
    with Session(model, seed=SEED) as session:
        session.say("paris is hot")
        assert session.saying == "paris is hot"
        session.step(np.zeros(FRAME, np.float32))
        assert session.saying == "paris is hot", "EPAD comes first"
        recording = session.run(np.zeros(20 * FRAME, np.float32))
        assert session.saying == ""
    assert recording.text.strip().startswith("paris is hot")
    words = recording.words[:3]
    assert [word.text for word in words] == ["paris", "is", "hot"]
    starts = [word.start for word in words]
    assert starts[0] == pytest.approx(0.08), "the first step has no output, the second is EPAD"
    assert starts == sorted(starts)
    assert all(word.end > word.start for word in recording.words)

    path = recording.save(tmp_path / "out.wav", words=True)
    data, rate = soundfile.read(path)
    assert rate == 24000
    assert recording.pcm is not None
    np.testing.assert_allclose(data, np.clip(recording.pcm, -1, 1), atol=1e-4)
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["words"][1]["text"] == "is"
    assert saved["text"] == recording.text.strip()
    recording.save(tmp_path / "only.json")
    assert json.loads((tmp_path / "only.json").read_text()) == saved
    with pytest.raises(moshi_c.AudioError, match="suffix"):
        recording.save(tmp_path / "out.xyz")


def test_a_recording_without_a_voice_is_not_saved_as_sound() -> None:
    codes = np.zeros((8, 1), np.int32)
    silent = moshi_c.Recording(
        None, " a", [moshi_c.Word("a", 0.0, 0.08)], codes, codes, 24000, 12.5
    )
    with pytest.raises(moshi_c.AudioError, match="no voice"):
        silent.save("x.wav")


@pytest.mark.parametrize(
    ("texts", "tokens", "expected"),
    [
        ([], [], []),
        (["", " he", "llo", ""], [0, 9, 9, 3], [("hello", 1, 3)]),
        ([" a", "", "", " b"], [9, 3, 0, 9], [("a", 0, 2), ("b", 3, 4)]),
        ([" a", " b"], [9, 9], [("a", 0, 1), ("b", 1, 2)]),
        ([" a", "", "b"], [9, 3, 9], [("ab", 0, 3)]),
        ([" a", "", "b"], [9, 0, 9], [("a", 0, 1), ("b", 2, 3)]),
        ([" a b", "c "], [9, 9], [("a", 0, 1), ("bc", 0, 2)]),
    ],
)
def test_words_of_frames(
    texts: list[str], tokens: list[int], expected: list[tuple[str, int, int]]
) -> None:
    words = assemble_words(texts, tokens, 0, 12.5)
    assert [(w.text, round(w.start * 12.5), round(w.end * 12.5)) for w in words] == expected


# ---- words put into its mouth ------------------------------------------------------------------


def test_forced_tokens_come_one_a_frame(model: Model) -> None:
    tokens = [20, 3, 21, 0, 22]
    with Session(model, seed=SEED) as session:
        session.force_text(tokens[:2])
        session.force_text(tokens[2:])
        frames = step_all(session, np.zeros(6 * FRAME, np.float32))
        assert [frame.text_token for frame in frames[1:]] == tokens
        for bad in ([-1], [10_000], [5, 10_000]):
            with pytest.raises(ValueError, match="token"):
                session.force_text(bad)
        session.force_text([])
        assert session.saying == ""


def test_what_it_still_has_to_say_shrinks(model: Model) -> None:
    with Session(model, seed=SEED) as session:
        session.say("hello")
        session.say("paris")
        left = [session.saying]
        for _ in range(30):
            session.step(np.zeros(FRAME, np.float32))
            left.append(session.saying)
    assert left[0] == "hello paris"
    assert left[-1] == ""
    assert all(b == "" or a.endswith(b) for a, b in pairwise(left))


def test_teacher_forcing_replaces_what_is_sampled(model: Model) -> None:
    codes = np.arange(8, dtype=np.int32)
    silent = np.zeros(FRAME, np.float32)
    with Session(model, seed=SEED) as session:
        session.step(silent)
        session._force_next(42, codes)
        session.step(silent)
        session._force_next(43, codes)
        frames = [session.step(silent), session.step(silent)]
    assert [frame.text_token for frame in frames] == [42, 43]
    assert frames[0].codes is not None
    np.testing.assert_array_equal(frames[0].codes, codes)


def test_logits_of_the_last_step(model: Model) -> None:
    with Session(model, seed=SEED, keep_logits=True, text_temperature=0.0) as session:
        frames = step_all(session, sound(3))
        text, audio = session.logits
        assert (text.shape, audio.shape) == ((400,), (8, 512))
        assert text.dtype == audio.dtype == np.float32
        assert np.isfinite(text).all()
        expected = int(np.argmax(text))
        assert session.step(np.zeros(FRAME, np.float32)).text_token == expected
        assert frames[-1].text_token >= 0
    with Session(model, seed=SEED) as session:
        session.step(np.zeros(FRAME, np.float32))
        with pytest.raises(moshi_c.SessionError, match="keep_logits"):
            _ = session.logits


# ---- state -------------------------------------------------------------------------------------


def test_stats_count_the_steps(model: Model) -> None:
    with Session(model, seed=SEED) as session:
        assert session.stats.frames == 0
        step_all(session, sound(5))
        stats = session.stats
        assert stats.frames == 5
        assert 0 < stats.p50_ms <= stats.p99_ms <= stats.max_ms + 1e-9
        assert stats.real_time_factor > 0
        assert stats.late == dict(stats)["late"]
        assert model.stats.frames >= 5
        assert model.stats["temporal_ms"] > 0


def test_a_closed_session_says_so(model: Model) -> None:
    session = Session(model, seed=SEED)
    session.close()
    session.close()
    assert session.closed
    silent = np.zeros(FRAME, np.float32)
    for call in (
        lambda: session.step(silent),
        lambda: session.push(silent),
        lambda: session.push(silent[:3]),
        lambda: session.step_codes([0] * 8),
        session.flush,
        lambda: session.run(silent),
        lambda: session.say("hello"),
        lambda: session.saying,
        session.reset,
        lambda: session.logits,
    ):
        with pytest.raises(moshi_c.SessionError, match="this session is closed"):
            call()


def test_a_second_thread_is_refused_at_once(model: Model) -> None:
    with Session(model, seed=SEED) as session:
        with session._busy():
            caught: list[Exception] = []

            def intrude() -> None:
                try:
                    session.step(np.zeros(FRAME, np.float32))
                except Exception as error:
                    caught.append(error)

            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join(10)
        assert isinstance(caught[0], moshi_c.SessionError)
        assert "in use by another thread" in str(caught[0])
        assert session.step(np.zeros(FRAME, np.float32)).index == 0


def test_sessions_of_one_model_run_in_threads(model: Model) -> None:
    voice = sound(10)
    expected = []
    for seed in range(4):
        with Session(model, seed=seed) as session:
            expected.append(step_all(session, voice))
    found: dict[int, list[Frame]] = {}

    def talk(seed: int) -> None:
        with Session(model, seed=seed) as session:
            found[seed] = step_all(session, voice)

    threads = [threading.Thread(target=talk, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for seed, frames in enumerate(expected):
        assert_same(found[seed], frames)


# ---- codec -------------------------------------------------------------------------------------


def test_the_codec_of_whole_signals(model: Model, tmp_path: Path) -> None:
    mimi, voice = model.mimi, sound(5.5)
    codes = mimi.encode(voice)
    assert codes.shape == (8, 6)
    assert codes.dtype == np.int32
    pcm = mimi.decode(codes)
    assert pcm.shape == (6 * FRAME,)
    assert pcm.dtype == np.float32
    soundfile.write(tmp_path / "a.wav", voice, 24000, subtype="FLOAT")
    assert same(mimi.encode(tmp_path / "a.wav"), codes)
    batch = np.stack([voice, sound(5.5, 1)])
    both = mimi.encode(batch)
    assert both.shape == (2, 8, 6)
    assert same(both[0], codes)
    assert same(mimi.decode(both)[0], pcm)
    assert mimi.decode(codes[:3]).shape == pcm.shape
    assert mimi.encode([]).shape == (8, 0)
    assert mimi.decode(codes[:, :0]).shape == (0,)


def test_the_codec_alone_is_the_models(model: Model) -> None:
    voice = sound(3)
    with moshi_c.load_mimi() as mimi:
        assert same(mimi.encode(voice), model.mimi.encode(voice))
    with moshi_c.load_mimi(codebooks=3) as mimi:
        assert mimi.codebooks == 3
        assert same(mimi.encode(voice), model.mimi.encode(voice)[:3])
    assert mimi.closed
    with pytest.raises(ValueError, match="codebooks"):
        moshi_c.load_mimi(codebooks=0)
    with pytest.raises((ValueError, moshi_c.CheckpointError), match="9"):
        moshi_c.load_mimi(codebooks=9)
    model.mimi.close()
    assert not model.closed


def test_the_streaming_codec(model: Model) -> None:
    voice = sound(6).reshape(-1, FRAME)
    with model.mimi.stream() as stream, model.mimi.stream(batch=2) as pair:
        codes = [stream.encode(frame) for frame in voice]
        assert codes[0].shape == (8,)
        assert codes[0].dtype == np.int32
        pcm = [stream.decode(column) for column in codes]
        assert pcm[0].shape == (FRAME,)
        for frame, column, expected in zip(voice, codes, pcm, strict=True):
            both = pair.encode(np.stack([frame, frame]))
            assert both.shape == (2, 8)
            assert same(both[1], column)
            assert same(pair.decode(both)[1], expected)
        stream.reset()
        assert same(stream.encode(voice[0]), codes[0])
        for bad in (voice[0][:-1], voice[0].astype(np.float64), np.full(FRAME, np.nan, np.float32)):
            with pytest.raises(moshi_c.AudioError):
                stream.encode(bad)
        with pytest.raises(moshi_c.AudioError):
            pair.encode(voice[0])
        with pytest.raises(moshi_c.AudioError):
            stream.decode(np.full(8, 512))
    with pytest.raises(moshi_c.SessionError, match="closed"):
        stream.encode(voice[0])


@pytest.mark.parametrize(
    "codes",
    [np.full((8, 2), 512), np.full((8, 2), -1), np.zeros((9, 2), int), np.zeros(8, int),
     np.zeros((8, 2)), np.zeros((1, 1, 1, 1), int), "codes"],
)  # fmt: skip
def test_codes_that_are_none_are_refused(model: Model, codes: Any) -> None:
    with pytest.raises(moshi_c.AudioError):
        model.mimi.decode(codes)


def test_say_tells_what_the_vocabulary_lacks(model: moshi_c.Model) -> None:
    with moshi_c.Session(model, seed=1) as session:
        session.say("Hello, MY name!")
        assert session.saying == "hello my name"
        with pytest.raises(ValueError, match="'4'"):
            session.say("take 4")
        assert session.saying == "hello my name"
