"""Files, rates and `.mimi` files."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given
from hypothesis import strategies as st

from moshi_c import AudioError
from moshi_c.audio import (
    AudioWriter,
    StreamResampler,
    as_pcm,
    read_audio,
    resampler_shortage,
    write_audio,
)
from moshi_c.codec_file import CodecFile, read_codec_file, write_codec_file

RATES = (8000, 11025, 16000, 22050, 32000, 44100, 48000, 96000)


def tone(seconds: float, rate: int) -> np.ndarray:
    time = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * 440.0 * time)).astype(np.float32)


# ---- arrays ------------------------------------------------------------------------------------


def test_samples_of_every_usual_type() -> None:
    ints = np.array([-32768, 0, 16384], np.int16)
    expected = np.array([-1.0, 0.0, 0.5], np.float32)
    for audio in (
        ints,
        expected,
        expected.astype(np.float64),
        expected.tolist(),
        expected[None],
        expected[:, None],
        expected.data,
        np.repeat(expected, 2)[::2],
        expected.astype(">f4"),
    ):
        found = as_pcm(audio)
        assert found.dtype == np.float32
        assert found.dtype.isnative
        np.testing.assert_array_equal(found, expected)
    assert len(as_pcm([])) == 0


@pytest.mark.parametrize(
    ("audio", "sentence"),
    [
        (b"\0\0", "raw bytes"),
        (np.zeros(3, np.int32), "type int32; expected float32"),
        (np.zeros(3, np.uint8), "type uint8"),
        (np.zeros(3, complex), "type complex128"),
        (np.zeros((2, 3), np.float32), r"shape \[2, 3\]; expected one channel"),
        (np.float32(1), r"shape \[\]"),
        (np.array([0, np.nan], np.float32), "nan at sample 1"),
        (np.array([np.inf], np.float32), "inf at sample 0"),
        (np.array([1e300]), "inf at sample 0"),
        ([[1.0], [1.0, 2.0]], "could not be read as samples"),
        ("text", "type <U4"),
        (None, "type object"),
    ],
)
def test_what_is_no_sound_is_refused(audio: Any, sentence: str) -> None:
    with pytest.raises(AudioError, match=sentence):
        as_pcm(audio)


# ---- rates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", RATES)
def test_a_stream_resamples_as_the_whole_does(rate: int) -> None:
    signal = np.random.default_rng(rate).standard_normal(rate // 2).astype(np.float32)
    whole = soxr.resample(signal, rate, 24000)
    stream = StreamResampler(rate, 24000)
    for size in (1, 100, 7000):
        stream.reset()
        parts = [stream.process(signal[i : i + size]) for i in range(0, len(signal), size)]
        np.testing.assert_array_equal(np.concatenate([*parts, stream.flush()]), whole)


@given(cuts=st.lists(st.integers(0, 4000), max_size=20))
def test_chunks_do_not_change_the_resampled_signal(cuts: list[int]) -> None:
    signal = np.random.default_rng(1).standard_normal(4000).astype(np.float32)
    stream = StreamResampler(44100, 24000)
    edges = [0, *sorted(cuts), len(signal)]
    parts = [stream.process(signal[a:b]) for a, b in pairwise(edges)]
    whole = soxr.resample(signal, 44100, 24000)
    np.testing.assert_array_equal(np.concatenate([*parts, stream.flush()]), whole)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("up", [False, True])
def test_the_shortage_is_never_exceeded(rate: int, up: bool) -> None:
    a, b = (rate, 24000) if up else (24000, rate)
    n_in, n_out = a * 2 // 25, b * 2 // 25
    allowed = resampler_shortage(a, b, n_in, n_out)
    assert allowed < n_out * 1.1, "about one frame of 80 ms at most"
    stream = StreamResampler(a, b)
    made = 0
    for call in range(1, 1500):
        made += len(stream.process(np.zeros(n_in, np.float32)))
        assert made + allowed >= call * n_out


@pytest.mark.parametrize(
    "rate", [0, -1, 999, 1_000_000, 24000.5, True, "16k", None, float("nan"), float("inf")]
)
def test_rates_out_of_range_are_refused(rate: Any) -> None:
    with pytest.raises(AudioError, match="expected whole Hz"):
        StreamResampler(rate, 24000)


# ---- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff"])
def test_files_of_every_kind_come_back(suffix: str, tmp_path: Path) -> None:
    signal = tone(1.0, 24000)
    path = write_audio(tmp_path / f"tone{suffix}", signal, 24000)
    back = read_audio(path, 24000)
    if suffix in (".wav", ".flac", ".aiff"):
        np.testing.assert_allclose(back, signal, atol=1 / 32768)
    else:
        assert abs(len(back) - len(signal)) < 3000
        power = np.sqrt(np.mean(np.square(back[4000:20000])))
        assert 0.15 < power < 0.27


def test_loud_samples_are_clipped(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "loud.wav", np.array([2.0, -2.0, 0.5]), 24000)
    np.testing.assert_allclose(read_audio(path, 24000), [1.0, -1.0, 0.5], atol=1e-4)


def test_the_first_channel_is_taken_and_the_rate_changed(tmp_path: Path) -> None:
    left, right = tone(0.5, 48000), np.zeros(24000, np.float32)
    soundfile.write(tmp_path / "two.wav", np.stack([left, right], 1), 48000, subtype="FLOAT")
    np.testing.assert_array_equal(
        read_audio(tmp_path / "two.wav", 24000), soxr.resample(left, 48000, 24000)
    )


def test_an_empty_file_has_no_samples(tmp_path: Path) -> None:
    write_audio(tmp_path / "empty.wav", [], 8000)
    assert len(read_audio(tmp_path / "empty.wav", 24000)) == 0


def test_a_writer_that_stops_early_leaves_a_whole_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), AudioWriter(tmp_path / "part.wav", 24000) as writer:
        writer.write(tone(0.1, 24000))
        raise KeyboardInterrupt
    assert len(read_audio(tmp_path / "part.wav", 24000)) == 2400


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"gone\.wav does not exist"):
        read_audio(tmp_path / "gone.wav", 24000)
    with pytest.raises(AudioError, match="is not a file"):
        read_audio(tmp_path, 24000)
    for content in (b"", b"RIFF", b"no sound at all " * 100):
        (tmp_path / "bad.wav").write_bytes(content)
        with pytest.raises(AudioError, match=r"bad\.wav could not be read"):
            read_audio(tmp_path / "bad.wav", 24000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 24000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"nan\.wav has nan at sample 1"):
        read_audio(tmp_path / "nan.wav", 24000)
    soundfile.write(tmp_path / "slow.wav", np.zeros(8), 100)
    with pytest.raises(AudioError, match=r"the rate of .*slow\.wav is 100"):
        read_audio(tmp_path / "slow.wav", 24000)


def test_a_header_that_claims_too_much_allocates_nothing(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "liar.wav", tone(0.1, 24000), 24000)
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", 0x7FFFFF00)
    path.write_bytes(data)
    assert len(read_audio(path, 24000)) <= 2400


def test_files_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"suffix '\.xyz'; expected one of \.wav"):
        write_audio(tmp_path / "a.xyz", [], 24000)
    with pytest.raises(AudioError, match="there is no folder"):
        write_audio(tmp_path / "no" / "a.wav", [], 24000)
    with pytest.raises(AudioError, match="cannot be written"):
        write_audio(tmp_path / "a.opus", tone(0.1, 22050), 22050)


# ---- .mimi -------------------------------------------------------------------------------------


def codec_file(frames: int = 5, codebooks: int = 8, samples: int | None = None) -> CodecFile:
    codes = np.random.default_rng(0).integers(0, 512, (codebooks, frames)).astype(np.int32)
    length = frames * 1920 if samples is None else samples
    return CodecFile(codes, 512, length, 24000, 1920)


@pytest.mark.parametrize("frames", [0, 1, 5])
def test_codes_come_back_from_a_file(frames: int, tmp_path: Path) -> None:
    file = codec_file(frames)
    path = write_codec_file(tmp_path / "a.mimi", file)
    assert path.stat().st_size == 32 + 16 * frames
    back = read_codec_file(path)
    np.testing.assert_array_equal(back.codes, file.codes)
    assert back.codes.shape == (8, frames)
    assert (back.samples, back.sample_rate, back.frame_rate) == (frames * 1920, 24000, 12.5)


@given(data=st.binary(max_size=200))
def test_no_bytes_but_the_formats_are_read(
    data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "hostile.mimi"
    path.write_bytes(data)
    with pytest.raises(AudioError, match=r"hostile\.mimi"):
        read_codec_file(path)


@given(at=st.integers(0, 31), value=st.integers(0, 255))
def test_a_changed_header_gives_an_error_or_the_same_shape(
    at: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.mimi"
    write_codec_file(path, codec_file(samples=9000))
    data = bytearray(path.read_bytes())
    data[at] = value
    path.write_bytes(data)
    try:
        assert read_codec_file(path).codes.size == 40
    except AudioError as error:
        assert "changed.mimi" in str(error)


def test_files_of_the_wrong_size_are_refused(tmp_path: Path) -> None:
    path = write_codec_file(tmp_path / "a.mimi", codec_file())
    data = path.read_bytes()
    for changed in (data[:-1], data + b"\0"):
        path.write_bytes(changed)
        with pytest.raises(AudioError, match="expected 112"):
            read_codec_file(path)
    huge = struct.pack("<4sHHIIIIQ", b"MIMI", 1, 8, 512, 24000, 1920, 2**32 - 1, 2**42)
    path.write_bytes(huge)
    with pytest.raises(AudioError, match=r"a\.mimi has"):
        read_codec_file(path)
    path.write_bytes(data[:4] + b"\2" + data[5:])
    with pytest.raises(AudioError, match="version 2; expected 1"):
        read_codec_file(path)
    path.write_bytes(data[:-2] + b"\xff\xff")
    with pytest.raises(AudioError, match="code 65535; expected below 512"):
        read_codec_file(path)
    with pytest.raises(AudioError, match="could not be read"):
        read_codec_file(tmp_path / "gone.mimi")


def test_codes_that_the_format_lacks_are_not_written(tmp_path: Path) -> None:
    file = codec_file()
    file.codes[0, 0] = 512
    with pytest.raises(AudioError, match="expected 0 to 511"):
        write_codec_file(tmp_path / "a.mimi", file)
    with pytest.raises(AudioError, match=r"9601 samples; expected 7681 to 9600"):
        write_codec_file(tmp_path / "a.mimi", codec_file(samples=9601))
    assert not (tmp_path / "a.mimi").exists()


def test_a_long_mp3_is_read_without_seams(tmp_path: Path) -> None:
    """soundfile seeks between the blocks of a file, which an MP3 decoder does not survive."""
    path = tmp_path / "long.mp3"
    seconds = np.arange(8 * 24000) / 24000
    soundfile.write(path, 0.1 * np.sin(1200 * seconds), 24000)
    whole, _ = soundfile.read(path, dtype="float32")
    assert np.abs(read_audio(path, 24000) - whole).max() < 1e-6
