"""The codec hears and sounds as upstream's does.

Upstream's Mimi runs live on the CPU with random weights of the published sizes, whose codebooks
hold residuals of sound that is not in the test. Proven here: the codes of a minute of speech,
music, noise and silence, but for ties; sound within float32 rounding; streaming past the ten
seconds at which upstream's ring loses a key; any length, batch and number of codebooks; and that
the comparison would notice two rows of any tensor changing places.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import sound
import torch
import upstream
from conftest import Conversation
from moshi.models import MimiModel
from safetensors.torch import load_file
from tolerances import bound
from upstream import Codes, Floats

import moshi_c

pytestmark = [pytest.mark.parity, pytest.mark.timeout(900)]

FRAME = sound.FRAME


@dataclass(frozen=True)
class Minute:
    """What upstream makes of the minute, without streaming."""

    mimi: MimiModel  # with all 32 codebooks
    pcm: Floats
    latents: Floats  # [C, T]
    codes: Codes  # [32, T]


@pytest.fixture(scope="module")
def minute(mimi_full: Path) -> Minute:
    mimi = upstream.load_mimi(mimi_full, 32)
    pcm = sound.minute()
    latents = upstream.latents_of(mimi, pcm)
    codes = mimi.quantizer.encode(torch.from_numpy(latents)[None])[0].numpy()
    return Minute(mimi, pcm, latents, codes)


@pytest.fixture(scope="module")
def small(mimi_small: Path) -> MimiModel:
    return upstream.load_mimi(mimi_small, 32)


def assert_same_codes(
    mimi: MimiModel, latents: Floats, ours: Codes, theirs: Codes, frames: float
) -> None:
    """Equal but for at most so many frames, each of which is a tie where it first differs."""
    assert ours.shape == theirs.shape and ours.dtype == np.int32
    found = upstream.Quantizers(mimi).disagreements(latents, ours.astype(np.int64), theirs)
    assert all(abs(one.gap) < bound("mimi_tie") for one in found), found
    assert len({one.frame for one in found}) <= frames, found


def far(ours: Floats, theirs: Floats) -> float:
    """Largest difference of two sounds."""
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    return float(np.abs(ours - theirs).max())


# ---- a minute of sound, published sizes --------------------------------------------------------


@pytest.mark.slow
def test_the_minute_uses_many_codes_of_every_codebook(minute: Minute) -> None:
    distinct = [len(set(row.tolist())) for row in minute.codes]
    assert len(distinct) == 32 and min(distinct) >= bound("distinct_codes")


@pytest.mark.slow
@pytest.mark.parametrize(("codebooks", "frames"), [(8, 750), (32, 200)])
def test_codes_of_a_minute_equal_upstreams_but_for_ties(
    mimi_full: Path, minute: Minute, codebooks: int, frames: int
) -> None:
    """The minute with the eight codebooks that Moshi uses; its beginning with all of them."""
    mimi = moshi_c.load_mimi(str(mimi_full), codebooks=codebooks)
    ours = mimi.encode(minute.pcm[: frames * FRAME])
    theirs = minute.codes[:codebooks, :frames]
    assert_same_codes(minute.mimi, minute.latents, ours, theirs, bound("mimi_frames"))


@pytest.mark.slow
def test_sound_equals_upstreams(mimi_full: Path, minute: Minute) -> None:
    """Half a minute, decoded at once; the session test decodes a conversation frame by frame."""
    codes = np.ascontiguousarray(minute.codes[:8, 200:575])
    theirs = upstream.decode(minute.mimi, codes)
    assert theirs.std() > 0.02 and np.abs(theirs).max() < 1
    ours = moshi_c.load_mimi(str(mimi_full)).decode(codes.astype(np.int32))
    assert far(ours, theirs) <= bound("mimi_sound")


@pytest.mark.slow
def test_streaming_equals_upstreams_streaming_past_ten_seconds(
    mimi_full: Path, conversation: Conversation
) -> None:
    """As the live server: a first frame, a reset, then 24 s; every decision is clear of ties."""
    run, frames = conversation.run, 301
    stream = moshi_c.load_mimi(str(mimi_full)).stream()
    for index, chunk in enumerate(run.pcm.reshape(-1, FRAME)[:frames]):
        assert stream.encode(chunk).tolist() == run.user_codes[index].tolist(), f"frame {index}"
        if index == 0:
            stream.reset()
    silent = run.lm.silent
    said = [stream.decode(row[1:].astype(np.int32)) for row in run.lm.out[silent:frames]]
    assert far(np.concatenate(said), run.sound[silent * FRAME : frames * FRAME]) <= bound(
        "mimi_sound"
    )


@pytest.mark.slow
def test_whole_files_are_decoded_with_the_full_window(
    mimi_full: Path, conversation: Conversation, minute: Minute
) -> None:
    """Past ten seconds upstream's streaming loses a key for one of two half frames, files none."""
    run = conversation.run
    frames = slice(run.lm.silent, run.lm.silent + 150)
    codes = np.ascontiguousarray(run.lm.out[frames, 1:].T)
    theirs = upstream.decode(minute.mimi, codes)
    streamed = run.sound[frames.start * FRAME : frames.stop * FRAME]
    assert far(streamed[: 125 * FRAME], theirs[: 125 * FRAME]) <= bound("mimi_sound")
    assert far(streamed[125 * FRAME :], theirs[125 * FRAME :]) > bound("mimi_stream_window")
    ours = moshi_c.load_mimi(str(mimi_full)).decode(codes.astype(np.int32))
    assert far(ours, theirs) <= bound("mimi_sound")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_narrow_weights_keep_most_codes_and_the_sound(mimi_full: Path, dtype: str) -> None:
    exact = moshi_c.load_mimi(mimi_full)
    narrow = moshi_c.load_mimi(mimi_full, dtype=dtype)
    assert (exact.dtype, narrow.dtype) == ("f32", dtype)
    pcm = sound.minute()[: 30 * FRAME]
    codes, ours = exact.encode(pcm), narrow.encode(pcm)
    assert (ours == codes).mean() >= bound(f"mimi_codes_{dtype}")
    assert (ours != codes).any()
    said = exact.decode(codes)
    noise = narrow.decode(codes) - said
    assert 10 * np.log10((said**2).sum() / (noise**2).sum()) >= bound(f"mimi_snr_{dtype}")


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8"])
def test_files_equal_streams_bit_for_bit_while_the_window_is_not_full(
    mimi_small: Path, dtype: str
) -> None:
    """However many frames a call takes, of however many signals."""
    mimi = moshi_c.load_mimi(mimi_small, dtype=dtype, codebooks=32)
    pcm = np.stack([sound.minute()[row * 99_000 :][: 10 * FRAME] for row in range(9)])
    codes = mimi.encode(pcm)
    said = mimi.decode(codes)
    for row in (0, 8):
        stream = mimi.stream()
        chunks = pcm[row].reshape(-1, FRAME)
        assert (np.stack([stream.encode(chunk) for chunk in chunks], 1) == codes[row]).all()
        spoken = [stream.decode(np.ascontiguousarray(column)) for column in codes[row].T]
        assert (np.concatenate(spoken) == said[row]).all()
        assert (mimi.encode(pcm[row]) == codes[row]).all()


def test_a_stream_goes_on_only_with_weights_of_its_format(mimi_small: Path) -> None:
    data = moshi_c.load_mimi(mimi_small).stream().snapshot()
    with pytest.raises(moshi_c.CheckpointError, match="codec"):
        moshi_c.load_mimi(mimi_small, dtype="bf16").stream().restore(data)


LONG = """
import resource, sys
import numpy as np, moshi_c
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mimi = moshi_c.load_mimi(sys.argv[1])
pcm = np.random.default_rng(0).uniform(-0.1, 0.1, 3000 * 1920).astype(np.float32)
said = np.empty_like(pcm)
said[:] = mimi.decode(np.concatenate([mimi.encode(pcm[: 60 * 1920])] * 50, 1))
before = peak()
codes = mimi.encode(pcm)
print(peak() - before)
del said
mimi.decode(codes)
print(peak() - before)
"""


def test_long_files_take_no_more_memory_than_short_ones(mimi_small: Path) -> None:
    """Four minutes, whose widest layer would be 180 MB at once; besides the sound itself."""
    run = [sys.executable, "-c", LONG, str(mimi_small)]
    done = subprocess.run(run, capture_output=True, text=True, check=True, timeout=120)
    assert all(int(kilobytes) < 8000 for kilobytes in done.stdout.split()), done.stdout


# ---- every length, batch and number of codebooks, small sizes ----------------------------------


@pytest.mark.parametrize(
    "samples", [1, 960, 1919, 1920, 1921, 5 * 1920, 7 * 1920 + 5, 40 * 1920 - 1, 41 * 1920 + 961]
)
def test_any_length_gives_upstreams_codes_and_sound(
    mimi_small: Path, small: MimiModel, samples: int
) -> None:
    mimi = moshi_c.load_mimi(str(mimi_small), codebooks=32)
    pcm = sound.minute()[20000 : 20000 + samples]
    theirs = upstream.encode(small, pcm)
    latents = upstream.latents_of(small, pcm)
    assert_same_codes(small, latents, mimi.encode(pcm), theirs, bound("mimi_frames"))
    ours = mimi.decode(theirs.astype(np.int32))
    assert far(ours, upstream.decode(small, theirs)) <= bound("mimi_sound")


@pytest.mark.parametrize("codebooks", range(1, 33))
def test_any_number_of_codebooks_gives_upstreams_codes_and_sound(
    mimi_small: Path, codebooks: int
) -> None:
    reference = upstream.load_mimi(mimi_small, codebooks)
    mimi = moshi_c.load_mimi(str(mimi_small), codebooks=codebooks)
    assert mimi.codebooks == codebooks
    pcm = sound.minute()[: 10 * FRAME]
    theirs = upstream.encode(reference, pcm)
    assert theirs.shape == (codebooks, 10)
    latents = upstream.latents_of(reference, pcm)
    assert_same_codes(reference, latents, mimi.encode(pcm), theirs, 1)
    ours = mimi.decode(theirs.astype(np.int32))
    assert far(ours, upstream.decode(reference, theirs)) <= bound("mimi_sound")


@pytest.mark.parametrize("codebooks", [1, 2, 7, 31])
def test_decoding_uses_as_many_codebooks_as_it_is_given(
    mimi_small: Path, small: MimiModel, codebooks: int
) -> None:
    mimi = moshi_c.load_mimi(str(mimi_small), codebooks=32)
    rng = np.random.default_rng(codebooks)
    codes = rng.integers(0, small.cardinality, (codebooks, 30))
    ours = mimi.decode(codes.astype(np.int32))
    assert far(ours, upstream.decode(small, codes)) <= bound("mimi_sound")


@pytest.mark.parametrize("rows", [1, 3])
def test_batches_equal_upstreams_and_their_rows_alone(
    mimi_small: Path, small: MimiModel, rows: int
) -> None:
    mimi = moshi_c.load_mimi(str(mimi_small), codebooks=32)
    samples = 12 * FRAME + 700
    pcm = np.stack([sound.minute()[row * 99_000 :][:samples] for row in range(rows)])
    theirs = upstream.encode(small, pcm)
    ours = mimi.encode(pcm)
    assert ours.shape == theirs.shape == (rows, 32, 13)
    back = mimi.decode(theirs.astype(np.int32))
    assert far(back, upstream.decode(small, theirs)) <= bound("mimi_sound")
    for row in range(rows):
        latents = upstream.latents_of(small, pcm[row])
        assert_same_codes(small, latents, ours[row], theirs[row], 1)
        assert (ours[row] == mimi.encode(pcm[row])).all()
        assert (back[row] == mimi.decode(theirs[row].astype(np.int32))).all()


def test_small_codec_streams_as_upstreams_does_past_its_window(
    mimi_small: Path, small: MimiModel
) -> None:
    """Both files named by `mimi_config_name`; the window is 20 half frames, the sound 60 frames."""
    pcm = sound.minute()[: 60 * FRAME]
    codes, theirs = upstream.stream(small, pcm)
    assert (codes != upstream.encode(small, pcm)).any()
    stream = moshi_c.load_mimi(str(mimi_small), codebooks=32).stream()
    ours = np.stack([stream.encode(chunk) for chunk in pcm.reshape(-1, FRAME)], 1)
    assert (ours != codes).any(0).sum() <= 1
    back = np.concatenate([stream.decode(column.astype(np.int32)) for column in codes.T])
    assert far(back, theirs) <= bound("mimi_sound")


def test_rows_of_a_batched_stream_equal_streams_alone(mimi_small: Path) -> None:
    mimi = moshi_c.load_mimi(str(mimi_small), codebooks=8)
    pcm = np.stack([sound.minute()[row * 99_000 :][: 25 * FRAME] for row in range(3)])
    together, alone = mimi.stream(batch=3), [mimi.stream() for _ in range(3)]
    for frame in range(25):
        chunk = np.ascontiguousarray(pcm[:, frame * FRAME : (frame + 1) * FRAME])
        codes = together.encode(chunk)
        back = together.decode(codes)
        assert codes.shape == (3, 8) and back.shape == (3, FRAME)
        for row, stream in enumerate(alone):
            assert (codes[row] == stream.encode(chunk[row])).all()
            assert (back[row] == stream.decode(codes[row])).all()


# ---- every tensor ------------------------------------------------------------------------------


@pytest.mark.slow
def test_swapping_two_rows_of_any_tensor_changes_codes_or_sound(
    mimi_small: Path, small: MimiModel, tmp_path: Path
) -> None:
    pcm = sound.minute()[: 40 * FRAME]
    theirs = upstream.encode(small, pcm)
    spoken = upstream.decode(small, theirs)
    quantizers = upstream.Quantizers(small)
    latents = upstream.latents_of(small, pcm)

    def noticed(folder: Path) -> bool:
        mimi = moshi_c.load_mimi(str(folder), codebooks=32)
        codes = mimi.encode(pcm).astype(np.int64)
        wrong = quantizers.disagreements(latents, codes, theirs)
        heard = any(abs(one.gap) >= bound("mimi_tie") for one in wrong)
        return heard or far(mimi.decode(theirs.astype(np.int32)), spoken) > bound("mimi_sound")

    assert not noticed(mimi_small)
    unnoticed = []
    state = load_file(mimi_small / checkpoints.MIMI_NAME)
    for index, (name, value) in enumerate(sorted(state.items())):
        rows = checkpoints.rows_of(value)
        if rows < 2:
            continue  # one output channel, or a flag
        pair = sorted(np.random.default_rng(index).choice(rows, 2, replace=False).tolist())
        if value.numel() == value.shape[-1]:  # entries of a vector may be equal by chance
            pair = [int(value.argmin()), int(value.argmax())]
        if "_codebook" in name:  # two entries that this sound uses
            level = 0 if ".rvq_first." in name else 1 + int(name.split(".layers.")[1].split(".")[0])
            used = np.unique(theirs[level])
            pair = [int(used[0]), int(used[-1])]
        folder = checkpoints.mutate(
            mimi_small,
            tmp_path / str(index),
            lambda state, name=name, pair=pair: checkpoints.swap_rows(state, name, *pair),
            checkpoints.MIMI_NAME,
        )
        if not noticed(folder):
            unnoticed.append((name, pair))
    assert unnoticed == []


@pytest.mark.parametrize("rows", [1, 3])
def test_a_whole_signal_has_the_same_bits_beside_streams(mimi_small: Path, rows: int) -> None:
    """Passes are shorter while a stream may be waiting for its turn."""
    mimi = moshi_c.load_mimi(str(mimi_small), codebooks=8)
    pcm = np.stack([sound.minute()[row * 99_000 :][: 400 * FRAME] for row in range(rows)])
    codes = mimi.encode(pcm)
    voice = mimi.decode(codes)
    with mimi.stream():
        assert (mimi.encode(pcm) == codes).all() and (mimi.decode(codes) == voice).all()
    assert (mimi.encode(pcm) == codes).all()
