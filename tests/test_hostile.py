"""Hostile files and calls: one exception of a documented class, one sentence, and everything else
lives on. The tests are named after numbered faults that a user meets; each begins at the public
surface."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import damage
import fake_hub
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

import moshi_c
from moshi_c import AudioError, CheckpointError, Model, Session, SessionError, convert

if TYPE_CHECKING:
    from conftest import Checkpoints

FRAME = 1920
SILENCE = np.zeros(FRAME, np.float32)
TESTS = Path(__file__).parent

LM, MIMI, CONFIG, PIECES = "model.safetensors", "mimi.safetensors", "config.json", "tokenizer.model"


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with moshi_c.load() as model:
        yield model


@pytest.fixture(scope="module")
def rows(made: Checkpoints) -> Path:
    """A small checkpoint with every kind of tensor and config."""
    return made.lm("rows")


def sound(frames: int, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(frames * FRAME)).astype(np.float32)


def codes_of(session: Session, pcm: NDArray[np.float32]) -> list[bytes]:
    frames = [session.step(frame) for frame in pcm.reshape(-1, FRAME)]
    return [b"" if frame.codes is None else frame.codes.tobytes() for frame in frames]


def copied(source: Path, target: Path, **changes: Callable[[bytes], bytes]) -> Path:
    """A copy of a folder with some files changed; `model_safetensors=` stands for its name."""
    shutil.copytree(source, target)
    for key, change in changes.items():
        file = target / key.replace("_", ".", 1)
        file.write_bytes(change(file.read_bytes()))
    return target


def configured(source: Path, target: Path, **values: Any) -> Path:
    """A copy of a folder with some values of its config changed."""
    change = lambda text: json.dumps(json.loads(text) | values).encode()  # noqa: E731
    return copied(source, target, config_json=change)


def with_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """A safetensors file whose header went through `change`, which may return a new one."""

    def apply(data: bytes) -> bytes:
        header, tensors = damage._split(data)
        header = change(header) or header
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return damage._join(text, tensors)

    return apply


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def process(*arguments: Any, timeout: float = 600, **environment: str) -> tuple[int, str, str]:
    """Runs Python; exit code, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=os.environ | environment,
    )
    return done.returncode, done.stdout, done.stderr


# ---- damaged checkpoints -----------------------------------------------------------------------

#: A message says what was found and what was expected, or what is missing, and where.
_SAYS = re.compile(
    r"expected|does not exist|is empty|but only \d|but the file has only|overlaps|is not part of|"
    r"JSON line \d+, column \d+: |is not JSON: line \d+, column \d+: |cannot open the file: \w|"
    r"cannot be reached|step by codes"
)
#: What belongs into a traceback, not into a sentence for users.
_INTERNALS = re.compile(
    r"Traceback|\b(Key|Type|Value|Index|Attribute|Unicode\w*|Recursion|Runtime)Error|object at 0x|"
    r"NoneType|codec can|\bsys\.|\.cc\(|\.py\b|Errno|recursion|list index|unhashable|subscript"
)


def vague(message: str, names: list[str]) -> str:
    """What is wrong with a message; "" when it is one sentence that tells what and where."""
    if "\n" in message or not 20 < len(message) < 700:
        return "it is not one sentence"
    if found := _INTERNALS.search(message):
        return f"it shows internals: {found[0]}"
    if not _SAYS.search(message):
        return "it does not say what was found and expected"
    if not any(name in message for name in names):
        return "it names no file"
    return ""


#: A session that weights have ended, or that has no codec to step with, names no file.
_OF_SESSIONS = [
    "the weights are damaged",
    "the weights of the codec",
    "the model was opened without",
]


@pytest.mark.parametrize(
    ("kind", "first", "last"),
    [
        ("", 0, 200),
        pytest.param("", 200, 1000, marks=pytest.mark.slow),
        ("sharded", 1000, 1100),
        ("q4", 1100, 1200),
    ],
)
def test_damaged_checkpoints_work_or_say_what_is_wrong(
    made: Checkpoints, tmp_path: Path, kind: str, first: int, last: int
) -> None:
    folder = made.lm("rows", sharded=kind == "sharded")
    if kind == "q4":
        folder = convert.quantize(folder, tmp_path / "q4", "q4", progress=False)
    code, out, errors = process(
        TESTS / "damage.py", folder, tmp_path / "work", first, last, HF_HUB_OFFLINE="1"
    )
    found: dict[int, dict[str, Any]] = {}
    for line in out.splitlines():
        entry = json.loads(line)
        found.setdefault(entry["seed"], {}).update(entry)
    assert code == 0, (out.splitlines()[-1:], errors[-2000:])
    assert errors == "", "the library prints nothing"
    assert len(found) == last - first
    for entry in found.values():
        assert entry["error"] in ("", "CheckpointError", "SessionError"), entry
        if entry["error"]:
            of_sessions = entry["error"] == "SessionError"
            names = _OF_SESSIONS if of_sessions else [p.name for p in folder.iterdir()]
            names = names if of_sessions else [*names, "x/y"]  # a repository that a config names
            assert not (problem := vague(entry["message"], names)), (problem, entry)
    kinds = Counter(entry["error"] for entry in found.values())
    assert kinds["CheckpointError"] > (last - first) / 2, kinds
    assert kinds[""] > (last - first) / 20, kinds
    growth = max(entry["peak_mb"] for entry in found.values()) - found[first]["peak_mb"]
    assert growth < 200, "memory was taken for what only a file claims"


def test_the_check_of_messages_finds_vague_ones() -> None:
    good = "/a/model.safetensors: tensor emb.0 is missing, expected by the config"
    assert vague(good, [LM]) == ""
    for bad in (
        "invalid file",
        "model.safetensors: invalid header or something like it",
        "model.safetensors: KeyError: 'dim', expected it to be there",
        "tensor emb.0 is missing, expected by the config",
        good + "\n" + good,
    ):
        assert vague(bad, [LM]), bad


# ---- 1: lengths --------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8 + 1, 99_999_999, 0])
@pytest.mark.parametrize("name", [LM, MIMI])
@pytest.mark.parametrize("mmap", [True, False])
def test_fault_01_a_header_longer_than_its_file_is_refused_before_memory_is_taken(
    rows: Path, tmp_path: Path, name: str, length: int, mmap: bool
) -> None:
    lie = {name.replace(".", "_"): lambda data: struct.pack("<Q", length) + data[8:]}
    before = peak_mb()
    with pytest.raises(CheckpointError, match=re.escape(name)) as caught:
        moshi_c.load(copied(rows, tmp_path / "lie", **lie), mmap=mmap)
    assert not vague(str(caught.value), [name])
    assert peak_mb() - before < 50


def test_fault_01_a_long_header_of_nothing_takes_no_memory(rows: Path, tmp_path: Path) -> None:
    folder = copied(rows, tmp_path / "long")
    for header in (b"[" + b"," * 60_000_000, b"{" + b" " * 60_000_000, b'"' + b"a" * 60_000_000):
        (folder / LM).write_bytes(struct.pack("<Q", len(header)) + header)
        del header
        before = peak_mb()
        with pytest.raises(CheckpointError, match=LM):
            moshi_c.load(folder)
        assert peak_mb() - before < 150, "the pages of the file itself are 60 MB"


@pytest.mark.parametrize("name", [CONFIG, "mimi.json", PIECES])
def test_fault_01_files_of_absurd_size_are_not_read(rows: Path, tmp_path: Path, name: str) -> None:
    folder = copied(rows, tmp_path / "huge")
    with (folder / name).open("r+b") as file:
        file.truncate(1 << 40)  # a hole: it takes no space
    before = peak_mb()
    with pytest.raises(
        CheckpointError, match=rf"{name} has 1099511627776 bytes.* expected at most"
    ):
        moshi_c.load(folder)
    assert peak_mb() - before < 50


# ---- 2: tensors --------------------------------------------------------------------------------


def _entry(header: dict[str, Any], **changes: Any) -> None:
    header["text_linear.weight"] |= changes


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda h: _entry(h, data_offsets=h["out_norm.alpha"]["data_offsets"]), "bytes of data"),
        (lambda h: _entry(h, data_offsets=[n + 4 for n in h["text_linear.weight"]["data_offsets"]]),
         "overlaps|ends at byte|belong to no tensor"),
        (lambda h: _entry(h, data_offsets=[2**40, 2**40 + 5120]), "but the file has only"),
        (lambda h: _entry(h, shape=[2**32, 2**32]), "whose size overflows"),
        (lambda h: _entry(h, shape=[-1, 32]), "not a whole number"),
        (lambda h: _entry(h, shape=[32, 40]), r"has shape \[32,40\], expected \[40,32\]"),
        (lambda h: _entry(h, dtype="F64"), "expected 10240 for F64"),
        (lambda h: _entry(h, dtype="I32"), "is stored as I32, expected F32, F16, BF16 or F8_E4M3"),
        (lambda h: json.dumps(h).replace('"out_norm.alpha"', '"text_linear.weight"').encode(),
         "twice the key"),
        (lambda h: h | {"more": h.pop("text_linear.weight")}, "is missing, expected by the config"),
    ],
)  # fmt: skip
def test_fault_02_tensors_that_do_not_fit_are_named(
    rows: Path, tmp_path: Path, change: Any, sentence: str
) -> None:
    folder = copied(rows, tmp_path / "lie", model_safetensors=with_header(change))
    with pytest.raises(CheckpointError, match=sentence) as caught:
        moshi_c.load(folder)
    assert LM in str(caught.value)
    assert re.search(r"tensor '?[a-z]|'text_linear.weight'", str(caught.value))


# ---- 3: truncation -----------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [True, False])
def test_fault_03_a_file_cut_anywhere_is_refused_at_open(
    rows: Path, tmp_path: Path, mmap: bool
) -> None:
    folder = copied(rows, tmp_path / "cut")
    data = (rows / LM).read_bytes()
    for size in [*range(0, 40, 5), *range(1000, len(data), len(data) // 20), len(data) - 1]:
        (folder / LM).write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=LM):
            moshi_c.load(folder, mmap=mmap)


_CUT_WHILE_OPEN = """
import sys, pathlib, numpy as np, moshi_c
folder = pathlib.Path(sys.argv[1])
voice = np.random.default_rng(0).standard_normal((5, 1920)).astype("f4") / 10
with moshi_c.load(folder, mmap=False) as model, moshi_c.Session(model, seed=1) as session:
    expected = [session.step(frame).user_codes.tobytes() for frame in voice]
with moshi_c.load(folder, mmap=False) as model:
    for file in folder.glob("*.safetensors"):
        with file.open("r+b") as opened:
            opened.truncate(0)
    with moshi_c.Session(model, seed=1) as session:
        assert [session.step(frame).user_codes.tobytes() for frame in voice] == expected
print("whole")
"""


def test_fault_03_a_copy_outlives_its_file_and_the_limit_of_maps_is_documented(
    tmp_path: Path,
) -> None:
    folder = copied(moshi_c.hub.packaged_model(), tmp_path / "cut")
    code, out, errors = process("-c", _CUT_WHILE_OPEN, folder)
    assert (code, out, errors) == (0, "whole\n", "")
    assert "SIGBUS" in (moshi_c.load.__doc__ or "")


# ---- 4: weights that are no numbers, other models ------------------------------------------------


def _poison(tensor: str, value: float) -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        header, tensors = damage._split(data)
        begin = header[tensor]["data_offsets"][0] + 8
        poisoned = tensors[:begin] + struct.pack("<f", value) + tensors[begin + 4 :]
        return damage._join(json.dumps(header).encode(), poisoned)

    return apply


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "tensor",
    ["text_linear.weight", "emb.0.weight", "transformer.layers.1.norm1.alpha",
     "depformer.layers.0.self_attn.in_proj_weight", "linears.2.weight",
     "condition_provider.conditioners.pace.learnt_padding"],
)  # fmt: skip
def test_fault_04_a_weight_that_is_no_number_is_named_when_asked_for(
    rows: Path, tmp_path: Path, tensor: str, value: float
) -> None:
    folder = copied(rows, tmp_path / "poison", model_safetensors=_poison(tensor, value))
    expected = (
        rf"{LM}: tensor {re.escape(tensor)} has -?(nan|inf) at element 2 and 1 such values?, "
    )
    with pytest.raises(CheckpointError, match=expected + "expected finite numbers"):
        moshi_c.load(folder, check_weights=True)
    moshi_c.load(folder).close()
    moshi_c.load(rows, check_weights=True).close()


def test_fault_04_the_codec_is_always_checked(rows: Path, tmp_path: Path) -> None:
    tensor = "quantizer.rvq_rest.vq.layers.3._codebook.embedding_sum"
    folder = copied(rows, tmp_path / "poison", mimi_safetensors=_poison(tensor, np.nan))
    for load in (moshi_c.load, moshi_c.load_mimi):
        with pytest.raises(
            CheckpointError, match=rf"{MIMI}: tensor {tensor} has -?nan at element 2"
        ):
            load(folder)


def test_fault_04_a_session_without_numbers_ends_alone(
    model: Model, rows: Path, tmp_path: Path
) -> None:
    folder = copied(rows, tmp_path / "p", model_safetensors=_poison("text_linear.weight", np.nan))
    with moshi_c.load(folder) as broken, Session(broken) as ended, Session(model, seed=1) as other:
        expected = codes_of(other, sound(3))
        with pytest.raises(
            SessionError, match=r"a logit of frame \d is not finite, expected numbers"
        ):
            for _ in range(5):
                ended.step(SILENCE)
        with pytest.raises(SessionError, match="the session ended with an error: a logit of frame"):
            ended.step(SILENCE)
        other.reset()
        assert codes_of(other, sound(3)) == expected


def test_fault_04_absurd_weights_of_the_codec_make_no_silent_nonsense(
    rows: Path, tmp_path: Path
) -> None:
    def loud(data: bytes) -> bytes:
        header, tensors = damage._split(data)
        for i in (0, 14):
            begin, end = header[f"decoder.model.{i}.conv.conv.weight"]["data_offsets"]
            weights = np.frombuffer(tensors[begin:end], "<f4") * np.float32(1e30)
            tensors = tensors[:begin] + weights.tobytes() + tensors[end:]
        return damage._join(json.dumps(header).encode(), tensors)

    with moshi_c.load(copied(rows, tmp_path / "loud", mimi_safetensors=loud)) as model:
        session = Session(model, seed=1)
        with pytest.raises(SessionError, match=r"the voice of frame \d is not finite, expected"):
            for _ in range(5):
                session.step(SILENCE)
        codes = model.mimi.encode(SILENCE)
        with pytest.raises(CheckpointError, match="the sound of these codes is not finite"):
            model.mimi.decode(codes)
        with model.mimi.stream() as stream, pytest.raises(CheckpointError, match="not finite"):
            stream.decode(codes[:, 0])


def test_fault_04_another_family_or_codec_is_told_apart(
    rows: Path, made: Checkpoints, tmp_path: Path
) -> None:
    stt = tmp_path / "stt"
    shutil.copytree(rows, stt)
    shutil.copy(made.lm("stt") / LM, stt / LM)
    with pytest.raises(CheckpointError, match=rf"{LM}: tensor emb\.0.weight has shape .* expected"):
        moshi_c.load(stt)
    other = copied(rows, tmp_path / "bins")
    for name in (MIMI, "mimi.json"):
        shutil.copy(made.mimi("small") / name, other / name)
    with pytest.raises(CheckpointError, match="entries, but the language model expects card = 24"):
        moshi_c.load(other)
    more = configured(rows, tmp_path / "more", n_q=12, delays=[0] * 13)
    with pytest.raises(CheckpointError, match=r"tensor emb\.5.weight is missing, expected by the"):
        moshi_c.load(more)
    (stt / CONFIG).write_text(
        '{"model_type": "llama", "hidden_size": 8, "transformers_version": "5"}'
    )
    with pytest.raises(CheckpointError, match="layout of transformers; expected Kyutai's own"):
        moshi_c.load(stt)


# ---- 5: downloads ------------------------------------------------------------------------------

_FETCH = """
import json, sys, moshi_c
try:
    with moshi_c.load("org/tiny", progress=False) as model:
        print(json.dumps({"family": model.family}))
except moshi_c.MoshiError as error:
    print(json.dumps({"kind": type(error).__name__, "message": str(error)}))
"""


@pytest.fixture
def tiny_hub(tmp_path: Path) -> Iterator[fake_hub.Hub]:
    shutil.copytree(moshi_c.hub.packaged_model(), tmp_path / "repositories" / "org" / "tiny")
    with fake_hub.serve(tmp_path / "repositories") as hub:
        yield hub


def fetch(hub: fake_hub.Hub, home: Path, **environment: str) -> dict[str, str]:
    """Loads org/tiny from the hub in a fresh process, with a cache of its own."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    code, out, errors = process("-c", _FETCH, **(settings | environment))
    assert code == 0, errors
    answer = json.loads(out)
    if "message" in answer:
        assert answer["kind"] == "CheckpointError"
        assert not vague(answer["message"] + " expected", ["org/tiny"]), answer
    return dict(answer)


def test_fault_05_a_broken_download_goes_on_where_it_stopped(
    tiny_hub: fake_hub.Hub, tmp_path: Path
) -> None:
    tiny_hub.broken[LM] = 12_000_000
    assert fetch(tiny_hub, tmp_path / "home") == {"family": "moshi"}
    assert any(int(text[6:].partition("-")[0]) > 0 for text in tiny_hub.ranges), tiny_hub.ranges
    tiny_hub.refused = (500, "")
    offline = fetch(tiny_hub, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert offline == {"family": "moshi"}, "what was fetched needs no network"


def test_fault_05_a_file_that_arrives_damaged_is_removed_and_fetched_anew(
    tiny_hub: fake_hub.Hub, tmp_path: Path
) -> None:
    tiny_hub.lies.add(LM)
    message = fetch(tiny_hub, tmp_path / "home")["message"]
    assert f"{LM} of org/tiny arrived damaged and was removed: its digest is " in message
    assert "load again to fetch it anew" in message
    tiny_hub.lies.clear()
    assert fetch(tiny_hub, tmp_path / "home") == {"family": "moshi"}


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (
            401,
            "GatedRepo",
            "accept the licence at https://huggingface.co/org/tiny and set HF_TOKEN",
        ),
        (
            403,
            "GatedRepo",
            "accept the licence at https://huggingface.co/org/tiny and set HF_TOKEN",
        ),
        (401, "", "was refused by the hub: accept the licence at"),
        (403, "", "was refused by the hub: accept the licence at"),
        (404, "RepoNotFound", "no such repository or does not show it to you: check the name"),
    ],
)
def test_fault_05_a_refused_download_says_what_to_do(
    tiny_hub: fake_hub.Hub, tmp_path: Path, status: int, code: str, sentence: str
) -> None:
    tiny_hub.refused = (status, code)
    assert sentence in fetch(tiny_hub, tmp_path / "home")["message"]


def test_fault_05_without_a_network_it_says_so(tiny_hub: fake_hub.Hub, tmp_path: Path) -> None:
    message = fetch(tiny_hub, tmp_path / "home", HF_HUB_OFFLINE="1")["message"]
    assert "is not on this machine and the hub cannot be reached" in message


# ---- 6: tokenizers -----------------------------------------------------------------------------

_FUZZ = """
import random, sys
from pathlib import Path
from moshi_c import CheckpointError
from moshi_c.tokenizer import Tokenizer
data, path = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
refused = 0
for seed in range(int(sys.argv[3])):
    rng = random.Random(seed)
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(changed))
        kind = rng.randrange(4)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at : at + 4] = rng.randbytes(4)
        elif kind == 2:
            lie = b"\\x0a\\xff\\xff\\xff\\xff\\x0f"  # a field of 4 GB
            changed[at:at] = rng.choice([b"\\xff" * 9, lie, rng.randbytes(3)])
        else:
            del changed[at : at + rng.choice([1, 100, 2000])]
            changed = changed or bytearray(b"x")
    path.write_bytes(changed)
    print(seed, flush=True)
    try:
        tokenizer = Tokenizer(path)
    except CheckpointError as error:
        assert "expected a whole SentencePiece model" in str(error), error
        assert ".cc" not in str(error), error
        refused += 1
        continue
    tokenizer.decode(range(-3, tokenizer.vocab_size + 3)).encode()
    tokenizer.decode(tokenizer.encode("hello, what is it \\u20ac \\U0001f600?")).encode()
print("refused", refused)
"""


@pytest.mark.parametrize("pieces", [40, 500])
def test_fault_06_a_damaged_tokenizer_never_ends_the_process(
    made: Checkpoints, tmp_path: Path, pieces: int
) -> None:
    code, out, errors = process("-c", _FUZZ, made.tokenizer(pieces), tmp_path / "t.model", 300)
    assert code == 0, (out.splitlines()[-1:], errors[-1000:])
    assert int(out.split()[-1]) > 30
    assert errors == ""


def test_fault_06_ids_out_of_range_are_replacement_characters(rows: Path, tmp_path: Path) -> None:
    tokenizer = moshi_c.tokenizer.Tokenizer(moshi_c.hub.packaged_model() / "tokenizer_tiny.model")
    for token in (-2, -(2**70), tokenizer.vocab_size, 2**31, 2**70):
        assert tokenizer.decode([token]) == "\ufffd"
    assert tokenizer.decode([-1]) == "", "no token yet"
    # a model whose vocabulary is larger than the tokenizer's goes on all the same
    folder = copied(rows, tmp_path / "small")
    (folder / PIECES).write_bytes(_proto_of(["<unk>", "<s>", "</s>", "<pad>", "a"]))
    with moshi_c.load(folder) as model, Session(model, seed=1) as session:
        session.force_text([4, 30, 3, 39])
        text = "".join(frame.text for frame in session.push(np.zeros(20 * FRAME, np.float32)))
    assert text.count("\ufffd") >= 2


def _proto_of(pieces: list[str]) -> bytes:
    """The smallest SentencePiece model with these pieces: unknown, two controls, then words."""

    def field(number: int, value: bytes) -> bytes:
        return bytes([number << 3 | 2, len(value)]) + value

    data = b""
    for i, piece in enumerate(pieces):
        kind = 2 if i == 0 else 3 if i < 3 else 1
        score = b"\x15" + struct.pack("<f", -float(i))
        data += field(1, field(1, piece.encode()) + score + bytes([3 << 3, kind]))
    trainer = bytes([3 << 3, 2, 4 << 3, len(pieces)])  # byte pair encoding; the size
    return data + field(2, trainer) + field(3, field(1, b"identity"))


@pytest.mark.parametrize("piece", ["<0x-1>", "<0xGG>", "<0x100>", "<0x>", "<0x4"])
def test_fault_06_pieces_that_only_look_like_bytes_are_text(piece: str, tmp_path: Path) -> None:
    path = tmp_path / "t.model"
    path.write_bytes(_proto_of(["<unk>", "<s>", "</s>", "<pad>", piece, "\u2581a"]))
    tokenizer = moshi_c.tokenizer.Tokenizer(path)
    assert tokenizer.decode([4, 5]) == piece + " a"


# ---- 7: samples --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (np.nan, "(?i)not a number|has nan"),
        (np.inf, "(?i)infinite|has inf"),
        (-np.inf, "(?i)infinite|has -inf"),
        (3e38, "expected -1 to 1"),
        (-20000.0, r"is -20000|has -20000.*expected -1 to 1 \(integers of 16 bits go in as int16"),
        (100.5, "expected -1 to 1"),
    ],
)
def test_fault_07_samples_that_are_no_sound_change_nothing(
    model: Model, value: float, sentence: str
) -> None:
    voice = sound(4)
    bad = voice.copy()
    bad[700] = value
    with Session(model, seed=3) as session, Session(model, seed=3, sample_rate=16000) as other:
        expected = codes_of(session, voice)
        session.reset()
        for call in (
            lambda: session.step(bad[:FRAME]),
            lambda: session.push(bad),
            lambda: session.run(bad),
            lambda: moshi_c.step_many([session], [bad[:FRAME]]),
            lambda: other.step(bad[:1280]),
            lambda: model.mimi.encode(bad),
            lambda: model.mimi.stream().encode(bad[:FRAME]),
        ):
            with pytest.raises(AudioError, match=sentence):
                call()
        assert codes_of(session, voice) == expected
        assert other.stats.frames == 0


def test_fault_07_integers_are_not_taken_for_floats(model: Model) -> None:
    whole = np.round(sound(1) * 32768)
    with Session(model) as session:
        for bad in (whole.astype(np.int32), whole.astype(np.uint16), whole.astype(float)):
            with pytest.raises(AudioError, match="expected float32 or int16"):
                session.step(bad)
        with pytest.raises(AudioError, match="expected -1 to 1"):
            session.step(whole.astype(np.float32))
        with pytest.raises(AudioError, match="raw bytes"):
            session.step(whole.astype(np.int16).tobytes())
        session.step(whole.astype(np.int16))
        session.step(whole.astype(np.int16).tobytes(), dtype="int16")


def test_fault_07_strided_and_read_only_buffers_are_samples_too(model: Model) -> None:
    voice = sound(1)
    backwards = voice[::-1].copy()[::-1]
    stereo = np.stack([voice, -voice], axis=1)[:, 0]
    frozen = voice.copy()
    frozen.setflags(write=False)
    shifted = np.frombuffer(b"\0" + voice.tobytes(), np.uint8)[1:].view(np.float32)
    found = []
    for pcm in (voice, backwards, stereo, frozen, memoryview(voice), shifted, voice[None]):
        with Session(model, seed=1) as session:
            session.step(SILENCE)
            found.append(session.step(pcm).user_codes.tobytes())
    assert len(set(found)) == 1


def test_fault_07_denormals_are_silence(model: Model) -> None:
    tiny = np.full(FRAME, 1e-42, np.float32)
    with Session(model, seed=1) as session:
        expected = [session.step(SILENCE) for _ in range(4)]
        session.reset()
        found = [session.step(tiny) for _ in range(4)]
    for a, b in zip(found, expected, strict=True):
        assert a.user_codes.tobytes() == b.user_codes.tobytes()
        assert a.pcm is not None
        assert b.pcm is not None
        assert a.pcm.tobytes() == b.pcm.tobytes()


_FLOAT_MODES = """
import ctypes, ctypes.util, numpy as np, moshi_c
libm = ctypes.CDLL(ctypes.util.find_library("m"))
UPWARD = {up}
voice = np.random.default_rng(0).standard_normal((6, 1920)).astype("f4") / 10

def talk(model):
    with moshi_c.Session(model, seed=1) as session:
        frames = [session.step(frame) for frame in voice]
    codes = model.mimi.encode(voice.reshape(-1))
    return [f.pcm.tobytes() + f.user_codes.tobytes() for f in frames], codes.tobytes()

with moshi_c.load(threads=2) as model:
    expected = talk(model)
with moshi_c.load(threads=2) as model:
    assert libm.fesetround(UPWARD) == 0
    libm.feenableexcept(0x0d)
    found = talk(model)
    assert libm.fegetround() == UPWARD and libm.fegetexcept() == 0x0d
    libm.fedisableexcept(0x0d)
    libm.fesetround(0)
    third = np.float32(1e-40) * np.float32(0.5)
assert third > 0, "the caller's own arithmetic keeps its small numbers"
assert found == expected
print("same")
"""


def test_fault_07_the_callers_floating_point_mode_is_its_own() -> None:
    """Its rounding and traps change no bit of ours, and we leave them as they are."""
    code, out, errors = process("-c", _FLOAT_MODES.format(up=0x800))
    assert (code, out, errors) == (0, "same\n", "")


# ---- 8: chunks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 1919, 1921, 24000, 240_000])
def test_fault_08_any_chunk_gives_the_same_frames(model: Model, size: int) -> None:
    voice = sound(3) if size == 1 else sound(125)
    with Session(model, seed=1) as session:
        expected = codes_of(session, voice)
        session.reset()
        frames = session.push(voice[:0])
        for start in range(0, len(voice), size):
            frames += session.push(voice[start : start + size])
            frames += session.push(voice[:0])
    found = [b"" if frame.codes is None else frame.codes.tobytes() for frame in frames]
    assert found == expected


@pytest.mark.parametrize("size", [0, 1, 1919, 1921, 240_000])
def test_fault_08_a_step_takes_one_frame_and_nothing_else(model: Model, size: int) -> None:
    with Session(model, seed=1) as session:
        with pytest.raises(AudioError, match=rf"pcm has {size} samples; a frame is 1920"):
            session.step(np.zeros(size, np.float32))
        assert session.step(SILENCE).index == 0


# ---- 9: rates and channels -----------------------------------------------------------------------


def test_fault_09_files_are_resampled_by_the_rate_they_declare(
    model: Model, tmp_path: Path
) -> None:
    time_s = np.arange(24000) / 24000
    tone = (0.3 * np.sin(2 * np.pi * 440 * time_s)).astype(np.float32)
    expected = np.abs(np.fft.rfft(tone)).argmax()
    for rate, subtype in ((8000, "ULAW"), (44100, "PCM_16"), (48000, "FLOAT")):
        path = tmp_path / f"{rate}.wav"
        soundfile.write(path, moshi_c.audio.resample(tone, 24000, rate), rate, subtype=subtype)
        pcm = moshi_c.audio.read_audio(path, model.sample_rate)
        assert len(pcm) == pytest.approx(24000, abs=10)
        assert np.abs(np.fft.rfft(pcm[:24000], 24000)).argmax() == expected, "no chipmunk"


def test_fault_09_what_declares_no_rate_or_channels_is_an_error(model: Model) -> None:
    eight = np.zeros(640, np.float32)  # 80 ms at 8 kHz
    with Session(model) as session:
        with pytest.raises(AudioError, match="pcm has 640 samples; a frame is 1920"):
            session.step(eight)
        for stereo in (np.zeros((2, FRAME), np.float32), np.zeros((FRAME, 2), np.float32)):
            with pytest.raises(AudioError, match="expected one channel"):
                session.step(stereo)
            with pytest.raises(AudioError, match="expected one channel"):
                session.push(stereo)
        with pytest.raises(AudioError, match="raw bytes, which do not tell their type"):
            session.push(b"\xff" * 640)
        with pytest.raises(AudioError, match=r"uint8|raw bytes"):
            session.push(np.full(640, 255, np.uint8))  # mu-law as it comes from a telephone
    with Session(model, sample_rate=8000) as session:
        assert session.step(eight).index == 0
    for rate in (0, -8000, 7999, 10**7):
        with pytest.raises((AudioError, ValueError), match="sample_rate is"):
            Session(model, sample_rate=rate)


# ---- 24: threads, fork, close, exit, Ctrl-C ------------------------------------------------------


def test_fault_24_two_threads_on_one_session_are_told_at_once(model: Model) -> None:
    indexes: list[int] = []
    refused: list[str] = []
    slowest = [0.0]
    with Session(model, seed=1) as session:

        def talk() -> None:
            for _ in range(40):
                start = time.perf_counter()
                try:
                    indexes.append(session.step(SILENCE).index)
                except SessionError as error:
                    slowest[0] = max(slowest[0], time.perf_counter() - start)
                    refused.append(str(error))
                    time.sleep(0.001)

        threads = [threading.Thread(target=talk) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert session.step(SILENCE).index == len(indexes)
    assert sorted(indexes) == list(range(len(indexes))), "no frame is stepped twice or left out"
    assert refused
    assert all("in use by another thread; expected one" in message for message in refused)


def test_fault_24_closing_while_another_thread_steps(model: Model) -> None:
    for _ in range(5):
        session = Session(model, seed=1)
        ended: list[str] = []

        def talk(session: Session = session, ended: list[str] = ended) -> None:
            try:
                while True:
                    session.step(SILENCE)
                    time.sleep(0.001)
            except SessionError as error:
                ended.append(str(error))

        thread = threading.Thread(target=talk)
        thread.start()
        while not session.closed:
            try:
                session.close()
            except SessionError as error:
                assert "in use by another thread" in str(error)
        thread.join(30)
        assert not thread.is_alive()
        assert ended == ["this session is closed"] or "in use by another" in ended[0]


def test_fault_24_every_call_after_close_says_closed(model: Model) -> None:
    session, stream = Session(model), model.mimi.stream()
    session.close()
    stream.close()
    calls: list[Callable[[], Any]] = [
        lambda: session.step(SILENCE),
        lambda: moshi_c.step_many([session], [SILENCE]),
        lambda: session.step_codes([0] * 8),
        lambda: session.force_text([4]),
        lambda: stream.encode(SILENCE),
        lambda: stream.decode([0] * 8),
        stream.reset,
        session.snapshot,
        session.fork,
        lambda: asyncio.run(session.astep(SILENCE)),
        stream.snapshot,
        lambda: stream.restore(b"x"),
    ]
    gone = moshi_c.load()
    gone.close()
    calls += [lambda: Session(gone), lambda: gone.memory, lambda: gone.mimi.encode(SILENCE)]
    for call in calls:
        with pytest.raises(SessionError, match="is closed"):
            call()


SCENARIOS = {
    "interrupted_steps": 0,
    "interrupted_pushes": 0,
    "interrupted_runs": 0,
    "interrupted_loads": 0,
    "forked": 0,
    "forked_during_a_step": 0,
    "forked_by_multiprocessing": 0,
    "exit_with_open_sessions": 0,
    "exit_during_a_step": 0,
    "exit_with_a_last_word": 0,
    "exit_by_an_exception": 7,
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_fault_24_a_process(scenario: str) -> None:
    """Ctrl-C at any moment, fork, the end of the interpreter; see hostile_process.py."""
    code, _, errors = process(TESTS / "hostile_process.py", scenario, PYTHONWARNINGS="ignore")
    assert (code, errors) == (SCENARIOS[scenario], "")


# ---- calls -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    ["a" * 5000, "a/" * 3000, "\0", "a\0b", "~nobody-of-this-name/x", "\ud800", "/dev/null", "\n",
     b"/nowhere", "x" * 300 + ".safetensors"],
)  # fmt: skip
def test_a_source_that_can_be_nothing_is_refused(source: Any) -> None:
    for call in (moshi_c.load, moshi_c.load_mimi, lambda s: moshi_c.load(tokenizer=s)):
        with pytest.raises(CheckpointError, match=r"(?s)expected") as caught:
            call(source)
        assert len(str(caught.value)) < 700
    with Session(moshi_c.load()) as session, pytest.raises((AudioError, TypeError)):
        session.run(source)


@pytest.mark.parametrize(
    ("option", "value"),
    [("threads", "4"), ("threads", 1.5), ("max_sessions", True), ("context", 2**40),
     ("threads", -1), ("context", float("nan")), ("max_sessions", [1])],
)  # fmt: skip
def test_an_option_that_is_no_count_is_refused(option: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option} is .*; expected a whole number of 1 or more"):
        moshi_c.load(**{option: value})


_TOO_MUCH = """
import resource, moshi_c
with moshi_c.load() as model, moshi_c.load(context=1 << 20, max_sessions=4096) as large:
    moshi_c.Session(model).close()
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30), size + (1 << 30)))
    try:
        moshi_c.Session(large)
    except moshi_c.DeviceError as error:
        print(error)
    moshi_c.Session(model).close()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_more_memory_than_the_process_may_have_is_a_device_error() -> None:
    # the sanitizer's malloc fails like others, if it is there
    code, out, errors = process(
        "-c", _TOO_MUCH, ASAN_OPTIONS="allocator_may_return_null=1:detect_leaks=0"
    )
    assert code == 0, errors[-500:]
    assert re.search(r"bytes .* could not be reserved; fewer sessions or a shorter context", out)
