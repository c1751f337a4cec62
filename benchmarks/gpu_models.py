"""A model of the 7B's shapes with a codec of the real size: gpu_models.py FOLDER.

Random numbers, bf16 and f32 as published; NumPy alone is needed. 15.8 GB.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from pathlib import Path

import numpy as np

DIM, LAYERS, HIDDEN, TEXT, CARD = 4096, 32, 11264, 32000, 2048
DEPTH, DEPTH_LAYERS, DEPTH_HIDDEN, STEPS = 1024, 6, 2816, 8
CODEC, CODEC_LAYERS, BINS, BOOKS, ENTRY = 512, 8, 2048, 32, 256
RATIOS = (8, 6, 5, 4)

Shapes = dict[str, list[int]]


def layers(base: str, count: int, dim: int) -> Shapes:
    names = (f"{base}.layers.{i}" for i in range(count))
    return {f"{name}.norm{k}.alpha": [1, 1, dim] for name in names for k in (1, 2)}


def language() -> Shapes:
    shapes: Shapes = {f"emb.{k}.weight": [CARD + 1, DIM] for k in range(16)}
    shapes |= {"text_emb.weight": [TEXT + 1, DIM], "text_linear.weight": [TEXT, DIM]}
    shapes |= {"out_norm.alpha": [1, 1, DIM], "depformer_text_emb.weight": [TEXT + 1, DEPTH]}
    shapes |= layers("transformer", LAYERS, DIM) | layers("depformer", DEPTH_LAYERS, DEPTH)
    for i in range(LAYERS):
        base = f"transformer.layers.{i}"
        shapes[f"{base}.self_attn.in_proj_weight"] = [3 * DIM, DIM]
        shapes[f"{base}.self_attn.out_proj.weight"] = [DIM, DIM]
        shapes[f"{base}.gating.linear_in.weight"] = [2 * HIDDEN, DIM]
        shapes[f"{base}.gating.linear_out.weight"] = [DIM, HIDDEN]
    for k in range(STEPS):
        shapes[f"depformer_in.{k}.weight"] = [DEPTH, DIM]
        shapes[f"linears.{k}.weight"] = [CARD, DEPTH]
    for k in range(STEPS - 1):
        shapes[f"depformer_emb.{k}.weight"] = [CARD + 1, DEPTH]
    for i in range(DEPTH_LAYERS):
        base = f"depformer.layers.{i}"
        shapes[f"{base}.self_attn.in_proj_weight"] = [STEPS * 3 * DEPTH, DEPTH]
        shapes[f"{base}.self_attn.out_proj.weight"] = [STEPS * DEPTH, DEPTH]
        for k in range(STEPS):
            shapes[f"{base}.gating.{k}.linear_in.weight"] = [2 * DEPTH_HIDDEN, DEPTH]
            shapes[f"{base}.gating.{k}.linear_out.weight"] = [DEPTH, DEPTH_HIDDEN]
    return shapes


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


def write(path: Path, shapes: Shapes, dtype: str) -> None:
    """Noise as large as a trained model's; norms, scales and counts are positive."""
    size = {"BF16": 2, "F32": 4}[dtype]
    noise = np.random.default_rng(0).standard_normal(1 << 22, np.float32)
    header: dict[str, object] = {}
    offset = 0
    for name, shape in shapes.items():
        count = size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + count]}
        offset += count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def stored(values: np.ndarray) -> bytes:
        words = np.ascontiguousarray(values, np.float32)
        if size == 4:
            return words.tobytes()
        return (words.view(np.uint32) >> 16).astype("<u2").tobytes()

    columns: dict[float, bytes] = {}
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            count = math.prod(shape)
            if name.endswith(("alpha", "usage", "_initialized", "scale")) or ".norm" in name:
                value = 0.01 if name.endswith("scale") else 0.0 if name.endswith("bias") else 1.0
                file.write(stored(np.full(count, value)))
                continue
            deviation = 1.0 if "embedding_sum" in name else 0.5 / math.sqrt(math.prod(shape[1:]))
            if deviation not in columns:
                columns[deviation] = stored(noise * deviation)
            data = columns[deviation]
            for left in range(size * count, 0, -len(data)):
                file.write(data[:left])


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "model.safetensors", language(), "BF16")
    write(folder / "tokenizer-e351c8d8-checkpoint125.safetensors", codec(), "F32")


if __name__ == "__main__":
    main()
