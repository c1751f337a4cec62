"""Ours and every peer that is installed, in turn, same weights, same threads, parity first.

    pip install '.[test,parity,bench]'; python benchmarks/compare.py

Codec: Mimi at its real size with random weights, one and two threads. Frame by frame (encode, then
decode) beside upstream's PyTorch and rustymimi; four seconds at once beside upstream's PyTorch and
transformers, whose decoder does not stream. Language model: the model of step.py, 7B width with 8
of 32 layers and the whole depth transformer, in bf16 beside upstream's PyTorch, and ours in q8 and
q4.

A ggml port, if the command of its own benchmark is given, `--ggml "moshi-sts --bench --threads 2
--model FOLDER"`: frames a second of the whole model, codec included, in processes of their own. To
be read beside the times of seven.py.

Peers that read their number of threads once run in a process for each number; within a process the
sides take turns, block by block. A side whose results differ from upstream's is an error.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np

FRAME = 1920
PARITY_FRAMES = 12
WHOLE_FRAMES = 50
PEERS = ("moshi", "rustymimi", "transformers")

Side = Callable[[int], None]


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", *PEERS):
        if importlib.util.find_spec(name):
            found[name] = importlib.metadata.version(name)
    return found


def check(name: str, equal: int, worst: float) -> dict[str, Any]:
    """Codes of one frame in twelve may sit on a tie between two entries."""
    if equal < PARITY_FRAMES - 1 or worst > 1e-3:
        raise SystemExit(
            f"{name} differs from upstream: {equal} of {PARITY_FRAMES} frames have the same codes, "
            f"sound differs by {worst:.1e}"
        )
    return {"equal_frames_of_12": equal, "worst_sample_difference": worst}


# ---- codec -------------------------------------------------------------------------------------


def codec(threads: int, blocks: int) -> dict[str, Any]:
    """One thread count, in a process whose environment says it."""
    import checkpoints
    import sound
    import torch
    import upstream

    import moshi_c

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    frames = sound.minute().astype(np.float32)
    frames = frames[: frames.size // FRAME * FRAME].reshape(-1, FRAME)
    codes = np.random.default_rng(0).integers(0, 2048, (64, 8)).astype(np.int32)
    with tempfile.TemporaryDirectory() as name:
        folder = checkpoints.make_mimi(Path(name), "full")
        weights = folder / checkpoints.MIMI_NAME
        theirs = upstream.load_mimi(folder)
        ours = moshi_c.load_mimi(
            weights, config=folder / checkpoints.MIMI_CONFIG_NAME, threads=threads
        )
        whole = whole_signals(ours, theirs, folder, frames[:WHOLE_FRAMES].ravel(), blocks)
        stream = ours.stream()
        theirs.streaming_forever(1)

        def our_step(pcm: Any, said: Any) -> tuple[Any, Any]:
            return stream.encode(pcm), stream.decode(said)

        def their_step(pcm: Any, said: Any) -> tuple[Any, Any]:
            heard = theirs.encode(torch.from_numpy(pcm)[None, None])[0, :, 0].numpy()
            return heard, theirs.decode(torch.from_numpy(said)[None, :, None])[0, 0].numpy()

        steps: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
            "ours": our_step,
            "pytorch": their_step,
        }
        if importlib.util.find_spec("rustymimi"):
            import rustymimi

            rust = rustymimi.Tokenizer(str(weights), num_codebooks=8)

            def rust_step(pcm: Any, said: Any) -> tuple[Any, Any]:
                heard = rust.encode_step(pcm[None, None])
                made = rust.decode_step(said.astype(np.uint32)[None, :, None])
                return np.asarray(heard)[0, :, 0], np.asarray(made)[0, 0]

            steps["rustymimi"] = rust_step

        equal = dict.fromkeys(steps, 0)
        worst = dict.fromkeys(steps, 0.0)
        for pcm, said in zip(frames[:PARITY_FRAMES], codes, strict=False):
            found = {name: step(pcm, said) for name, step in steps.items()}
            for name, (heard, made) in found.items():
                equal[name] += bool((heard == found["pytorch"][0]).all())
                worst[name] = max(worst[name], float(abs(made - found["pytorch"][1]).max()))
        parity = {name: check(name, equal[name], worst[name]) for name in steps}

        def timed(step: Callable[[Any, Any], tuple[Any, Any]]) -> Side:
            return lambda index: void(step(frames[index % len(frames)], codes[index % 64]))

        sides = {name: timed(step) for name, step in steps.items()}
        times = common.interleave(sides, blocks, 10)
        ours_rate = common.read_rate(threads)
        return {
            "frame": common.summary(times) | {"parity": parity},
            **whole,
            "read_rate_gb_s": round(ours_rate, 1),
        }


def void(_: Any) -> None:
    """A side gives nothing back."""


def whole_signals(
    ours: Any, theirs: Any, folder: Path, pcm: np.ndarray, blocks: int
) -> dict[str, Any]:
    """Four seconds encoded, then decoded, in one call each."""
    if not importlib.util.find_spec("transformers"):
        return {}
    import torch

    model = in_transformers(folder)
    tensor = torch.from_numpy(pcm)[None, None]

    def our_run() -> tuple[Any, Any]:
        codes = ours.encode(pcm)
        return codes, ours.decode(codes)

    def their_run() -> tuple[Any, Any]:
        codes = theirs.encode(tensor)
        return codes[0].numpy(), theirs.decode(codes)[0, 0].numpy()

    def peer_run() -> tuple[Any, Any]:
        codes = model.encode(tensor, num_quantizers=8).audio_codes
        return codes[0].numpy(), model.decode(codes).audio_values[0, 0].numpy()

    runs = {"ours": our_run, "pytorch": their_run, "transformers": peer_run}
    codes, _ = their_run()
    parity = {}
    for name, run in runs.items():
        heard, _ = run()
        equal = float((heard == codes).all(0).mean())
        if equal < 0.9:
            raise SystemExit(f"{name} differs from upstream in {1 - equal:.0%} of the frames")
        parity[name] = {"equal_frames": round(equal, 3)}
    made = {
        "ours": ours.decode(codes.astype(np.int32)),
        "pytorch": theirs.decode(torch.from_numpy(codes)[None])[0, 0].numpy(),
        "transformers": model.decode(torch.from_numpy(codes)[None]).audio_values[0, 0].numpy(),
    }
    for name, sound in made.items():
        worst = float(abs(sound - made["pytorch"]).max())
        if worst > 1e-3:
            raise SystemExit(f"{name}'s sound differs from upstream's by {worst:.1e}")
        parity[name]["worst_sample_difference"] = worst
    sides = {name: (lambda _, run=run: void(run())) for name, run in runs.items()}
    times = common.interleave(sides, max(blocks // 2, 2), 1, warm_up=1)
    return {"four_seconds": common.summary(times) | {"parity": parity}}


def in_transformers(folder: Path) -> Any:
    """The same weights under the names of transformers' MimiModel."""
    import checkpoints
    import torch
    import transformers
    from safetensors.torch import load_file

    config = transformers.MimiConfig()
    renamed: dict[str, torch.Tensor] = {}
    words = {
        "encoder.model": "encoder.encoder_seanet.layers",
        "decoder.model": "decoder.decoder_seanet.layers",
        "encoder_transformer.transformer": "encoder.encoder_transformer",
        "decoder_transformer.transformer": "decoder.decoder_transformer",
        "downsample.": "encoder.downsample.",
        "upsample.": "decoder.upsample.",
        "conv.conv.conv": "conv",
        "convtr.convtr.convtr": "conv",
        "conv.conv": "conv",
        "convtr.convtr": "conv",
        "rvq_first.vq.": "semantic_residual_vector_quantizer.",
        "rvq_rest.vq.": "acoustic_residual_vector_quantizer.",
        "rvq_first.": "semantic_residual_vector_quantizer.",
        "rvq_rest.": "acoustic_residual_vector_quantizer.",
        "_codebook": "codebook",
        "_initialized": "initialized",
        "embedding_sum": "embed_sum",
        "linear1": "mlp.fc1",
        "linear2": "mlp.fc2",
        "norm1": "input_layernorm",
        "norm2": "post_attention_layernorm",
        "layer_scale_1": "self_attn_layer_scale",
        "layer_scale_2": "mlp_layer_scale",
        "out_proj.weight": "o_proj.weight",
        "out_projs.0.weight": "o_proj.weight",
    }
    heads, dim = config.num_attention_heads, config.hidden_size

    def halves(weight: torch.Tensor) -> torch.Tensor:
        """Rotary pairs lie side by side upstream, in two halves of a head here."""
        return weight.view(heads, dim // heads // 2, 2, dim).transpose(1, 2).reshape(dim, dim)

    for name, value in load_file(folder / checkpoints.MIMI_NAME).items():
        base, found, _ = name.partition(".self_attn.in_proj")
        if found:
            side = base.partition("_")[0]
            base = base.replace(f"{side}_transformer.transformer", f"{side}.{side}_transformer")
            base += ".self_attn"
            query, key, values = value.chunk(3)
            renamed[f"{base}.q_proj.weight"] = halves(query)
            renamed[f"{base}.k_proj.weight"] = halves(key)
            renamed[f"{base}.v_proj.weight"] = values
            continue
        for old, new in words.items():
            name = name.replace(old, new)
        renamed[name] = value
    model = transformers.MimiModel(config).eval()
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    left = [name for name in missing if not name.endswith((".initialized", "inv_freq"))]
    left += [name for name in unexpected if not name.endswith(".initialized")]
    if left:
        raise SystemExit(f"transformers names these weights in another way: {left[:6]}")
    return model


# ---- language model ----------------------------------------------------------------------------


def language(threads: int, blocks: int) -> dict[str, Any]:
    import step  # sets the environment's number of threads to its own
    import torch
    from moshi.models import LMGen, loaders

    import moshi_c

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as name:
        folder = step.make(Path(name))
        config = json.loads((folder / "config.json").read_text())
        path = folder / "model.safetensors"
        reference = loaders.get_moshi_lm(path, lm_kwargs=dict(config), dtype=torch.float32)
        truth = step.teacher_forced(reference.eval())
        del reference
        lm = loaders.get_moshi_lm(path, lm_kwargs=dict(config), dtype=torch.bfloat16).eval()

        def error(found: np.ndarray) -> float:
            return round(float(np.sqrt(((found - truth) ** 2).mean()) / truth.std()), 5)

        errors = {"pytorch": error(step.teacher_forced(lm))}
        models, sessions, sides = [], [], {}
        user = np.random.default_rng(3).integers(0, 2048, (256, 8))

        def step_of(session: Any) -> Side:
            return lambda index: void(
                session.step_codes(user[index % 256].astype(np.int32), decode=False)
            )

        # int8 codes leave about twice the rounding of bf16 here, 4 bits far more
        for dtype, most in (("bf16", errors["pytorch"]), ("q8", 0.05), ("q4", 0.5)):
            side = "ours" if dtype == "bf16" else f"ours_{dtype}"
            models.append(
                moshi_c.load(
                    path,
                    config=folder / "config.json",
                    dtype=dtype,
                    max_sessions=1,
                    threads=threads,
                )
            )
            errors[side] = error(step.our_forced(models[-1]))
            if not errors[side] <= most:
                raise SystemExit(f"{side} is {errors[side]} from float32, expected {most} at most")
            sessions.append(
                moshi_c.Session(models[-1], seed=1, text_temperature=0, audio_temperature=0)
            )
            sides[side] = step_of(sessions[-1])
        generator = LMGen(lm, use_sampling=False)
        generator.streaming_forever(1)
        sides["pytorch"] = lambda index: void(
            generator.step(torch.from_numpy(user[index % 256])[None, :, None])
        )
        before = common.read_rate(threads)
        result = common.summary(common.interleave(sides, blocks, 3, warm_up=2))
        after = common.read_rate(threads)
        for model, side in zip(models, ("ours", "ours_q8", "ours_q4"), strict=True):
            info = model._info
            size = info["temporal_bytes"] + info["depth_bytes"]
            seconds = result[side]["p50_ms"] / 1e3
            result[side] |= {"bytes": size, "gb_s": round(size / seconds / 1e9, 1)}
        for session in sessions:
            session.close()
        for model in models:
            model.close()
    return {
        "threads": threads,
        "layers": step.LAYERS,
        "rms_error_over_std_against_float32": errors,
        **result,
        "read_rate_gb_s": [round(before, 1), round(after, 1)],
    }


# ---- a ggml port -------------------------------------------------------------------------------


def port(command: str, blocks: int) -> dict[str, Any]:
    """Frames a second, as the last line that tells any has it, of each of a few runs."""
    words = shlex.split(command)
    rates = []
    for _ in range(blocks):
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=900)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SystemExit(f"--ggml: {error}") from None
        found = re.findall(r"([\d.]+) *(?:frames/s|fps)", done.stdout + done.stderr)
        if done.returncode or not found:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise SystemExit(f"--ggml: exit code {done.returncode}, no frames a second: {last}")
        rates.append(float(found[-1]))
        if rates[-1] == 0:
            raise SystemExit("--ggml: 0 frames a second")
    frame_ms = [round(1e3 / rate, 1) for rate in rates]
    return {"command": command, "frame_ms": frame_ms, "p50_ms": float(np.median(frame_ms))}


# ---- all of it ---------------------------------------------------------------------------------


def part(name: str, options: argparse.Namespace, threads: int) -> Any:
    """One part, in a process whose libraries all see the same number of threads."""
    environment = {
        key: str(threads)
        for key in ("MOSHI_C_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
    }
    done = subprocess.run(
        [sys.executable, __file__, "--part", name, "--blocks", str(options.blocks)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{name} with {threads} threads: exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = common.arguments(__doc__, "compare")
    parser.add_argument("--part", choices=["codec", "lm"], help="this one alone, as JSON")
    parser.add_argument("--only", choices=["codec", "lm"], help="leave the other out")
    parser.add_argument("--ggml", metavar="COMMAND", help="the benchmark of a ggml port, too")
    options = parser.parse_args()
    if options.part:
        run = codec if options.part == "codec" else language
        print(json.dumps(run(int(os.environ["MOSHI_C_THREADS"]), options.blocks)))
        return
    result: dict[str, Any] = {"versions": versions()}
    if options.only != "lm":
        result |= {f"codec_{n}_threads": part("codec", options, n) for n in (1, 2)}
    if options.only != "codec":
        result["language_model"] = part("lm", options, 2)
    if options.ggml:
        result["ggml_port"] = port(options.ggml, max(options.blocks // 4, 1))
    common.report("compare", options.out, result)


if __name__ == "__main__":
    main()
