"""One step of a full-width language model cut to 8 layers, bf16, two threads: ours and upstream's.

The temporal transformer has the 7B's width and 8 of its 32 layers, the depth transformer is whole.
Weights are random. Before the clock runs, both sides read the same tokens with teacher forcing and
our logits must be no further from upstream's float32 run than upstream's own bf16 run is.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import common

THREADS = 2
os.environ["MOSHI_C_THREADS"] = str(THREADS)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import upstream  # noqa: E402
from moshi.models import LMGen, loaders  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import moshi_c  # noqa: E402

LAYERS = 8
PARITY_STEPS = 3


def make(folder: Path) -> Path:
    """Random bf16 weights under upstream's names, from one pool of normal numbers."""
    config = dict(loaders._lm_kwargs) | {"num_layers": LAYERS}
    skeleton = loaders.get_moshi_lm(None, lm_kwargs=dict(config), device="meta")
    pool = torch.randn(1 << 22, generator=torch.Generator().manual_seed(1))
    state = {}
    for index, (name, value) in enumerate(skeleton.state_dict().items()):
        if name.endswith("alpha"):
            state[name] = torch.ones(value.shape, dtype=torch.bfloat16)
            continue
        scale = 0.02 if "emb" in name else value.shape[-1] ** -0.5
        count = value.numel()
        rolled = torch.roll(pool, index * 10007) * scale
        tiled = rolled.to(torch.bfloat16).repeat(-(-count // rolled.numel()))[:count]
        state[name] = tiled.view(value.shape).clone()
    save_file(state, folder / "model.safetensors")
    del state
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def forced(rng: np.random.Generator) -> tuple[np.ndarray, int, np.ndarray]:
    return rng.integers(0, 2048, 8), int(rng.integers(4, 32000)), rng.integers(0, 2048, 8)


def teacher_forced(lm: torch.nn.Module) -> np.ndarray:
    """Text logits of a few steps; forced tokens are drawn from a seed of their own."""
    rng = np.random.default_rng(5)
    found = []
    held: list[int] = [0]

    def force(token: torch.Tensor) -> None:
        token[:] = held[0]

    generator = LMGen(
        lm,
        use_sampling=False,
        on_text_hook=force,
        on_text_logits_hook=lambda logits: found.append(logits.float().numpy().ravel().copy()),
    )
    with generator.streaming(1):
        for _ in range(PARITY_STEPS):
            user, held[0], audio = forced(rng)
            generator.step(
                torch.from_numpy(user)[None, :, None],
                depformer_replace_tokens=torch.from_numpy(audio)[None, :, None],
            )
    return np.array(found)


def our_forced(model: moshi_c.Model) -> np.ndarray:
    rng = np.random.default_rng(5)
    found = []
    with moshi_c.Session(model, seed=1, text_temperature=0, keep_logits=True) as session:
        for _ in range(PARITY_STEPS):
            user, text, audio = forced(rng)
            session._force_next(text, audio)
            session.step_codes(user.astype(np.int32), decode=False)
            found.append(session.logits[0].copy())
    return np.array(found)


def main() -> None:
    parser = common.arguments(__doc__, "step")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as name:
        folder = make(Path(name))
        config = json.loads((folder / "config.json").read_text())
        path = folder / "model.safetensors"
        reference = loaders.get_moshi_lm(path, lm_kwargs=dict(config), dtype=torch.float32)
        truth = teacher_forced(reference.eval())
        del reference
        lm = loaders.get_moshi_lm(path, lm_kwargs=dict(config), dtype=torch.bfloat16).eval()
        model = moshi_c.load(path, config=folder / "config.json", max_sessions=1)
        deviation = float(truth.std())
        errors = {
            "ours": float(np.sqrt(((our_forced(model) - truth) ** 2).mean()) / deviation),
            "pytorch": float(np.sqrt(((teacher_forced(lm) - truth) ** 2).mean()) / deviation),
        }
        if errors["ours"] > errors["pytorch"]:
            raise SystemExit(f"our logits are further from float32 than upstream's bf16: {errors}")

        rng = np.random.default_rng(3)
        user = rng.integers(0, 2048, (256, 8))
        session = moshi_c.Session(model, seed=1, text_temperature=0, audio_temperature=0)
        generator = LMGen(lm, use_sampling=False)
        generator.streaming_forever(1)

        def ours(index: int) -> None:
            session.step_codes(user[index % 256].astype(np.int32), decode=False)

        def theirs(index: int) -> None:
            generator.step(torch.from_numpy(user[index % 256])[None, :, None])

        before = common.read_rate(THREADS)
        times = common.interleave({"ours": ours, "pytorch": theirs}, options.blocks, 5)
        after = common.read_rate(THREADS)
        result = common.summary(times)
        temporal = LAYERS * 205_520_896 + 131_072_000
        streamed = 2 * (temporal + 666_894_336)
        rate = streamed / (result["ours"]["p50_ms"] * 1e-3) / 1e9
        stats = model._core.stats()
        common.report(
            "step",
            options.out,
            {
                "threads": THREADS,
                "layers": LAYERS,
                "dtype": "bf16",
                "rms_error_over_std_against_float32": errors,
                **result,
                "bytes_streamed": streamed,
                "ours_gb_s": round(rate, 1),
                "read_rate_gb_s": [round(before, 1), round(after, 1)],
                "share_of_read_rate": round(rate / max(before, after), 3),
                "ours_stage_ms": {
                    key[:-2]: round(1e3 * value / stats["ticks"], 2)
                    for key, value in stats.items()
                    if key.endswith("_s")
                },
            },
        )
        session.close()
        model.close()


if __name__ == "__main__":
    _ = upstream  # sets upstream's switches before it is imported
    main()
