"""What each weight format costs in quality: teacher-forced against float32, past several wraps of
the ring.

The small model of the package holds a conversation in float32. Then every format reads the same
user's codes and the same tokens of its own, and its logits are compared with the float32 run's:
Kullback-Leibler divergence (nats) and the share of frames whose most likely token is the same, for
the text and for each codebook. "bf16 keys and values" tells apart what they alone cost, since every
format but f32 has them by default; "int8 keys and values" is what their smaller format costs.

Of the package's model it also counts the right answers in calls, as benchmarks/tiny_quality.py
does: greedy, by users whose voices it never heard.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import common
import numpy as np
import sound
from played import Played, divergence, play_with

import moshi_c

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "train_tiny"))

import eval_lm
from corpus import split
from espeak import Espeak

FORMATS = {
    "bf16 keys and values": {"dtype": "f32", "kv_dtype": "bf16"},
    "int8 keys and values": {"dtype": "f32", "kv_dtype": "int8"},
    "bf16": {"dtype": "bf16"},
    "fp8": {"dtype": "fp8"},
    "int8": {"dtype": "int8"},
    "q8": {"dtype": "q8"},
    "q4": {"dtype": "q4"},
}
TALK = (
    "hello, how are you?",
    "say the numbers seven two",
    "what colour is the sky?",
    "what is the opposite of hot?",
    "what is two plus three?",
)


def user_sound(frames: int, frame_size: int) -> np.ndarray:
    """Questions with pauses of a few seconds between them."""
    parts: list[np.ndarray] = []
    total = 0
    for turn in range(frames):
        parts += [sound.speech(TALK[turn % len(TALK)]), sound.silence(2 + turn % 3)]
        total += len(parts[-2]) + len(parts[-1])
        if total >= frames * frame_size:
            break
    return np.concatenate(parts)[: frames * frame_size].astype(np.float32)


def conversation(
    model: moshi_c.Model, frames: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The user's codes, and the text and audio tokens that the model chose at each step."""
    delays = model.config["delays"]
    longest, dep_q = max(delays), model.config["dep_q"]
    pcm = user_sound(frames + longest, model.frame_size).reshape(-1, model.frame_size)
    with moshi_c.Session(model, seed=seed) as session:
        out = [session.step(frame, decode=False) for frame in pcm]
    user = np.stack([frame.user_codes for frame in out[:frames]])
    # What a stream chose at step i comes out `longest` steps later, less its own delay. What never
    # comes out, because its delay had not passed yet, is replaced by the first that does.
    said = np.array([[frame.text_token, *frame.codes] for frame in out[longest:]])
    steps = np.arange(frames)
    chosen = [said[np.maximum(steps - delay, 0), s] for s, delay in enumerate(delays[: 1 + dep_q])]
    text, audio = chosen[0], np.stack(chosen[1:], 1)
    return user, text, audio


def logits(played: Played) -> tuple[np.ndarray, np.ndarray]:
    return played.text_logits[:, None], played.audio_logits


def right_answers(count: int, **settings: Any) -> float:
    """The share of `count` trained exchanges."""
    asked = random.Random(5).sample(split().trained, count)
    listener = eval_lm.Listener(threads=None, **settings)
    return float(eval_lm.ask_all(listener, Espeak(), asked, 5, sounds=0)["exact"])


def main() -> None:
    parser = common.arguments(__doc__, "quality")
    parser.add_argument("--model", help="folder or hub id; default: the package's small model")
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--answers", type=int, default=200, help="of the package's model")
    options = parser.parse_args()

    def opened(**settings: Any) -> moshi_c.Model:
        return moshi_c.load(options.model, max_sessions=1, progress=False, **settings)

    with opened(dtype="f32") as model:
        user, text, audio = conversation(model, options.frames, seed=7)
        dep_q, context = model.config["dep_q"], model.config["context"]
        truth = logits(play_with(model, user, dep_q, forced=(text, audio)))
        sizes = {"f32": model.memory.weights}
    table = {}
    for name, settings in FORMATS.items():
        with opened(**settings) as model:
            sizes[name] = model.memory.weights
            ours = logits(play_with(model, user, dep_q, forced=(text, audio)))
        (text_kl, text_same), (audio_kl, audio_same) = map(divergence, ours, truth)
        table[name] = {
            "weights_bytes": sizes[name],
            "text_kl": round(float(text_kl[0]), 6),
            "text_top1": round(float(text_same[0]), 4),
            "audio_kl": [round(float(value), 6) for value in audio_kl],
            "audio_top1": [round(float(value), 4) for value in audio_same],
        }
    answers = {}
    if options.model is None:
        for name, settings in {"f32": {"dtype": "f32"}, **FORMATS}.items():
            answers[name] = right_answers(options.answers, **settings)
    common.report(
        "quality",
        options.out,
        {
            "model": options.model or "moshi-tiny",
            "frames": options.frames,
            "context": context,
            "distinct_text_tokens": len(set(text.tolist())),
            "f32_weights_bytes": sizes["f32"],
            "formats": table,
            "answers": {"asked": options.answers, "right": answers} if answers else None,
        },
    )


if __name__ == "__main__":
    main()
