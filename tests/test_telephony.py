"""Sound as protocols carry it: G.711 against libsndfile's, and pieces of any length."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from moshi_c.audio import resample
from moshi_c.telephony import PHONE_RATE, BytesIn, BytesOut, Encoding, decode, encode

pytestmark = pytest.mark.python

SUBTYPE = {"pcmu": "ULAW", "pcma": "ALAW"}
LAWS = pytest.mark.parametrize("law", SUBTYPE)


@LAWS
def test_every_byte_of_g711_stands_for_what_libsndfile_says(law: Encoding) -> None:
    data = bytes(range(256))
    theirs, _ = soundfile.read(
        io.BytesIO(data), dtype="float32", format="RAW", subtype=SUBTYPE[law], samplerate=8000,
        channels=1,
    )  # fmt: skip
    np.testing.assert_array_equal(decode(data, law), theirs)


@LAWS
def test_every_sample_goes_to_the_nearest_byte_of_g711(law: Encoding) -> None:
    samples = np.arange(-32768, 32768) / np.float32(32768)
    values = np.unique(decode(bytes(range(256)), law))
    best = np.abs(samples[:, None] - values).min(axis=1)
    np.testing.assert_array_equal(np.abs(samples - decode(encode(samples, law), law)), best)
    assert len(set(encode(samples, law))) == (255 if law == "pcmu" else 256)


def test_silence_of_g711_is_the_byte_that_telephones_send() -> None:
    assert encode(np.zeros(2, np.float32), "pcmu") == b"\xff\xff"
    assert decode(b"\xff\x7f", "pcmu").tolist() == [0, 0]
    assert encode(np.zeros(2, np.float32), "pcma") == b"\xd5\xd5"


@given(cuts=st.lists(st.integers(0, 700), max_size=8), encoding=st.sampled_from(["s16", "pcmu"]))
@settings(max_examples=20, deadline=None)
def test_any_cut_of_the_bytes_gives_the_same_samples(cuts: list[int], encoding: Encoding) -> None:
    rng = np.random.default_rng(0)
    data = encode(rng.uniform(-1, 1, 1500).astype(np.float32), encoding)
    whole = BytesIn(encoding, PHONE_RATE, 24000)
    expected = np.concatenate([whole.add(data), whole.flush()])
    pieces, sound = BytesIn(encoding, PHONE_RATE, 24000), []
    for cut in [*cuts, len(data)]:
        sound.append(pieces.add(data[:cut]))
        data = data[cut:]
    np.testing.assert_array_equal(np.concatenate([*sound, pieces.flush()]), expected)


def test_a_voice_comes_through_the_telephone_and_back() -> None:
    time = np.arange(48000) / 24000
    voice = (0.3 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    out, back = BytesOut("pcmu", PHONE_RATE, 24000), BytesIn("pcmu", PHONE_RATE, 24000)
    sent = b"".join([*(out.add(frame) for frame in voice.reshape(-1, 1920)), out.flush()])
    assert len(sent) == 2 * PHONE_RATE
    heard = np.concatenate([back.add(sent), back.flush()])
    expected = resample(resample(voice, 24000, 8000), 8000, 24000)
    assert len(heard) == len(voice)
    assert np.sqrt(np.mean((heard - expected) ** 2)) < 0.01
