"""Opus in Ogg: what is written can be read by others and the reverse, and no stream, however
damaged, does more than end itself."""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import ogg
import pytest
import sound
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from pystoi import stoi

import moshi_c
from moshi_c import AudioError, OggOpusReader, OggOpusWriter, SessionError

FRAME = 1920
RATES = (8000, 12000, 16000, 24000, 48000)
Sound = sound.Sound


@functools.cache
def speech() -> Sound:
    """4.0-odd seconds, no whole number of packets."""
    return sound.minute()[: 50 * FRAME + 777]


def written(pcm: Sound, rate: int = 24000, size: int = FRAME) -> bytes:
    writer = OggOpusWriter(rate, serial=1)
    parts = [writer.append(pcm[i : i + size]) for i in range(0, len(pcm), size)]
    return b"".join(parts) + writer.close()


@functools.cache
def stream() -> bytes:
    return written(speech())


@functools.cache
def decoded() -> Sound:
    return read(stream())


def read(data: bytes, size: int | None = None, reader: OggOpusReader | None = None) -> Sound:
    reader = reader or OggOpusReader()
    size = size or max(len(data), 1)
    return np.concatenate([reader.append(data[i : i + size]) for i in range(0, len(data), size)])


def file_of_libsndfile(pcm: Any, rate: int = 24000) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, pcm, rate, format="OGG", subtype="OPUS")
    return out.getvalue()


def packets_of_20_ms() -> list[bytes]:
    return [one for page in ogg.pages(file_of_libsndfile(speech()))[2:] for one in page.packets]


def headers(pre_skip: int = 0, channels: int = 1, gain: int = 0, serial: int = 1) -> list[ogg.Page]:
    head = struct.pack("<8sBBHIhB", b"OpusHead", 1, channels, pre_skip, 24000, gain, 0)
    tags = struct.pack("<8sI4sI", b"OpusTags", 4, b"test", 0)
    return [ogg.page([head], 0, flags=ogg.FIRST, serial=serial), ogg.page([tags], 1, serial=serial)]


def correlation(a: Sound, b: Sound) -> float:
    assert len(a) == len(b)
    return float(np.corrcoef(a, b)[0, 1])


# ---- round trips -------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", RATES)
def test_a_file_comes_back_sample_for_sample_long(rate: int) -> None:
    pcm = np.repeat(speech(), 2) if rate == 48000 else speech()[: rate * 4 + 77]
    reader = OggOpusReader(rate)
    back = read(written(pcm, rate), reader=reader)[reader.pre_skip :]
    assert correlation(pcm, back) > 0.97
    assert reader.pre_skip == rate // 400  # the delay of this mode, 2.5 ms
    assert (reader.lost, reader.damaged) == (0, 0)


def test_a_frame_goes_in_and_comes_out_whole() -> None:
    writer, reader = OggOpusWriter(), OggOpusReader()
    for i in range(20):
        data = writer.append(speech()[i * FRAME : (i + 1) * FRAME])
        assert [len(page.packets) for page in ogg.pages(data)][-2:] == [1, 1]
        assert len(reader.append(data)) == FRAME


def test_any_sizes_of_appends_write_the_same_stream() -> None:
    for size in (1, 100, 959, 961, 30000):
        assert written(speech()[: 5 * FRAME + 3], size=size) == written(speech()[: 5 * FRAME + 3])


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 20000), max_size=30))
def test_any_cuts_of_the_bytes_read_the_same_sound(cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(stream())) for cut in cuts), len(stream())]
    reader = OggOpusReader()
    parts = [reader.append(stream()[a:b]) for a, b in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(parts), decoded())


def test_a_byte_at_a_time_reads_the_same_sound() -> None:
    np.testing.assert_array_equal(read(stream(), 1), decoded())


def test_the_pages_are_those_of_the_format() -> None:
    found = ogg.pages(stream())
    assert [page.number for page in found] == list(range(len(found)))
    assert {page.serial for page in found} == {1}
    assert found[0].packets[0].startswith(b"OpusHead") and found[0].flags == ogg.FIRST
    assert found[1].packets[0].startswith(b"OpusTags")
    assert {page.flags for page in found[1:-1]} == {0}
    assert [page.granule for page in found[2:-1]] == [1920 * (i + 1) for i in range(len(found) - 3)]
    assert found[-1].flags == ogg.LAST
    assert found[-1].granule == 120 + 2 * len(speech())


def test_int16_and_float32_write_the_same_stream() -> None:
    ints = (speech() * 32767).astype(np.int16)
    as_float = OggOpusWriter(serial=1).append(ints.astype(np.float32) / 32768)
    assert OggOpusWriter(serial=1).append(ints) == as_float
    assert OggOpusWriter(serial=1).append(ints.tobytes(), dtype="int16") == as_float


def test_the_first_call_gives_the_headers_without_samples() -> None:
    writer = OggOpusWriter()
    assert len(ogg.pages(writer.append(np.zeros(0, np.float32)))) == 2
    assert writer.append(np.zeros(959, np.float32)) == b""
    assert len(ogg.pages(writer.append(np.zeros(1, np.float32)))) == 1


def test_a_stream_of_nothing_is_whole() -> None:
    reader = OggOpusReader()
    assert len(reader.append(OggOpusWriter().close())) == reader.pre_skip == 60


def test_writers_draw_their_serials() -> None:
    assert len({ogg.pages(OggOpusWriter().close())[0].serial for _ in range(4)}) == 4


def test_libsndfile_reads_what_we_write() -> None:
    back, rate = soundfile.read(io.BytesIO(stream()), dtype="float32")
    assert rate == 24000
    assert correlation(back, speech()) > 0.99
    assert stoi(speech(), back, 24000) > 0.95


@pytest.mark.parametrize("channels", [1, 2])
def test_we_read_what_libsndfile_writes(channels: int) -> None:
    pcm = np.stack([speech() * 0.9, speech() * 0.7], 1) if channels == 2 else speech()
    reader = OggOpusReader()
    back = read(file_of_libsndfile(pcm), reader=reader)[reader.pre_skip :]
    assert correlation(back, speech()) > 0.9
    assert stoi(speech(), back, 24000) > 0.9
    power = 0.8 if channels == 2 else 1.0
    assert np.sqrt(np.mean(back**2) / np.mean(speech() ** 2)) == pytest.approx(power, rel=0.05)


@pytest.mark.parity
def test_upstreams_reader_and_ours_give_the_same_samples() -> None:
    import sphn

    theirs = sphn.OpusStreamWriter(24000)
    pcm = speech()[: 50 * FRAME]
    data = b"".join(theirs.append_pcm(pcm[i : i + FRAME]) for i in range(0, len(pcm), FRAME))
    for made in (data, stream()[: len(stream()) * 3 // 4]):
        other = sphn.OpusStreamReader(24000)
        found = [other.append_bytes(made[i : i + 500]) for i in range(0, len(made), 500)]
        np.testing.assert_allclose(read(made), np.concatenate(found), atol=1e-6)
    # Its pre-skip is longer than its delay, 156 samples.
    assert correlation(read(data)[156:], pcm[:-156]) > 0.85
    assert stoi(pcm[:-156], read(data)[156:], 24000) > 0.9


# ---- layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 2, 3, 6])
@pytest.mark.parametrize("a_page", [1, 2, 40])
def test_packets_of_20_to_120_ms_in_any_pages_give_the_same_sound(frames: int, a_page: int) -> None:
    parts = packets_of_20_ms()[:120]
    packets = [ogg.joined_packet(parts[i : i + frames]) for i in range(0, 120, frames)]
    made = headers()
    for i in range(0, len(packets), a_page):
        granule = (7 * i) % 5  # says nothing
        made.append(ogg.page(packets[i : i + a_page], len(made), granule))
    expected = read(ogg.join([*headers(), *(ogg.page([p], 2 + i) for i, p in enumerate(parts))]))
    assert len(expected) == 120 * 480
    np.testing.assert_array_equal(read(ogg.join(made)), expected)


def test_a_packet_may_span_pages() -> None:
    parts = packets_of_20_ms()[:12]
    long = [ogg.joined_packet(parts[:6]), ogg.joined_packet(parts[6:])]
    whole = read(ogg.join([*headers(), ogg.page(long[:1], 2), ogg.page(long[1:], 3)]))
    split = [*ogg.cut(ogg.page(long[:1], 2), 1), ogg.page(long[1:], 4)]
    np.testing.assert_array_equal(read(ogg.join(headers() + split)), whole)


def test_tags_as_large_as_a_picture_are_passed_over() -> None:
    head, _ = headers()
    full = ogg.Page(0, ogg.NO_PACKET_ENDS, 1, 1, b"\xff" * 255, b"OpusTags" + bytes(65017))
    tags = [replace(full, number=i, flags=ogg.CONTINUED if i > 1 else 0) for i in range(1, 9)]
    end = ogg.Page(ogg.CONTINUED, 0, 1, 9, b"\x05", b"tags!")
    sound_pages = [replace(page, number=page.number + 8) for page in ogg.pages(stream())[2:]]
    reader = OggOpusReader()
    back = read(ogg.join([head, *tags, end, *sound_pages]), reader=reader)
    assert len(back) == len(decoded()) and (reader.lost, reader.damaged) == (0, 0)
    assert correlation(back, decoded()) > 0.999


def test_streams_may_follow_each_other() -> None:
    other = written(speech()[: 3 * FRAME])
    renamed = ogg.join(replace(page, serial=2) for page in ogg.pages(other))
    back = read(stream() + renamed + stream())
    expected = np.concatenate([decoded(), read(other), decoded()])
    np.testing.assert_array_equal(back, expected)


def test_a_stream_without_an_end_may_be_followed_by_another() -> None:
    begun = ogg.join(ogg.pages(stream())[:12])
    assert len(read(begun + stream())) == 10 * 960 + len(decoded())


def test_streams_of_others_beside_ours_are_passed_over() -> None:
    ours = ogg.pages(stream())
    video = [ogg.page([b"\x80theora" + bytes(20)], 0, flags=ogg.FIRST, serial=9)]
    video += [ogg.page([bytes([i] * 50)], 1 + i, serial=9) for i in range(len(ours))]
    mixed = [video[0], ours[0]]
    for ours_next, video_next in zip(ours[1:], video[1:], strict=False):
        mixed += [video_next, ours_next]
    np.testing.assert_array_equal(read(ogg.join(mixed)), decoded())


def test_the_gain_of_the_header_is_applied_and_its_excess_clipped() -> None:
    sound_pages = ogg.pages(stream())[2:]
    plain = read(ogg.join(headers() + sound_pages))
    quieter = read(ogg.join(headers(gain=-6 * 256) + sound_pages))
    np.testing.assert_allclose(quieter, plain * 10 ** (-6 / 20), atol=1e-4)
    loudest = read(ogg.join(headers(gain=32767) + sound_pages))
    assert np.abs(loudest).max() == 1.0


# ---- loss and damage ---------------------------------------------------------------------------


def test_a_stream_joined_in_the_middle_is_heard() -> None:
    for start in (10000, 10001, 10099):
        reader = OggOpusReader()
        back = read(stream()[start:], reader=reader)
        last = len(decoded()) % 960
        assert (len(back) - last) // 960 == stream().count(b"OggS", start) - 1
        assert correlation(back[FRAME:], decoded()[-len(back) + FRAME :]) > 0.99
        assert (reader.lost, reader.damaged, reader.pre_skip) == (0, 0, 0)


def test_a_lost_page_is_concealed_and_counted() -> None:
    found = ogg.pages(stream())
    reader = OggOpusReader()
    back = read(ogg.join(found[:20] + found[22:]), reader=reader)
    assert (reader.lost, reader.damaged) == (2, 0)
    # the time line goes on; the end is not cut, since the granules were not all seen
    assert 0 <= len(back) - len(decoded()) < 960
    gap = slice(18 * 960, 20 * 960)
    np.testing.assert_array_equal(back[: gap.start], decoded()[: gap.start])
    assert np.abs(back[gap]).max() > 0
    after = slice(gap.stop + 960, len(decoded()))
    assert correlation(back[after], decoded()[after]) > 0.98


def test_a_long_gap_is_concealed_for_a_second_at_most() -> None:
    found = ogg.pages(stream())
    late = [replace(page, number=page.number + 4_000_000_000) for page in found[20:]]
    reader = OggOpusReader()
    back = read(ogg.join(found[:20] + late), reader=reader)
    assert 24000 <= len(back) - len(decoded()) < 24000 + 960
    assert reader.lost == 4_000_000_000


def test_a_page_with_a_bad_checksum_costs_itself_alone() -> None:
    found = list(map(bytes, ogg.pages(stream())))
    found[20] = found[20][:-1] + bytes([found[20][-1] ^ 1])
    reader = OggOpusReader()
    back = read(b"".join(found), reader=reader)
    assert (reader.lost, reader.damaged) == (1, 1)
    assert 0 <= len(back) - len(decoded()) < 960
    np.testing.assert_array_equal(back[: 18 * 960], decoded()[: 18 * 960])


def test_a_damaged_head_does_not_silence_the_stream() -> None:
    data = bytearray(stream())
    data[30] ^= 255
    back = read(bytes(data))
    assert 0 <= len(back) - len(decoded()) < 960
    assert correlation(back[: len(decoded())], decoded()) > 0.999


@pytest.mark.parametrize("packet", [b"", b"\xff\xff", b"\x4b\x00", bytes(61441)])
def test_a_packet_that_cannot_be_decoded_is_concealed_and_counted(packet: bytes) -> None:
    found = ogg.pages(stream())
    bad = ogg.page([packet], found[20].number) if len(packet) < 60000 else None
    if bad is None:
        bad = ogg.Page(0, 0, 1, found[20].number, b"\xff" * 240 + b"\xf1", packet)
    reader = OggOpusReader()
    back = read(ogg.join([*found[:20], bad, *found[21:]]), reader=reader)
    assert (reader.lost, reader.damaged) == (0, 1)
    assert 0 <= len(back) - len(decoded()) < 960
    np.testing.assert_array_equal(back[: 18 * 960], decoded()[: 18 * 960])


def test_bytes_between_pages_are_passed_over() -> None:
    found = list(map(bytes, ogg.pages(stream())))
    reader = OggOpusReader()
    back = read(b"junk OggS OggS\0".join(found), reader=reader)
    np.testing.assert_array_equal(back, decoded())
    assert reader.damaged == len(found) - 1


def test_a_truncated_stream_gives_what_is_whole() -> None:
    for end in (1, 27, 46, 47, 1000, len(stream()) - 1):
        back = read(stream()[:end])
        np.testing.assert_array_equal(back, decoded()[: len(back)])
        assert len(back) % 960 == 0


def garbage() -> bytes:
    return np.random.default_rng(1).bytes(1 << 18)


def endless_packet() -> bytes:
    full = ogg.page([], 0)
    return ogg.join(
        replace(full, number=i, flags=ogg.CONTINUED, lacing=b"\xff" * 255, body=bytes(65025))
        for i in range(6)
    )


def bad_packets() -> bytes:
    return ogg.join(headers() + [ogg.page([b"\xff\xff"], 2 + i) for i in range(60)])


def other_codec() -> bytes:
    first = ogg.page([b"\x01vorbis" + bytes(23)], 0, flags=ogg.FIRST)
    return ogg.join([first, *(ogg.page([bytes([i]) * 4000], i) for i in range(1, 40))])


@pytest.mark.parametrize("made", [garbage, endless_packet, bad_packets, other_codec])
def test_a_stream_without_sound_ends_itself_alone(made: Callable[[], bytes]) -> None:
    neighbour, reader = OggOpusReader(), OggOpusReader()
    half = len(stream()) // 2
    first = neighbour.append(stream()[:half])
    with pytest.raises(AudioError, match="in a row without sound"):
        read(made(), 1000, reader)
    with pytest.raises(AudioError, match="expected a new reader"):
        reader.append(stream())
    rest = neighbour.append(stream()[half:])
    np.testing.assert_array_equal(np.concatenate([first, rest]), decoded())


def test_damage_here_and_there_never_ends_a_stream() -> None:
    rng = np.random.default_rng(5)
    reader = OggOpusReader()
    for _ in range(30):
        data = bytearray(stream())
        for at in rng.integers(0, len(data), 8):
            data[at] = rng.integers(256)
        back = read(bytes(data), reader=reader)
        assert np.isfinite(back).all() and np.abs(back).max() <= 1
        assert len(back) < len(decoded()) + 8 * 24000
    assert reader.damaged > 0 and reader.packets > 1000


def test_more_than_two_channels_are_refused() -> None:
    with pytest.raises(AudioError, match="6 channels, mapping family 0; expected version 1, mono"):
        read(ogg.join(headers(channels=6)))


def test_few_bytes_that_hold_much_sound_are_refused() -> None:
    silence = bytes([0b11100011, 48])  # 48 frames of 2.5 ms, none of them with data
    many = ogg.join([*headers(), ogg.page([silence] * 100, 2)])
    assert len(OggOpusReader(max_seconds=12.1).append(many)) == 12 * 24000
    with pytest.raises(AudioError, match=r"hold more than 2\.0 s of sound"):
        OggOpusReader(max_seconds=2).append(many)


# ---- calls -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0, -1, 44100, 22050])
@pytest.mark.parametrize("kind", [OggOpusReader, OggOpusWriter])
def test_rates_that_opus_does_not_have_are_refused(kind: Any, rate: int) -> None:
    with pytest.raises(AudioError, match=f"rate is {rate}; Opus has 8000"):
        kind(rate)


@pytest.mark.parametrize(
    ("pcm", "sentence"),
    [
        (np.array([0, np.nan], np.float32), "pcm has nan at sample 1"),
        (np.array([np.inf], np.float32), "pcm has inf at sample 0"),
        (np.array([1000.0], np.float32), "pcm has 1000 at sample 0; expected -1 to 1"),
        (np.zeros((2, 3), np.float32), r"shape \(2, 3\); expected one channel"),
        (np.zeros(3), "float64"),
        (b"\0\0", "raw bytes"),
        (None, "NoneType"),
    ],
)
def test_samples_that_are_no_sound_are_refused_and_change_nothing(pcm: Any, sentence: str) -> None:
    writer = OggOpusWriter(serial=1)
    first = writer.append(speech()[:1000])
    with pytest.raises(AudioError, match=sentence):
        writer.append(pcm)
    rest = writer.append(speech()[1000:]) + writer.close()
    assert first + rest == stream()


def test_a_closed_writer_takes_no_more() -> None:
    writer = OggOpusWriter()
    assert writer.close() != b"" and writer.close() == b""
    with pytest.raises(SessionError, match="closed"):
        writer.append(np.zeros(1, np.float32))


@pytest.mark.parametrize("data", ["text", None, 7])
def test_only_bytes_are_read(data: Any) -> None:
    with pytest.raises(TypeError):
        OggOpusReader().append(data)


def test_bytes_of_every_kind_are_read() -> None:
    for kind in (bytes, bytearray, memoryview):
        np.testing.assert_array_equal(OggOpusReader().append(kind(stream())), decoded())


def test_what_the_model_says_arrives_as_it_was_said() -> None:
    question = np.concatenate([sound.speech("what is the opposite of hot"), sound.silence(2)])
    with moshi_c.load() as model, moshi_c.Session(model, seed=3) as session:
        said = session.run(question).pcm
    assert np.abs(said).max() > 0.1
    reader = OggOpusReader()
    back = read(written(said), reader=reader)[reader.pre_skip :]
    assert correlation(said, back) > 0.95
