"""Random checkpoints in the published layouts, built with upstream's own classes.

Upstream says which tensors a shape has; the values come from NumPy, seeded by the tensor's name, so
a checkpoint is the same on every machine. Scales keep the variance through the network: logits are
neither flat nor saturated, so that greedy streams keep moving and every matrix can be felt.
"""

from __future__ import annotations

import copy
import io
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import upstream
from moshi.models import loaders
from safetensors.torch import load_file, save_file

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]

LM_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MIMI_NAME = "mimi.safetensors"
MIMI_CONFIG_NAME = "mimi.json"
TOKENIZER_NAME = "tokenizer.model"

# ---- shapes ------------------------------------------------------------------------------------

DESCRIPTION: Config = {
    "type": "lut",
    "lut": {
        "n_bins": 31,
        "dim": 16,
        "tokenizer": "noop",
        "possible_values": ["very_bad", "bad", "neutral", "good", "very_good"],
    },
}
PACE: Config = {
    "type": "lut",
    "lut": {"n_bins": 3, "dim": 8, "tokenizer": "noop", "possible_values": ["slow", "fast"]},
}


@dataclass(frozen=True)
class Shape:
    """What makes a language model: upstream's keyword arguments and the family."""

    lm: Config
    model_type: str = "moshi"
    gen: Config = field(default_factory=dict)

    @property
    def n_q(self) -> int:
        return int(self.lm["n_q"])

    @property
    def dep_q(self) -> int:
        return int(self.lm["dep_q"])

    @property
    def user_q(self) -> int:
        return self.n_q - self.dep_q

    @property
    def card(self) -> int:
        return int(self.lm["card"])

    @property
    def text_card(self) -> int:
        return int(self.lm["text_card"])

    @property
    def max_delay(self) -> int:
        return int(max(self.lm["delays"]))


_COMMON: Config = {
    "dim": 128,
    "num_heads": 4,
    "num_layers": 3,
    "hidden_scale": 4.125,
    "causal": True,
    "layer_scale": None,
    "context": 100,
    "max_period": 10000,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
    "card": 256,
    "text_card": 200,
    "existing_text_padding_id": 3,
    "depformer_dim": 64,
    "depformer_num_heads": 4,
    "depformer_num_layers": 2,
    "depformer_dim_feedforward": 264,
    "depformer_multi_linear": True,
    "depformer_gating": "silu",
    "depformer_pos_emb": "none",
    "depformer_weights_per_step": True,
}
_NO_DEPTH: Config = {
    key: value for key, value in _COMMON.items() if not key.startswith("depformer_")
}
_DESCRIBED: Config = {
    "conditioners": {"description": DESCRIPTION},
    "fuser": {"sum": ["description"], "cross": [], "prepend": []},
}
_SCHEDULE16 = [*range(8), *[8] * 8]

# One entry per family and size. The small ones are awkward on purpose: contexts that are no
# multiple of a page, head and hidden sizes that are no multiple of a vector, delays of every kind.
SHAPES: dict[str, Shape] = {
    "moshi": Shape(
        _COMMON | {"n_q": 16, "dep_q": 8, "delays": [0, *([0] + [1] * 7) * 2]},
        gen={"temp": 0.0, "temp_text": 0.0},
    ),
    "hibiki": Shape(
        _COMMON
        | {"n_q": 16, "dep_q": 8, "delays": [0, *([0] + [2] * 7) * 2], "max_period": 100000}
        | {"context": 75}
        | _DESCRIBED,
        model_type="hibiki",
    ),
    "stt": Shape(
        _NO_DEPTH
        | {"n_q": 32, "dep_q": 0, "delays": [0] * 33, "max_period": 100000, "context": 90}
        | {"extra_heads_num_heads": 4, "extra_heads_dim": 6},
        model_type="stt",
    ),
    "depth16": Shape(
        _COMMON
        | {"n_q": 32, "dep_q": 16, "delays": [0, *([0] + [2] * 15) * 2]}
        | {"depformer_weights_per_step_schedule": _SCHEDULE16}
        | {"depformer_low_rank_embeddings": 24, "depformer_dim_feedforward": 192},
    ),
    "delays": Shape(
        _COMMON
        | {"n_q": 8, "dep_q": 4, "delays": [2, 0, 1, 3, 2, 1, 0, 4, 3], "dim": 60, "num_heads": 3}
        | {"depformer_dim": 44, "depformer_num_heads": 2, "depformer_dim_feedforward": 150}
        | {"hidden_scale": 3.7, "context": 64},
    ),
    "ff4": Shape(  # feed-forward of exactly four times the width: upstream's other hidden size
        _COMMON
        | {"n_q": 6, "dep_q": 3, "delays": [0, 0, 1, 1, 0, 1, 1], "hidden_scale": 4}
        | {"depformer_dim_feedforward": 256, "context": 33},
    ),
    # One tiny model that has every kind of matrix, for the test that swaps their rows.
    "rows": Shape(
        _COMMON
        | {"n_q": 5, "dep_q": 3, "delays": [1, 0, 2, 1, 0, 1], "dim": 32, "num_heads": 2}
        | {"num_layers": 2, "card": 24, "text_card": 40, "context": 12}
        | {"depformer_dim": 16, "depformer_num_heads": 2, "depformer_dim_feedforward": 66}
        | {"depformer_weights_per_step_schedule": [0, 1, 1], "depformer_low_rank_embeddings": 8}
        | {"extra_heads_num_heads": 2, "extra_heads_dim": 6}
        | {"conditioners": {"description": DESCRIPTION, "pace": PACE}}
        | {"fuser": {"sum": ["description", "pace"], "cross": [], "prepend": []}},
    ),
    # Nothing delayed, so that the first call already gives what was drawn.
    "draws": Shape(
        _COMMON
        | {"n_q": 4, "dep_q": 2, "delays": [0] * 5, "dim": 32, "num_heads": 2, "num_layers": 1}
        | {"card": 64, "text_card": 50, "context": 16}
        | {"depformer_dim": 16, "depformer_num_heads": 2, "depformer_num_layers": 1}
        | {"depformer_dim_feedforward": 66},
    ),
    # Vocabularies of the published codec on a small body, for a whole conversation.
    "session": Shape(
        _COMMON
        | {"n_q": 16, "dep_q": 8, "delays": [0, *([0] + [1] * 7) * 2]}
        | {"card": 2048, "text_card": 500, "context": 200, "num_layers": 2},
        gen={"temp": 0.0, "temp_text": 0.0},
    ),
    # The published widths, two layers deep; smaller vocabularies, as tables cost time and prove
    # nothing more.
    "wide7b": Shape(
        _COMMON
        | {"n_q": 16, "dep_q": 8, "delays": [0, *([0] + [1] * 7) * 2]}
        | {"dim": 4096, "num_heads": 32, "num_layers": 2, "context": 3000}
        | {"card": 512, "text_card": 1000}
        | {"depformer_dim": 1024, "depformer_num_heads": 16, "depformer_num_layers": 2}
        | {"depformer_dim_feedforward": 4224},
    ),
    "wide2b": Shape(
        _COMMON
        | {"n_q": 32, "dep_q": 16, "delays": [0, *([0] + [2] * 15) * 2]}
        | {"dim": 2560, "num_heads": 20, "num_layers": 2, "context": 3000, "max_period": 100000}
        | {"card": 512, "text_card": 1000}
        | {"depformer_dim": 1024, "depformer_num_heads": 16, "depformer_num_layers": 2}
        | {"depformer_dim_feedforward": 3072, "depformer_low_rank_embeddings": 128}
        | {"depformer_weights_per_step_schedule": _SCHEDULE16}
        | _DESCRIBED,
        model_type="hibiki",
    ),
}

_SMALL_MIMI_SIZES: Config = {
    "seanet": {"n_filters": 8, "dimension": 64},
    "quantizer": {"dimension": 24, "bins": 256, "input_dimension": 64, "output_dimension": 64},
    "transformer": {
        "d_model": 64,
        "num_heads": 4,
        "num_layers": 2,
        "dim_feedforward": 128,
        "input_dimension": 64,
        "output_dimensions": [64],
        "context": 20,
    },
}


def mimi_config(size: str, bins: int | None = None) -> Config:
    """Upstream's codec settings: "full" as published, "small" with the same strides."""
    config: Config = copy.deepcopy(loaders._mimi_config)
    if size == "small":
        for part, changes in _SMALL_MIMI_SIZES.items():
            config[part] |= copy.deepcopy(changes)
    elif size != "full":
        raise ValueError(f"a codec is 'full' or 'small', not {size!r}")
    if bins is not None:
        config["quantizer"]["bins"] = bins
    return config


# ---- values ------------------------------------------------------------------------------------


def _generator(name: str, seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64([zlib.crc32(name.encode()), seed]))


def _random(
    name: str, shape: Iterable[int], seed: int, std: float, mean: float = 0.0
) -> torch.Tensor:
    """Values of the given mean and deviation: normal, or uniform where many are needed fast."""
    rng, shape = _generator(name, seed), tuple(shape)
    if math.prod(shape) < 1 << 20:
        values = rng.standard_normal(shape, np.float32)
        values *= np.float32(std)
    else:
        values = rng.random(shape, np.float32)
        values -= np.float32(0.5)
        values *= np.float32(std * math.sqrt(12))
    if mean:
        values += np.float32(mean)
    return torch.from_numpy(values)


def _lm_value(name: str, shape: torch.Size, shape_of_model: Shape, seed: int) -> torch.Tensor:
    """A value for one tensor of a language model."""
    fan_in = shape[-1]
    if name.endswith(".alpha"):
        return _random(name, shape, seed, 0.2, 1.0)
    if name.endswith("learnt_padding"):
        return _random(name, shape, seed, 0.4)
    if name.startswith("condition_provider."):
        return _random(name, shape, seed, 1.0 if "embed" in name else 0.5 / math.sqrt(fan_in))
    if name.startswith(("emb.", "text_emb.")):
        return _random(name, shape, seed, 1.5 / math.sqrt(shape_of_model.n_q + 1))
    if name.startswith("depformer") and "emb" in name and "low_rank" not in name:
        return _random(name, shape, seed, 1.0)
    gains = {
        "in_projs": 1.2,
        "out_projs": 1.5,
        "linear_in": 1.3,
        "linear_out": 1.5,
        "text_linear": 2.0,
        "linears": 2.0,
        "extra_heads": 2.0,
    }
    gain = next((value for key, value in gains.items() if key in name), 1.0)
    return _random(name, shape, seed, gain / math.sqrt(fan_in))


def _mimi_value(name: str, shape: torch.Size, seed: int) -> torch.Tensor | None:
    """A value for one tensor of the codec; None for what stays as it is (the codebooks)."""
    if "_codebook" in name:
        return None
    if ".layer_scale_" in name:
        return torch.from_numpy(
            _generator(name, seed).uniform(0.1, 0.4, tuple(shape)).astype(np.float32)
        )
    if ".norm" in name:
        return _random(name, shape, seed, 0.15, 1.0 if name.endswith("weight") else 0.0)
    if name.endswith(".bias"):
        return _random(name, shape, seed, 0.005 if shape == (1,) else 0.1)
    if name.startswith("upsample"):
        return _random(name, shape, seed, 0.2, 0.7)
    if ".convtr." in name:
        # strides are half the kernels: two taps meet in each sample
        return _random(name, shape, seed, 1.25 / math.sqrt(2 * shape[0]))
    fan_in = math.prod(shape[1:])
    gain = 1.0
    if name == "encoder.model.0.conv.conv.weight":
        gain = 10.0  # sound is about 0.1 RMS
    elif name == "decoder.model.14.conv.conv.weight":
        gain = 0.05
    elif ".block.3." in name:
        gain = 0.5
    elif ".conv.conv." in name:
        gain = 1.25
    elif ".linear" in name:
        gain = 1.4
    elif "in_projs" in name:
        gain = 1.2
    return _random(name, shape, seed, gain / math.sqrt(fan_in))


# ---- files -------------------------------------------------------------------------------------


def pack(state: Tensors) -> Tensors:
    """In-memory attention names (`in_projs.0.weight`) to the published packed ones."""
    packed: Tensors = {}
    groups: dict[str, list[torch.Tensor]] = {}
    for name, value in state.items():
        head, found, tail = name.partition(".in_projs.")
        target = f"{head}.in_proj_weight"
        if not found:
            head, found, tail = name.partition(".out_projs.")
            target = f"{head}.out_proj.weight"
        if not found:
            packed[name] = value
            continue
        parts = groups.setdefault(target, [])
        if int(tail.split(".")[0]) != len(parts):
            raise ValueError(f"weight sets of {target} are out of order")
        parts.append(value)
    packed.update((name, torch.cat(parts)) for name, parts in groups.items())
    return packed


def _save(folder: Path, state: Tensors, sharded: bool) -> str:
    """Writes the tensors and returns the name that `moshi_name` has to carry."""
    if not sharded:
        save_file(state, folder / LM_NAME)
        return LM_NAME
    names = sorted(state)
    half = len(names) // 2
    where: dict[str, str] = {}
    for index, part in enumerate((names[:half], names[half:]), 1):
        file = f"model-{index:05}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    total = sum(value.numel() * value.element_size() for value in state.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX_NAME).write_text(json.dumps(index_file))
    return INDEX_NAME


def lm_state(shape: Shape, seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """All tensors of a language model under upstream's in-memory names."""
    skeleton = loaders.get_moshi_lm(
        None, lm_kwargs=copy.deepcopy(shape.lm), device="meta", dtype=torch.float32
    )
    shapes = {name: value.shape for name, value in skeleton.state_dict().items()}

    def make(name: str) -> torch.Tensor:
        kept = torch.float32 if name.startswith("condition_provider.") else dtype
        return _lm_value(name, shapes[name], shape, seed).to(kept)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return dict(zip(shapes, pool.map(make, shapes), strict=True))


def make_lm(
    folder: Path,
    shape_name: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    packed: bool = True,
    sharded: bool = False,
    shape: Shape | None = None,
) -> Path:
    """Writes the weights of a language model and its `config.json`."""
    shape = shape or SHAPES[shape_name]
    folder.mkdir(parents=True, exist_ok=True)
    state = lm_state(shape, seed, dtype)
    moshi_name = _save(folder, pack(state) if packed else state, sharded)
    config = copy.deepcopy(shape.lm) | {"moshi_name": moshi_name, "model_type": shape.model_type}
    if shape.gen:
        config["lm_gen_config"] = shape.gen
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def make_mimi(
    folder: Path,
    size: str,
    seed: int = 0,
    bins: int | None = None,
    other: Callable[[float], np.ndarray] | None = None,
) -> Path:
    """Writes a codec whose codebooks hold residuals of `other(seconds)`, and its settings."""
    folder.mkdir(parents=True, exist_ok=True)
    config = mimi_config(size, bins)
    with torch.device("meta"):
        skeleton = loaders.get_mimi(None, copy.deepcopy(config), device="meta")
    skeleton = skeleton.to_empty(device="cpu")
    state = skeleton.state_dict()

    def fill(name: str) -> None:
        value = _mimi_value(name, state[name].shape, seed)
        if value is not None:
            state[name].copy_(value)

    with torch.no_grad(), ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(fill, state))
    upstream.fill_codebooks(skeleton, seed, other)
    save_file(pack(skeleton.state_dict()), folder / MIMI_NAME)
    (folder / MIMI_CONFIG_NAME).write_text(json.dumps(config, indent=1))
    names = {"mimi_name": MIMI_NAME, "mimi_config_name": MIMI_CONFIG_NAME}
    (folder / "config.json").write_text(json.dumps(names))
    return folder


def make_tokenizer(folder: Path, text_card: int) -> Path:
    """Trains a toy sentencepiece model: unk 0, bos 1, eos 2, pad 3, `text_card` pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(text_card)
    syllables = [c + v for c in "bdfgklmnprstvwz" for v in ("a", "e", "i", "o", "u", "ai")]
    words = ["".join(rng.choice(syllables, int(rng.integers(1, 5)))) for _ in range(text_card * 2)]
    lines = [" ".join(rng.choice(words, 8)) for _ in range(500 + text_card // 8)]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        model_type="bpe",
        vocab_size=text_card,
        byte_fallback=text_card >= 400,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    path = folder / TOKENIZER_NAME
    path.write_bytes(out.getvalue())
    return path


def link(source: Path, target: Path) -> None:
    """The same file under another name, without a copy where the disk allows it."""
    try:
        os.link(source, target)
    except OSError:
        target.write_bytes(source.read_bytes())


def make_folder(
    folder: Path,
    shape_name: str,
    mimi: Path,
    tokenizer: Path,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    packed: bool = True,
    sharded: bool = False,
    shape: Shape | None = None,
) -> Path:
    """A complete repository: a new language model with a codec and a tokenizer that exist."""
    make_lm(folder, shape_name, seed, dtype, packed, sharded, shape)
    for source, name in (
        (mimi / MIMI_NAME, MIMI_NAME),
        (mimi / MIMI_CONFIG_NAME, MIMI_CONFIG_NAME),
        (tokenizer, TOKENIZER_NAME),
    ):
        link(source, folder / name)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "mimi_name": MIMI_NAME,
        "mimi_config_name": MIMI_CONFIG_NAME,
        "tokenizer_name": TOKENIZER_NAME,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def mutate(
    source: Path, folder: Path, change: Callable[[Tensors], None], name: str = LM_NAME
) -> Path:
    """A copy of a folder with some tensors of one of its files changed."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.name != name:
            link(file, folder / file.name)
    state = load_file(source / name)
    change(state)
    save_file(state, folder / name)
    return folder


def swap_rows(state: Tensors, name: str, first: int, second: int) -> None:
    """Exchanges two rows of a matrix, or two entries of a vector."""
    value = state[name].clone()
    rows = value.view(-1) if value.numel() == value.shape[-1] else value
    rows[[first, second]] = rows[[second, first]].clone()
    state[name] = value


def rows_of(value: torch.Tensor) -> int:
    """How many rows `swap_rows` sees."""
    return value.shape[-1] if value.numel() == value.shape[-1] else value.shape[0]
