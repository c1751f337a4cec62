"""Damaged checkpoints, each made from a whole one by a seed, and a process that tries them.

    python tests/damage.py FOLDER WORK FIRST LAST

makes the variants FIRST to LAST of the checkpoint in FOLDER, one after the other in WORK, loads
each, and if it loads holds some frames of conversation with it. What it did is printed as lines of
JSON, the name of a variant before it is touched, so that whoever reads them knows what ended the
process.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Header = dict[str, Any]

#: What takes the place of a value, a size, an offset or a dtype.
NUMBERS: list[Any] = [-1, 0, 1, 2, 3, 7, 0.5, -0.0, 63, 65, 4096, 2**24 + 1, 2**31, 2**53, 2**63]
NUMBERS += [-(2**63), 1e300, -1e300, 10**400]
VALUES: list[Any] = [*NUMBERS, None, True, False, "", "x", "silu", [], [1], [[]], {}, {"a": 1}]
DTYPES = ["F64", "F32", "F16", "BF16", "I8", "U8", "BOOL", "F8_E4M3", "Q4_0", "", 4, None]
DEEP = 100_000


class Files:
    """A copy of a checkpoint's folder, linked until something is changed."""

    def __init__(self, source: Path, folder: Path, rng: random.Random) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder = folder
        self.rng = rng
        for file in source.iterdir():
            os.link(file, folder / file.name)

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        (self.folder / name).unlink(missing_ok=True)
        (self.folder / name).write_bytes(data)

    def named(self, end: str) -> str:
        """One of the files whose name ends so."""
        return self.rng.choice(
            sorted(p.name for p in self.folder.iterdir() if p.name.endswith(end))
        )


# ---- bytes of any file -------------------------------------------------------------------------


def _bits(rng: random.Random, data: bytes, first: int, last: int, count: int) -> bytes:
    changed = bytearray(data)
    for _ in range(count):
        changed[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(files: Files, name: str) -> str:
    data = files.read(name)
    near = files.rng.choice([len(data), min(len(data), 2000), min(len(data), 12)])
    size = files.rng.randrange(near)
    files.write(name, data[:size])
    return f"cut to {size} of {len(data)} bytes"


def grow(files: Files, name: str) -> str:
    more = files.rng.randbytes(files.rng.choice([1, 7, 4096]))
    files.write(name, files.read(name) + more)
    return f"{len(more)} bytes more"


def flip(files: Files, name: str) -> str:
    data = files.read(name)
    count = files.rng.choice([1, 2, 5, 40])
    files.write(name, _bits(files.rng, data, 0, len(data), count))
    return f"{count} bits flipped"


def absent(files: Files, name: str) -> str:
    (files.folder / name).unlink()
    return "gone"


def not_a_file(files: Files, name: str) -> str:
    path = files.folder / name
    path.unlink()
    kind = files.rng.choice(["folder", "loop", "pipe"])
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(name)
    else:
        os.mkfifo(path)
    return f"a {kind} in its place"


def noise(files: Files, name: str) -> str:
    data = files.read(name)
    start = files.rng.randrange(len(data))
    size = files.rng.choice([1, 8, 64, 1000])
    files.write(name, data[:start] + files.rng.randbytes(size) + data[start + size :])
    return f"noise from byte {start}"


ANY = [cut, grow, flip, absent, not_a_file, noise]

# ---- safetensors -------------------------------------------------------------------------------


def _split(data: bytes) -> tuple[Header, bytes]:
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _join(text: bytes, tensors: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + tensors


def _tensors(header: Header) -> list[str]:
    return sorted(name for name in header if name != "__metadata__")


def length_lies(files: Files, name: str) -> str:
    data = files.read(name)
    length = files.rng.choice([0, 1, len(data), 10**8, 10**8 + 1, 2**32, 2**63, 2**64 - 1])
    files.write(name, struct.pack("<Q", length) + data[8:])
    return f"the header's length is {length}"


def flip_length(files: Files, name: str) -> str:
    files.write(name, _bits(files.rng, files.read(name), 0, 8, files.rng.choice([1, 2, 9])))
    return "bits of the header's length flipped"


def flip_header(files: Files, name: str) -> str:
    data = files.read(name)
    (size,) = struct.unpack("<Q", data[:8])
    files.write(name, _bits(files.rng, data, 8, 8 + size, files.rng.choice([1, 2, 4])))
    return "bits of the header flipped"


def flip_data(files: Files, name: str) -> str:
    data = files.read(name)
    (size,) = struct.unpack("<Q", data[:8])
    count = files.rng.choice([1, 10, 300])
    files.write(name, _bits(files.rng, data, 8 + size, len(data), count))
    return f"{count} bits of the weights flipped"


def poison(files: Files, name: str) -> str:
    header, tensors = _split(files.read(name))
    tensor = files.rng.choice(_tensors(header))
    begin, end = header[tensor]["data_offsets"]
    at = begin + files.rng.randrange(max((end - begin) // 4, 1)) * 4
    value = files.rng.choice([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-42])
    changed = tensors[:at] + struct.pack("<f", value) + tensors[at + 4 :]
    files.write(name, _join(json.dumps(header).encode(), changed[: len(tensors)]))
    return f"{value} in {tensor}"


def offsets_lie(files: Files, name: str) -> str:
    header, tensors = _split(files.read(name))
    tensor = files.rng.choice(_tensors(header))
    begin, end = header[tensor]["data_offsets"]
    move = files.rng.choice([-4, -1, 1, 4, 64])
    header[tensor]["data_offsets"] = files.rng.choice(
        [[begin + move, end + move], [begin, end + move], [begin + move, end], [end, begin],
         [begin], [begin, end, end], [begin, files.rng.choice(NUMBERS)],
         [files.rng.choice(NUMBERS), end],
         [str(begin), str(end)], None, [begin, 2**62]]
    )  # fmt: skip
    files.write(name, _join(json.dumps(header).encode(), tensors))
    return f"offsets of {tensor}: {str(header[tensor]['data_offsets'])[:60]}"


def dtype_lies(files: Files, name: str) -> str:
    header, tensors = _split(files.read(name))
    tensor = files.rng.choice(_tensors(header))
    header[tensor]["dtype"] = dtype = files.rng.choice(DTYPES)
    if files.rng.random() < 0.3:
        del header[tensor]["dtype"]
    files.write(name, _join(json.dumps(header).encode(), tensors))
    return f"dtype of {tensor}: {dtype!r}"


def shape_lies(files: Files, name: str) -> str:
    header, tensors = _split(files.read(name))
    tensor = files.rng.choice(_tensors(header))
    shape = header[tensor]["shape"]
    some = files.rng.choice(NUMBERS)
    header[tensor]["shape"] = files.rng.choice(
        [shape[::-1], [*shape, 1], [1, *shape], [some, *shape[1:]], [*shape, some], [2**62, 4], [],
         shape * 5, None, [-1, -1], ["4"], [[4]], [0, *shape[1:]]]
    )  # fmt: skip
    files.write(name, _join(json.dumps(header).encode(), tensors))
    return f"shape of {tensor}: {str(header[tensor]['shape'])[:60]}"


def reshaped(files: Files, name: str) -> str:
    """A whole file in which one tensor has fewer rows, another type, another name, or is gone."""
    header, tensors = _split(files.read(name))
    victim = files.rng.choice(_tensors(header))
    kind = files.rng.choice(["rows", "type", "name", "gone", "extra", "empty"])
    made: Header = {}
    data = b""
    for tensor in sorted(_tensors(header), key=lambda t: header[t]["data_offsets"]):
        entry = header[tensor]
        begin, end = entry["data_offsets"]
        part, shape, dtype, key = tensors[begin:end], entry["shape"], entry["dtype"], tensor
        if tensor == victim:
            if kind == "gone":
                continue
            if kind == "rows" and shape:
                part, shape = part[: len(part) // shape[0]], [1, *shape[1:]]
            elif kind == "empty":
                part, shape = b"", [0]
            elif kind == "type":
                part, dtype = part[: len(part) // 2], files.rng.choice(["F16", "BF16", "I16"])
            elif kind == "name":
                key += files.rng.choice([".weight", "\n", "\u202e", "é" * 300, "\x00", " "])
        made[key] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(part)],
        }
        data += part
    if kind == "extra":
        made["an.extra.tensor"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data)] * 2}
        made["an.extra.tensor"]["data_offsets"][1] += 4
        data += b"\0" * 4
    files.write(name, _join(json.dumps(made).encode(), data))
    return f"{kind}: {victim}"


def header_lies(files: Files, name: str) -> str:
    header, tensors = _split(files.read(name))
    text = json.dumps(header).encode()
    first = files.rng.choice(_tensors(header)).encode()
    kinds = {
        "deep": b"[" * DEEP + b"]" * DEEP,
        "deep objects": b'{"a":' * DEEP,
        "a list": b"[]",
        "nothing": b"",
        "twice": text[:-1] + b',"' + first + b'":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        "metadata": text[:-1] + b',"__metadata__":[1,2]}',
        "UTF-16": json.dumps(header).encode("utf-16"),
        "commas": b"[" + b"," * 3_000_000 + b"]",
        "a number": b"1" * 100_000,
        "zeros": b"\0" * len(text),
    }
    kind = files.rng.choice(sorted(kinds))
    files.write(name, _join(kinds[kind], tensors))
    return f"header is {kind}"


SAFETENSORS = [length_lies, flip_length, flip_header, flip_data, poison, offsets_lie, dtype_lies]
SAFETENSORS += [shape_lies, reshaped, header_lies]

# ---- JSON --------------------------------------------------------------------------------------


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    return [
        place for key, inner in items for place in [(*path, key), *_places(inner, (*path, key))]
    ]


def value_lies(files: Files, name: str) -> str:
    config = json.loads(files.read(name))
    words = []
    for _ in range(files.rng.choice([1, 1, 1, 3])):
        path = files.rng.choice(_places(config))
        inner = config
        for key in path[:-1]:
            inner = inner[key]
        if files.rng.random() < 0.2:
            del inner[path[-1]]
            words.append(f"{path} gone")
        else:
            old, new = inner[path[-1]], files.rng.choice(VALUES)
            if isinstance(old, int) and abs(old) < 2**53 and files.rng.random() < 0.4:
                new = files.rng.choice([old + 1, old - 1, old * 2, -old, old * 1000, old + 0.5])
            if isinstance(old, str) and files.rng.random() < 0.4:
                new = files.rng.choice(
                    ["../" + old, "/" + old, old + "\0", old * 400, "hf://x/y/z"]
                )
            inner[path[-1]] = new
            words.append(f"{path} = {str(new)[:40]!r}")
        if not config:
            break
    files.write(name, json.dumps(config).encode())
    return ", ".join(words)


def text_lies(files: Files, name: str) -> str:
    text = files.read(name)
    deep_key = b'{"dim": ' + b"[" * DEEP + b"]" * DEEP + b"}"
    kinds = {
        "deep": b"[" * DEEP,
        "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
        "deep in a key": deep_key,
        "a list": b"[" + text + b"]",
        "a text": b'"' + b"x" * 100_000 + b'"',
        "a number": b"1" * 100_000,
        "a long number": text.replace(b": ", b": " + b"9" * 5000, 1),
        "nothing": b"",
        "spaces": b" " * 1_000_000,
        "null": b"null",
        "NaN": text.replace(b": ", b": NaN,", 1),
        "marked": b"\xef\xbb\xbf" + text,
        "UTF-16": text.decode().encode("utf-16"),
        "broken UTF-8": text.replace(b'"', b'"\xff', 1),
        "twice": text + text,
        "comments": b"// config\n" + text,
        "keys": b"{" + b",".join(b'"%d":1' % i for i in range(50_000)) + b"}",
    }
    kind = files.rng.choice(sorted(kinds))
    files.write(name, kinds[kind])
    return f"text is {kind}"


JSON = [value_lies, value_lies, value_lies, text_lies]

# ---- one variant -------------------------------------------------------------------------------

Change = Callable[[Files, str], str]

#: Ends of file names, what is done to them, and how often.
TARGETS: list[tuple[str, list[Change], int]] = [
    ("model.safetensors", SAFETENSORS, 6),
    ("mimi.safetensors", SAFETENSORS, 3),
    (".index.json", JSON, 1),
    ("config.json", JSON, 5),
    ("mimi.json", JSON, 3),
    ("tokenizer.model", [flip, flip, flip, noise, cut], 3),
]


def damage(source: Path, folder: Path, seed: int) -> tuple[str, str]:
    """Makes variant `seed` of a checkpoint. Returns the file's name and what was done to it."""
    rng = random.Random(seed)
    files = Files(source, folder, rng)
    there = [p.name for p in source.iterdir()]
    ends = [(end, changes, weight) for end, changes, weight in TARGETS
            if any(name.endswith(end) for name in there)]  # fmt: skip
    end, changes, _ = rng.choices(ends, [weight for *_, weight in ends])[0]
    name = files.named(end)
    change = rng.choice(changes if rng.random() < 0.85 else ANY)
    return name, f"{change.__name__}: {change(files, name)}"


# ---- trying it ---------------------------------------------------------------------------------


def use(folder: Path) -> None:
    """Loads a checkpoint and talks with it for a moment; any exception is the caller's to judge."""
    import moshi_c

    silence = np.zeros(1920, np.float32)
    with moshi_c.load(folder, max_sessions=2, threads=1, progress=False) as model:
        size = model.frame_size
        with moshi_c.Session(model, seed=1) as session:
            for _ in range(model.max_delay + 2):
                frame = session.step(np.resize(silence, size))
                assert frame.pcm is None or np.isfinite(frame.pcm).all(), "the voice is not finite"
                frame.text.encode()
        codes = model.mimi.encode(np.resize(silence, size))
        assert ((codes >= 0) & (codes < model.mimi.codebook_size)).all(), "codes out of range"
        assert np.isfinite(model.mimi.decode(codes)).all(), "the codec's sound is not finite"
        if model.tokenizer is not None:
            model.tokenizer.decode(range(-2, model.tokenizer.vocab_size + 2)).encode()
            model.tokenizer.encode("hello, what's your name? \u20ac")


class Bystander:
    """A conversation that goes on beside it all."""

    def __init__(self) -> None:
        import moshi_c

        self._session = moshi_c.Session(moshi_c.load(threads=1), seed=1)
        self._voice = np.random.default_rng(0).normal(0, 0.1, (4, 1920)).astype(np.float32)
        self._expected: list[bytes] = []

    def talk(self) -> None:
        """Says what it said the first time."""
        said = [self._session.step(frame).user_codes.tobytes() for frame in self._voice]
        self._session.reset()
        self._expected = self._expected or said
        assert said == self._expected, "a damaged checkpoint changed another conversation"


def main(source: str, work: str, first: str, last: str) -> None:
    folder = Path(work)
    bystander = Bystander()
    for seed in range(int(first), int(last)):
        name, what = damage(Path(source), folder, seed)
        print(json.dumps({"seed": seed, "file": name, "damage": what}), flush=True)
        kind = message = ""
        try:
            use(folder)
        except Exception as error:
            kind, message = type(error).__name__, str(error)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        if seed % 50 == 0:
            bystander.talk()
        outcome = {"seed": seed, "error": kind, "message": message, "peak_mb": peak}
        print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
