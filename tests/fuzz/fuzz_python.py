"""The readers of files that are written in Python, on damaged files.

    python tests/fuzz/fuzz_python.py [--seconds 60] [--inputs N] [--seed 0] [--found build/fuzz]

First each file of corpus/NAME as it is, then random changes of them, the same for the same seed. A
reader may give a result or its own error in one sentence that names the file; anything else is
broken: another exception, a crash, more than LIMIT_S seconds, more than LIMIT_BYTES of memory.
Inputs are read in child processes, which the first broken promise ends; the input is kept in the
folder `--found`.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import moshi_c
from moshi_c import AudioError, CheckpointError
from moshi_c.audio import read_audio
from moshi_c.codec_file import read_codec_file
from moshi_c.tokenizer import Tokenizer

CORPUS = Path(__file__).resolve().parent / "corpus"
LIMIT_S = 10
LIMIT_BYTES = 128 << 20
MAX_BYTES = 1 << 16  # of an input
CHUNK = 100  # inputs a child reads

# ---- the readers -------------------------------------------------------------------------------


def read_sound(path: Path) -> None:
    pcm = read_audio(path, 24000)
    assert pcm.dtype == np.float32, f"samples of type {pcm.dtype}"
    assert pcm.ndim == 1, f"samples of shape {pcm.shape}"
    assert np.isfinite(pcm).all(), "samples that are not finite"


def read_codes(path: Path) -> None:
    file = read_codec_file(path)
    assert file.codes.ndim == 2, f"codes of shape {file.codes.shape}"
    in_range = (file.codes >= 0) & (file.codes < file.codebook_size)
    assert in_range.all(), "codes that are not in their codebook"
    frames = file.codes.shape[1]
    assert 0 <= file.samples <= frames * file.frame_size, f"{file.samples} samples, {frames} frames"


def read_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer(path)
    tokens = tokenizer.encode("a bab é 한")
    assert all(0 <= token < tokenizer.vocab_size for token in tokens), f"the tokens {tokens}"
    tokenizer.decode(range(-1, tokenizer.vocab_size + 1))


@functools.lru_cache
def _open_model(process: int) -> moshi_c.Model:
    """One for each process: a forked one cannot use another's."""
    return moshi_c.load(CORPUS.parent / "model", threads=1)


def read_note(path: Path) -> None:
    """In the place of the note of a snapshot; a session that opens can be talked to."""
    data = (CORPUS / "snapshot" / "seed-begun").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, body, note = json.loads(data[8 : 8 + size]), data[8 + size :], path.read_bytes()
    first = header["note"]["data_offsets"][0]  # it is the last
    header["note"].update(shape=[len(note)], data_offsets=[first, first + len(note)])
    text = json.dumps(header).encode()
    model = _open_model(os.getpid())
    data = struct.pack("<Q", len(text)) + text + body[:first] + note
    with moshi_c.Session.from_snapshot(model, data) as session:
        for _ in range(3):
            try:
                frame = session.step(np.zeros(session.frame_size, np.float32))
            except moshi_c.SessionError:
                break
            assert frame.pcm is not None and np.isfinite(frame.pcm).all(), "no voice"


READERS: dict[str, tuple[Callable[[Path], None], type[Exception]]] = {
    "audio": (read_sound, AudioError),
    "mimi": (read_codes, AudioError),
    "tokenizer": (read_tokenizer, CheckpointError),
    "note": (read_note, CheckpointError),
}


def read(name: str, path: Path) -> None:
    """Reads one file; what comes out of here as an exception is a broken promise."""
    reader, expected = READERS[name]
    try:
        reader(path)
    except expected as error:
        sentence = str(error)
        assert sentence.isprintable(), f"not one line of text: {sentence!r}"
        named = str(path) in sentence or sentence.startswith("snapshot: ")
        assert named, f"does not name the file: {sentence!r}"


# ---- damage ------------------------------------------------------------------------------------

_EDGES = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 1 << 20, 0x7FFFFFFF)
_EDGES += (0x80000000, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1)


def damage(seeds: list[bytes], rng: np.random.Generator) -> bytes:
    """One of the seeds after a few random changes, most of them near its start."""
    data = bytearray(seeds[rng.integers(len(seeds))])
    for _ in range(int(rng.integers(1, 6))):
        near = len(data) if rng.random() < 0.3 else min(len(data), 128)
        at = int(rng.integers(near + 1))
        end = min(len(data), at + int(rng.integers(1, 33)))
        match rng.integers(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << int(rng.integers(8))
            case 1:
                size, order = int(2 ** rng.integers(4)), rng.choice(("little", "big"))
                value = _EDGES[rng.integers(len(_EDGES))] & ((1 << 8 * size) - 1)
                data[at : at + size] = value.to_bytes(size, order)
            case 2:
                del data[at:end]
            case 3:
                data[at:at] = data[at:end] * int(rng.integers(1, 9))
            case 4:
                data[at:end] = rng.bytes(end - at)
            case 5:
                del data[at:]
            case _:
                other = seeds[rng.integers(len(seeds))]
                start = int(rng.integers(len(other) + 1))
                data[at:at] = other[start : start + int(rng.integers(1, 257))]
    return bytes(data[:MAX_BYTES])


def inputs(name: str, seed: int) -> Iterator[bytes]:
    """The corpus, then damage without end."""
    seeds = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    yield from seeds
    rng = np.random.default_rng(seed)
    while True:
        yield damage(seeds, rng)


# ---- children ----------------------------------------------------------------------------------


@dataclass
class Broken:
    """A promise that an input broke."""

    data: bytes
    why: str


def _read_chunk(name: str, path: Path, chunk: list[bytes], pipe: Any) -> None:
    # In use before the first input, so that the limit is for the reader alone.
    for seed in sorted((CORPUS / name).glob("seed-[bp]*")):
        read(name, seed)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, resource.RLIM_INFINITY))
    with Path("/dev/null").open("wb") as nowhere:  # the decoders' own remarks
        os.dup2(nowhere.fileno(), 2)
    for data in chunk:
        path.write_bytes(data)
        signal.alarm(LIMIT_S)
        try:
            read(name, path)
        except BaseException as error:
            pipe.send(f"{type(error).__name__}: {error}")
            return
    signal.alarm(0)
    pipe.send("")


def read_all(name: str, chunk: list[bytes]) -> Broken | None:
    """Reads the inputs in a child; the first that breaks a promise, if any."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input"
        ours, theirs = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("fork")
        child = context.Process(target=_read_chunk, args=(name, path, chunk, theirs))
        child.start()
        theirs.close()
        child.join()
        try:
            why = str(ours.recv())
        except EOFError:
            code = child.exitcode or 0
            ended = "ran for too long" if code == -signal.SIGALRM else f"crashed with {code}"
            why = f"the reader {ended}"
        return Broken(path.read_bytes() if path.exists() else b"", why) if why else None


def fuzz(name: str, seed: int, count: int | None, seconds: float) -> tuple[int, Broken | None]:
    """How many inputs were read, and the first that broke a promise."""
    source, done, end = inputs(name, seed), 0, time.monotonic() + seconds
    while time.monotonic() < end and (count is None or done < count):
        size = CHUNK if count is None else min(CHUNK, count - done)
        broken = read_all(name, list(islice(source, size)))
        done += size
        if broken:
            return done, broken
    return done, None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="for each reader, at most")
    parser.add_argument("--inputs", type=int, help="for each reader, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--found", type=Path, default=Path("build/fuzz"))
    options = parser.parse_args()
    failed = 0
    for name in READERS:
        count, broken = fuzz(name, options.seed, options.inputs, options.seconds)
        print(f"{name}: {count} inputs", flush=True)
        if broken:
            failed += 1
            options.found.mkdir(parents=True, exist_ok=True)
            kept = options.found / f"found-{name}-{hashlib.sha1(broken.data).hexdigest()[:10]}"
            kept.write_bytes(broken.data)
            print(f"{kept}: {broken.why}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
