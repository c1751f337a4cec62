"""A model with random numbers: gpu_models.py FOLDER [7b | stt] [dry].

7b: its shapes in bf16 as published, 15.4 GB. stt: those of STT-1B, 2.0 GB. Both with a codec of
the real size in f32. NumPy alone is needed; all cores write. dry: narrow ones, with the package's
codec.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CODEC, CODEC_LAYERS, BINS, BOOKS, ENTRY = 512, 8, 2048, 32, 256
RATIOS = (8, 6, 5, 4)
CODEC_NAME = "tokenizer-e351c8d8-checkpoint125.safetensors"
TINY = Path(__file__).resolve().parent.parent / "moshi_c" / "data" / "moshi-tiny"
PIECE = 64 << 20  # bytes that one thread writes at a time

Shapes = dict[str, list[int]]


@dataclass(frozen=True)
class Model:
    """What the shapes of a language model follow from; steps: of the depth pass, 0 without."""

    dim: int
    layers: int
    heads: int
    text: int
    streams: int
    steps: int
    card: int = 2048
    depth: int = 1024
    depth_layers: int = 6
    context: int = 3000

    @property
    def hidden(self) -> int:
        """As upstream has it: two thirds of 4.125 times the width."""
        return int(4.125 * self.dim) * 2 // 3


MODELS = {
    "7b": Model(4096, 32, 32, 32000, 16, 8),
    "stt": Model(2048, 16, 16, 8000, 32, 0, context=750),
}
NARROW = {
    "7b": Model(256, 2, 2, 400, 16, 8, card=512, depth=96, depth_layers=1, context=100),
    "stt": Model(256, 2, 2, 400, 8, 0, card=512, context=100),
}


def layers(base: str, count: int, dim: int) -> Shapes:
    names = (f"{base}.layers.{i}" for i in range(count))
    return {f"{name}.norm{k}.alpha": [1, 1, dim] for name in names for k in (1, 2)}


def language(m: Model) -> Shapes:
    dim, hidden = m.dim, m.hidden
    shapes: Shapes = {f"emb.{k}.weight": [m.card + 1, dim] for k in range(m.streams)}
    shapes |= {"text_emb.weight": [m.text + 1, dim], "text_linear.weight": [m.text, dim]}
    shapes |= {"out_norm.alpha": [1, 1, dim]} | layers("transformer", m.layers, dim)
    for i in range(m.layers):
        base = f"transformer.layers.{i}"
        shapes[f"{base}.self_attn.in_proj_weight"] = [3 * dim, dim]
        shapes[f"{base}.self_attn.out_proj.weight"] = [dim, dim]
        shapes[f"{base}.gating.linear_in.weight"] = [2 * hidden, dim]
        shapes[f"{base}.gating.linear_out.weight"] = [dim, hidden]
    return shapes | (depth(m) if m.steps else {})


def depth(m: Model) -> Shapes:
    dim, hidden = m.depth, int(4.125 * m.depth) * 2 // 3
    shapes: Shapes = {"depformer_text_emb.weight": [m.text + 1, dim]}
    shapes |= layers("depformer", m.depth_layers, dim)
    for k in range(m.steps):
        shapes[f"depformer_in.{k}.weight"] = [dim, m.dim]
        shapes[f"linears.{k}.weight"] = [m.card, dim]
    for k in range(m.steps - 1):
        shapes[f"depformer_emb.{k}.weight"] = [m.card + 1, dim]
    for i in range(m.depth_layers):
        base = f"depformer.layers.{i}"
        shapes[f"{base}.self_attn.in_proj_weight"] = [m.steps * 3 * dim, dim]
        shapes[f"{base}.self_attn.out_proj.weight"] = [m.steps * dim, dim]
        for k in range(m.steps):
            shapes[f"{base}.gating.{k}.linear_in.weight"] = [2 * hidden, dim]
            shapes[f"{base}.gating.{k}.linear_out.weight"] = [dim, hidden]
    return shapes


def config(m: Model) -> dict[str, object]:
    """config.json, as upstream's loader reads it."""
    half = [0] + [1] * 7
    found: dict[str, object] = {
        "model_type": "moshi" if m.steps else "stt",
        "dim": m.dim, "num_heads": m.heads, "num_layers": m.layers, "hidden_scale": 4.125,
        "causal": True, "layer_scale": None, "context": m.context, "gating": "silu",
        "max_period": 10000 if m.steps else 100000, "norm": "rms_norm_f32",
        "positional_embedding": "rope", "card": m.card, "text_card": m.text,
        "existing_text_padding_id": 3, "n_q": m.streams, "dep_q": m.steps,
        "delays": [0] + (2 * half if m.steps else [0] * m.streams),
        "moshi_name": "model.safetensors", "mimi_name": CODEC_NAME,
    }  # fmt: skip
    if m.steps:
        found |= {
            "depformer_dim": m.depth, "depformer_num_heads": 16 if m.depth == 1024 else 4,
            "depformer_num_layers": m.depth_layers,
            "depformer_dim_feedforward": int(4.125 * m.depth), "depformer_multi_linear": True,
            "depformer_gating": "silu", "depformer_pos_emb": "none",
            "depformer_weights_per_step": True,
        }  # fmt: skip
    return found


def conv(shapes: Shapes, name: str, out: int, inner: int, kernel: int) -> None:
    shapes[f"{name}.conv.conv.weight"] = [out, inner, kernel]
    shapes[f"{name}.conv.conv.bias"] = [out]


def residual(shapes: Shapes, name: str, width: int) -> None:
    conv(shapes, f"{name}.block.1", width // 2, width, 3)
    conv(shapes, f"{name}.block.3", width, width // 2, 1)


def codec() -> Shapes:
    shapes: Shapes = {}
    width, at = 64, 1
    conv(shapes, "encoder.model.0", width, 1, 7)
    for ratio in reversed(RATIOS):
        residual(shapes, f"encoder.model.{at}", width)
        conv(shapes, f"encoder.model.{at + 2}", 2 * width, width, 2 * ratio)
        width, at = 2 * width, at + 3
    conv(shapes, f"encoder.model.{at + 1}", CODEC, width, 3)
    conv(shapes, "decoder.model.0", width, CODEC, 7)
    at = 2
    for ratio in RATIOS:
        name = f"decoder.model.{at}.convtr.convtr"
        shapes[f"{name}.weight"] = [width, width // 2, 2 * ratio]
        shapes[f"{name}.bias"] = [width // 2]
        width //= 2
        residual(shapes, f"decoder.model.{at + 1}", width)
        at += 3
    conv(shapes, f"decoder.model.{at}", 1, width, 3)
    for side in ("encoder", "decoder"):
        for i in range(CODEC_LAYERS):
            base = f"{side}_transformer.transformer.layers.{i}"
            shapes[f"{base}.self_attn.in_projs.0.weight"] = [3 * CODEC, CODEC]
            shapes[f"{base}.self_attn.out_projs.0.weight"] = [CODEC, CODEC]
            shapes[f"{base}.linear1.weight"] = [4 * CODEC, CODEC]
            shapes[f"{base}.linear2.weight"] = [CODEC, 4 * CODEC]
            for k in (1, 2):
                shapes |= {f"{base}.norm{k}.{part}": [CODEC] for part in ("weight", "bias")}
                shapes[f"{base}.layer_scale_{k}.scale"] = [CODEC]
    for name, count in (("first", 1), ("rest", BOOKS - 1)):
        base = f"quantizer.rvq_{name}"
        shapes[f"{base}.input_proj.weight"] = [ENTRY, CODEC, 1]
        shapes[f"{base}.output_proj.weight"] = [CODEC, ENTRY, 1]
        for i in range(count):
            book = f"{base}.vq.layers.{i}._codebook"
            shapes[f"{book}._initialized"] = [1]
            shapes[f"{book}.cluster_usage"] = [BINS]
            shapes[f"{book}.embedding_sum"] = [BINS, ENTRY]
    shapes["downsample.conv.conv.conv.weight"] = [CODEC, CODEC, 4]
    shapes["upsample.convtr.convtr.convtr.weight"] = [CODEC, 1, 4]
    return shapes


def values(name: str, shape: list[int]) -> float | None:
    """What all numbers of a tensor are; None: noise."""
    if not (name.endswith(("alpha", "usage", "_initialized", "scale")) or ".norm" in name):
        return None
    return 0.01 if name.endswith("scale") else 0.0 if name.endswith("bias") else 1.0


def write(path: Path, shapes: Shapes, dtype: str) -> None:
    """Noise as large as a trained model's; norms, scales and counts are positive."""
    size = {"BF16": 2, "F32": 4}[dtype]
    noise = np.random.default_rng(0).standard_normal(1 << 22, np.float32)
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def stored(numbers: np.ndarray) -> bytes:
        words = np.ascontiguousarray(numbers, np.float32)
        if size == 4:
            return words.tobytes()
        return (words.view(np.uint32) >> 16).astype("<u2").tobytes()

    blocks: dict[float, bytes] = {}
    pieces: list[tuple[int, int, bytes]] = []  # from, to, what is repeated there
    at = 8 + len(text)
    for name, shape in shapes.items():
        count = math.prod(shape)
        value = values(name, shape)
        if value is None:
            deviation = 1.0 if "embedding_sum" in name else 0.5 / math.sqrt(math.prod(shape[1:]))
            if deviation not in blocks:
                blocks[deviation] = stored(noise * deviation)
            block = blocks[deviation]
        else:
            block = stored(np.full(count, value))
        end = at + size * count
        pieces += [(i, min(i + PIECE, end), block) for i in range(at, end, PIECE)]
        at = end
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def put(piece: tuple[int, int, bytes]) -> None:
        place, last, block = piece
        while place < last:
            place += os.pwrite(file, memoryview(block)[: last - place], place)

    try:
        os.pwrite(file, struct.pack("<Q", len(text)) + text, 0)
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(put, pieces))
    finally:
        os.close(file)


def main(words: list[str]) -> None:
    folder, dry = Path(words[0]), "dry" in words
    model = (NARROW if dry else MODELS)["stt" if "stt" in words else "7b"]
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    if dry:
        settings = json.loads((TINY / "config.json").read_text())
        shutil.copy(TINY / settings["mimi_name"], folder / CODEC_NAME)
        shutil.copy(TINY / settings["mimi_config_name"], folder / "mimi.json")
        extra = {"mimi_config_name": "mimi.json"}
    else:
        write(folder / CODEC_NAME, codec(), "F32")
        extra = {}
    write(folder / "model.safetensors", language(model), "BF16")
    # Last, as the sign that the folder is whole.
    (folder / "config.json").write_text(json.dumps(config(model) | extra, indent=1) + "\n")
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e9
    print(f"{folder}: {size:.1f} GB in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
