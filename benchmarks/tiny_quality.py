"""What the model in the package can do: its codec on sentences it was not trained on, and what it
answers in calls.

The codec is measured beside Opus at 6 kbit/s on the same sentences. Calls are held greedily and at
the model's own temperatures, by the evaluation of its training (examples/train_tiny/eval_lm.py says
what is asked and counted): users have voices that were never trained on, with noise. With --sounds
FOLDER a greedy answer of each kind is kept there as a small OGG file.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
from pathlib import Path
from typing import Any

import common
import numpy as np
import soundfile

import moshi_c
from moshi_c.hub import packaged_model

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "train_tiny"))

import eval_codec
import eval_lm
from corpus import split
from espeak import Espeak
from mimi_tiny import StreamingCodec

RATE = 24000
OPUS_BITS = 6000


def opus(pcm: np.ndarray) -> np.ndarray:
    """Through libopus at 6 kbit/s, by libsndfile."""
    packed = io.BytesIO()
    # 0 is libsndfile's 256 kbit/s, 1 its 6 kbit/s.
    soundfile.write(packed, pcm, RATE, format="OGG", subtype="OPUS", compression_level=1.0)
    packed.seek(0)
    heard, _ = soundfile.read(packed, dtype="float32")
    return np.pad(heard, (0, max(len(pcm) - len(heard), 0)))[: len(pcm)]


def codec(sentences: int, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {"seed": seed}
    own = StreamingCodec(packaged_model())
    for name, coder, bits in (
        ("mimi-tiny", own.through, own.bits_per_second),
        ("opus", opus, OPUS_BITS),
    ):
        print(f"{name}, {bits} bit/s", flush=True)
        groups = eval_codec.evaluate(coder, sentences, seed)["groups"]
        found[name] = {"bits_per_second": bits, "groups": groups}
    return found


def frame_ms(frames: int = 1000) -> dict[str, float]:
    """Milliseconds a frame, sound to sound, in f32 on one thread."""
    user = 0.05 * np.random.default_rng(0).standard_normal((frames, 1920)).astype(np.float32)
    with moshi_c.load(dtype="f32", threads=1) as model, moshi_c.Session(model, seed=1) as session:
        for frame in user:
            session.step(frame)
        stats = session.stats
    return {"p50_ms": round(stats.p50_ms, 3), "p99_ms": round(stats.p99_ms, 3)}


def keep_sounds(listener: eval_lm.Listener, folder: Path, seed: int, count: int = 10) -> None:
    """Questions and answers of `count` calls, families in turn: the user left, the model right."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, users = random.Random(seed), eval_lm.Users(Espeak(), seed)
    families: dict[str, list[Any]] = {}
    for exchange in generator.sample(split().trained, len(split().trained)):
        families.setdefault(exchange.family, []).append(exchange)
    chosen = [group.pop() for _ in range(count) for group in families.values() if group][:count]
    asked = [users.ask(exchange.question)[0] for exchange in chosen]
    for exchange, user, reply in zip(chosen, asked, listener.converse(asked), strict=True):
        last = int(np.flatnonzero(np.abs(reply.pcm) > eval_lm.AUDIBLE)[-1]) + RATE // 4
        both = np.stack([user[:last], reply.pcm[: len(user)][:last]], axis=1)
        name = exchange.question.replace(" ", "-") + ".ogg"
        soundfile.write(folder / name, both, RATE, format="OGG", subtype="OPUS")
        print(f"{name}: {reply.text()!r}, expected {exchange.answer!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, default=40, help="of the codec, in each group")
    parser.add_argument("--count", type=int, default=1000, help="of exchanges in a group, at most")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--sounds", type=Path, help="where ten answers are kept as OGG")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "tiny_quality.json")
    options = parser.parse_args()

    greedy = eval_lm.Listener(seed=options.seed, threads=2)
    if options.sounds:
        keep_sounds(greedy, options.sounds, options.seed)
        return
    with moshi_c.load() as model:
        own = model.config["lm_gen_config"]
    files = sum(file.stat().st_size for file in packaged_model().iterdir())
    result: dict[str, Any] = {
        "megabytes": round(files / 1e6, 2),
        "frame_f32_one_thread": frame_ms(),
        "codec": codec(options.sentences, options.seed),
    }
    print("greedy", flush=True)
    result["greedy"] = eval_lm.evaluate(greedy, options.count, options.seed)
    print(f"as its config asks, {own}", flush=True)
    sampled = eval_lm.Listener(temperatures=None, seed=options.seed, threads=2)
    figures = eval_lm.evaluate(sampled, options.count, options.seed)
    result["sampled"] = {"lm_gen_config": own} | figures
    common.report("tiny_quality", options.out, result)


if __name__ == "__main__":
    main()
