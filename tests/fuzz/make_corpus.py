"""Writes the seeds of the fuzz targets: small, valid and nearly valid files of every kind.

    python tests/fuzz/make_corpus.py [FOLDER]

FOLDER is tests/fuzz. `corpus/NAME/seed-*` are the inputs of target NAME and `model/` is the model
that the targets of whole models open; all but sounds, Opus streams and snapshots are the same bytes
on every machine. An input that once found a defect lies beside the seeds as `found-*`; this script
leaves it alone.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import shutil
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import checkpoints  # noqa: E402
import ogg  # noqa: E402

Config = dict[str, Any]
MARK = b"\n====\n"  # between the files of one input

# ---- JSON --------------------------------------------------------------------------------------

JSON = {
    "empty-object": b"{}",
    "every-type": b'{"a":[1,-2.5e-3,true,false,null,"x"],"b":{"c":{}}, "d" : [ ] }',
    "escapes": rb'["\"\\\/\b\f\n\r\t","\u00e9\u20ac","\ud83d\ude00"]',
    "alphabets": '{"é€😀":"Ελληνικά 한국어"}'.encode(),
    "deepest": b"[" * 64 + b"]" * 64,
    "too-deep": b"[" * 65 + b"]" * 65,
    "numbers": b"[0,-0,1e308,1e-400,123456789012345678901234567890,0.1e+2,9007199254740993]",
    "overflow": b"1e309",
    "key-twice": b'{"a":1,"b":2,"a":3}',
    "half-surrogate": rb'"\ud83d"',
    "comma-at-the-end": b"[1,]",
    "rest": b"null null",
}

# ---- safetensors -------------------------------------------------------------------------------

Rows = list[tuple[str, str, list[int], int]]  # name, dtype, shape, bytes


def safetensors(rows: Rows, metadata: Config | None = None, **changes: Any) -> bytes:
    """A file of these tensors, filled with a counter; `changes` replace keys of the first one."""
    header: Config = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, dtype, shape, size in rows:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    if rows:
        header[rows[0][0]] |= changes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes(i & 0xFF for i in range(at))


def index(where: dict[str, str]) -> bytes:
    return json.dumps({"metadata": {"total_size": 12}, "weight_map": where}).encode()


ONE: Rows = [("w", "F32", [2, 3], 24)]
MANY: Rows = [
    ("emb.0.weight", "BF16", [4, 2], 16),
    ("norm.alpha", "F16", [1, 1, 3], 6),
    ("scale", "F64", [], 8),
    ("nothing", "I8", [0, 5], 0),
    ("flags", "BOOL", [5], 5),
    ("small", "F8_E4M3", [2, 2], 4),
]
A: Rows = [("a", "F32", [1], 4)]
B: Rows = [("b", "F16", [4], 8)]
SAFETENSORS = {
    "one": safetensors(ONE),
    "many": safetensors(MANY, {"format": "pt"}),
    "none": safetensors([]),
    "past-the-end": safetensors(ONE, data_offsets=[0, 1 << 40]),
    "overflow": safetensors(ONE, shape=[1 << 31, 1 << 31, 1 << 31]),
    "hole": safetensors([*ONE, ("v", "U8", [4], 4)], data_offsets=[0, 12], shape=[3]),
    "unknown-dtype": safetensors(ONE, dtype="F4"),
    "negative": safetensors(ONE, shape=[-2, -3]),
    "cut": safetensors(ONE)[:-9],
    "huge-header": struct.pack("<Q", 99_999_999) + b"{}",
    "shards": MARK.join(
        [
            index({"a": "a.safetensors", "b": "b.safetensors"}),
            safetensors(A),
            safetensors(B, {"format": "pt"}),
        ]
    ),
    "shard-twice": MARK.join(
        [
            index({"a": "a.safetensors", "b": "b.safetensors"}),
            safetensors(A),
            safetensors(A),
        ]
    ),
    "shard-elsewhere": MARK.join([index({"a": "../a.safetensors"}), safetensors(A)]),
    "shard-missing": MARK.join([index({"a": "c.safetensors"}), safetensors(A)]),
}

# ---- configs -----------------------------------------------------------------------------------


def lm_config(name: str, **changes: Any) -> Config:
    shape = checkpoints.SHAPES[name]
    config = copy.deepcopy(shape.lm) | {"model_type": shape.model_type} | changes
    if shape.gen:
        config["lm_gen_config"] = shape.gen
    return config


def configs() -> dict[str, bytes]:
    wanted: dict[str, Config] = {name: lm_config(name) for name in checkpoints.SHAPES}
    wanted["names"] = lm_config(
        "moshi",
        moshi_name="model.safetensors",
        mimi_name="mimi.safetensors",
        mimi_config_name="mimi.json",
        tokenizer_name="tokenizer.model",
        stt_config={"audio_delay_seconds": 0.5, "audio_silence_prefix_seconds": 1.0},
    )
    wanted["wide"] = lm_config("moshi", dim=65536, hidden_scale=1024)
    wanted["feedforward-list"] = lm_config("moshi", depformer_dim_feedforward=[264] * 8)
    for size in ("full", "small"):
        wanted[f"mimi-{size}"] = checkpoints.mimi_config(size)
    return {name: json.dumps(config).encode() for name, config in wanted.items()}


# ---- a whole model -----------------------------------------------------------------------------

#: Every part there is, as small as it goes: frames of 8 samples, five text tokens.
LM: Config = checkpoints.SHAPES["rows"].lm | {
    "n_q": 4,
    "dep_q": 2,
    "delays": [0, 0, 1, 0, 1],
    "dim": 8,
    "num_heads": 2,
    "num_layers": 1,
    "card": 5,
    "text_card": 6,
    "context": 7,
    "depformer_dim": 4,
    "depformer_num_heads": 2,
    "depformer_num_layers": 1,
    "depformer_dim_feedforward": 6,
    "depformer_weights_per_step_schedule": [0, 1],
    "depformer_low_rank_embeddings": 2,
}
MIMI: Config = {
    "sample_rate": 1000,
    "frame_rate": 125,
    "seanet": {"n_filters": 2, "dimension": 4, "ratios": [2, 2]},
    "quantizer": {
        "dimension": 2,
        "n_q": 3,
        "bins": 5,
        "input_dimension": 4,
        "output_dimension": 4,
    },
    "transformer": {
        "d_model": 4,
        "num_heads": 2,
        "num_layers": 1,
        "dim_feedforward": 6,
        "input_dimension": 4,
        "output_dimensions": [4],
        "context": 5,
    },
}


def make_model(folder: Path) -> None:
    """Writes the language model and the codec; values are small multiples of 1/8."""
    from moshi.models import loaders
    from safetensors.torch import save

    mimi = checkpoints.mimi_config("full")
    for key, value in MIMI.items():
        mimi[key] = mimi[key] | value if isinstance(value, dict) else value
    shape = checkpoints.Shape(LM, gen={"temp": 0.7, "temp_text": 0.7, "top_k": 3})
    lm = checkpoints.pack(checkpoints.lm_state(shape, 0))
    skeleton = loaders.get_mimi(None, copy.deepcopy(mimi), num_codebooks=3)
    codec = checkpoints.pack(skeleton.state_dict())
    for state in (lm, codec):
        for number, (name, value) in enumerate(sorted(state.items())):
            rng = np.random.Generator(np.random.SFC64(number))
            values = rng.integers(-8, 9, tuple(value.shape)).astype(np.float32) / 8
            if name.endswith(("cluster_usage", "_initialized")):
                values = np.ones(tuple(value.shape), np.float32)
            state[name] = value.new_tensor(values)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(save(lm))
    (folder / "mimi.safetensors").write_bytes(save(codec))
    config = LM | {
        "moshi_name": "model.safetensors",
        "mimi_name": "mimi.safetensors",
        "mimi_config_name": "mimi.json",
        "lm_gen_config": shape.gen,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "mimi.json").write_text(json.dumps(mimi, indent=1) + "\n")


def model_inputs(folder: Path) -> dict[str, bytes]:
    """Configs of the model: the language model's and the codec's."""
    lm = json.loads((folder / "config.json").read_text())
    mimi = json.loads((folder / "mimi.json").read_text())

    def both(quantizer: Config | None = None, **changes: Any) -> bytes:
        codec = mimi | {"quantizer": mimi["quantizer"] | (quantizer or {})}
        return json.dumps(lm | changes).encode() + MARK + json.dumps(codec).encode()

    weights = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", weights[:8])
    header = json.loads(weights[8 : 8 + length])
    header.pop("__metadata__", None)

    def stored(dtype: str, element: int, space: str = "", text: int = 6, **changes: Any) -> bytes:
        """With weights of another type and `text` tokens; the header is `space` longer."""
        made, at = {}, 0
        for name, tensor in header.items():
            rows, *rest = tensor["shape"]
            rows += (text - 6) * name.endswith(("text_emb.weight", "text_linear.weight"))
            end = at + element * rows * int(np.prod(rest))
            made[name] = {"dtype": dtype, "shape": [rows, *rest], "data_offsets": [at, end]}
            at = end
        return (
            both(**changes)
            + MARK
            + json.dumps(made, separators=(",", ":")).encode()
            + space.encode()
        )

    def narrow(dtype: Any) -> bytes:
        """With matrices in a narrow format, as they are written."""
        from moshi_c import convert

        with tempfile.TemporaryDirectory() as name:
            target = convert.quantize(folder, Path(name) / dtype, dtype, progress=False)
            data = (target / "model.safetensors").read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        return both() + MARK + data[8 : 8 + size]

    return {
        "weights-q4": narrow("q4"),
        "weights-int8": narrow("int8"),
        "weights-fp8": narrow("fp8"),
        "weights-fp8-without-scales": stored("F8_E4M3", 1),
        "weights-f32": stored("F32", 4),
        "weights-f16": stored("F16", 2),
        "weights-bf16-at-odd-bytes": stored("BF16", 2, " " * (len(json.dumps(header)) % 2 + 1)),
        "two-texts": stored(
            "F32", 4, text=2, text_card=2, existing_text_padding_id=1, model_type="hibiki"
        ),
        "plain": both(),
        "delayed": both(delays=[3, 0, 1, 2, 1]),
        "one-head": both(num_heads=1, depformer_num_heads=1),
        "one-frame": both(context=1),
        "greedy": both(lm_gen_config={"temp": 0, "temp_text": 0}),
        "hibiki": both(model_type="hibiki"),
        "unknown-width": both(dim=16),
        "many-entries": both({"bins": 16_000_000}),
    }


def snapshots(folder: Path) -> dict[str, bytes]:
    """Of sessions before, at and beyond the model's context of 7 frames, and of a codec stream."""
    import moshi_c

    found = {}
    pcm = (0.3 * np.sin(np.arange(8))).astype(np.float32)
    with moshi_c.load(folder, threads=1) as model:
        for name, frames, options in (
            ("fresh", 0, {}),
            ("begun", 2, {}),
            ("wrapped", 9, {"keep_logits": True}),
            ("guided", 3, {"cfg_coef": 1.5, "conditions": {"description": "good"}}),
        ):
            with moshi_c.Session(
                model, seed=1, sample_rate=1000, output_sample_rate=1000, **options
            ) as session:
                session.force_text([1, 2, 3, 4])
                for _ in range(frames):
                    session.step(pcm)
                found[name] = session.snapshot()
        with model.mimi.stream() as stream:
            for _ in range(3):
                stream.decode(stream.encode(pcm))
            found["stream"] = stream.snapshot()
    return found


def note_of(snapshot: bytes) -> bytes:
    """What the package keeps beside the core's state."""
    header = struct.unpack("<Q", snapshot[:8])[0]
    first, last = json.loads(snapshot[8 : 8 + header])["note"]["data_offsets"]
    return snapshot[8 + header + first : 8 + header + last]


# ---- sound, codec files and tokenizers ---------------------------------------------------------


def sounds() -> dict[str, bytes]:
    import soundfile

    t = np.arange(600) / 8000
    mono = (0.4 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)
    stereo = np.stack([mono, -mono], 1)
    found = {}
    for name, kind, subtype, pcm in (
        ("pcm16.wav", "WAV", "PCM_16", mono),
        ("float.wav", "WAV", "FLOAT", mono),
        ("ulaw.wav", "WAV", "ULAW", mono),
        ("adpcm.wav", "WAV", "IMA_ADPCM", mono),
        ("stereo.wav", "WAVEX", "PCM_24", stereo),
        ("many-channels.wav", "WAV", "PCM_U8", np.tile(mono[:2, None], 1024)),
        ("pcm.rf64", "RF64", "PCM_16", mono),
        ("pcm.aiff", "AIFF", "PCM_16", mono),
        ("pcm.au", "AU", "PCM_16", mono),
        ("pcm.flac", "FLAC", "PCM_16", mono),
        ("vorbis.ogg", "OGG", "VORBIS", mono),
        ("opus.ogg", "OGG", "OPUS", mono),
        ("layer3.mp3", "MP3", "MPEG_LAYER_III", mono),
    ):
        out = io.BytesIO()
        soundfile.write(out, pcm, 8000, format=kind, subtype=subtype)
        found[name] = out.getvalue()
    found["nan.wav"] = found["float.wav"][:-4] + struct.pack("<f", float("nan"))
    found["cut.flac"] = found["pcm.flac"][:-40]
    found["text.wav"] = b"This is no sound.\n"
    found["empty.wav"] = b""
    return found


def opus_streams() -> dict[str, bytes]:
    """Behind a byte that tells how they are cut; odd ones have their checksums put right."""
    import moshi_c

    time = np.arange(6000) / 8000
    writer = moshi_c.OggOpusWriter(8000, serial=1)
    data = writer.append((0.3 * np.sin(2765 * time)).astype(np.float32)) + writer.close()
    pages = ogg.pages(data)
    packets = [one for page in pages[2:] for one in page.packets]
    long = ogg.joined_packet([bytes([0xE8]), bytes([0xE8])])  # two frames of 20 ms without data
    merged = ogg.page([*packets[:3], b"", long, b"\xff\xff"], 2, 1920, ogg.LAST)
    full = ogg.Page(0, 0, 1, 2, b"\xff" * 8, bytes(2040))
    other = ogg.page([b"\x01vorbis" + bytes(23)], 0, flags=ogg.FIRST, serial=2)
    found = {
        "plain": data,
        "several-packets": ogg.join([*pages[:2], merged]),
        "spanning": ogg.join([*pages[:2], full, dataclasses.replace(full, flags=1, number=3)]),
        "chained": ogg.join(pages[:4]) + data,
        "gap": ogg.join(pages[:5] + pages[9:]),
        "other-codec": ogg.join([other, *pages[:4], dataclasses.replace(other, flags=0)]),
        "no-head": ogg.join(pages[3:]),
    }
    return {name: b"\x09" + data for name, data in found.items()} | {
        "bad-checksum": b"\x08" + data[:900] + b"\0" + data[901:],
    }


def codec_files() -> dict[str, bytes]:
    def made(codes: list[int], **changes: int) -> bytes:
        header = {"version": 1, "codebooks": 2, "size": 8, "rate": 24000, "frame": 1920}
        header |= {"frames": len(codes) // 2, "samples": 1920 * (len(codes) // 2)} | changes
        return (
            struct.pack("<4sHHIIIIQ", b"MIMI", *header.values()) + np.array(codes, "<u2").tobytes()
        )

    return {
        "plain.mimi": made([1, 2, 3, 4, 5, 6]),
        "empty.mimi": made([]),
        "cut.mimi": made([1, 2, 3, 4])[:-1],
        "code-too-large.mimi": made([1, 9]),
        "many-frames.mimi": made([1, 2], frames=0xFFFFFFFF, samples=0xFFFFFFFF * 1920),
        "version.mimi": made([1, 2], version=2),
    }


def tokenizers() -> dict[str, bytes]:
    """SentencePiece models of a few pieces, written by hand: (text, score, type)."""

    def field(number: int, kind: int, value: bytes) -> bytes:
        return bytes([number << 3 | kind]) + value

    def sized(value: bytes) -> bytes:
        return bytes([len(value)]) + value

    def model(pieces: list[tuple[str, float, int]]) -> bytes:
        made = b""
        for text, score, kind in pieces:
            body = field(1, 2, sized(text.encode())) + field(2, 5, struct.pack("<f", score))
            made += field(1, 2, sized(body + field(3, 0, bytes([kind]))))
        return made + field(2, 2, sized(field(3, 0, b"\x02")))  # a trainer_spec: BPE

    common = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("<pad>", 0.0, 3)]
    words = [("\u2581", -1.0, 1), ("a", -2.0, 1), ("b", -3.0, 1), ("\u2581a", -0.5, 1)]
    return {
        "plain.model": model(common + words),
        "bytes.model": model([*common, ("<0x41>", 0.0, 6), ("<0xC3>", 0.0, 6)]),
        "no-unknown.model": model(words),
        "empty.model": b"",
    }


def make(folder: Path) -> None:
    """Everything, into `folder`."""
    make_model(folder / "model")
    corpora = {
        "json": JSON,
        "safetensors": SAFETENSORS,
        "config": configs(),
        "model": model_inputs(folder / "model"),
        "snapshot": snapshots(folder / "model"),
        "audio": sounds(),
        "mimi": codec_files(),
        "ogg_opus": opus_streams(),
        "tokenizer": tokenizers(),
    }
    sessions = {name: data for name, data in corpora["snapshot"].items() if name != "stream"}
    corpora["note"] = {name: note_of(data) for name, data in sessions.items()}
    for name, seeds in corpora.items():
        corpus = folder / "corpus" / name
        corpus.mkdir(parents=True, exist_ok=True)
        for seed, data in seeds.items():
            (corpus / f"seed-{seed}").write_bytes(data)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    with tempfile.TemporaryDirectory() as made:
        make(Path(made))
        shutil.copytree(made, folder, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
