"""Forks a call three ways: one past, three things that the caller might say next.

    python examples/fork.py
    python examples/fork.py "say hello to frank" --first "good morning" --out futures

A fork takes less than a millisecond and shares the memory of what was said so far. The three
futures are stepped together, one batch a frame, and each is what it would have been without the
others.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from hello import spoken

import moshi_c
from moshi_c.audio import write_audio

NEXT = ["what is the opposite of early", "my book is blue", "say the numbers four nine"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("next", nargs="*", default=NEXT, help="what may be said next")
    parser.add_argument("--first", default="how are you", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("futures"), help="folder for the files")
    parser.add_argument("--model", help="folder or hub id (default: the model in the package)")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    with moshi_c.load(arguments.model, max_sessions=len(arguments.next) + 1) as model:
        size = model.frame_size

        def said(text: str, frames: int) -> np.ndarray:
            """The text as frames, with silence around it."""
            voice = np.pad(spoken(text, "en-us+m3", model.sample_rate), (6 * size, frames * size))
            return voice[: frames * size].reshape(-1, size)

        call = moshi_c.Session(model, seed=arguments.seed)
        past = [call.step(pcm) for pcm in said(arguments.first, 50)]
        print(f"past: {arguments.first}\n   -> {''.join(frame.text for frame in past).strip()}")

        began = time.perf_counter()
        forks = [call.fork() for _ in arguments.next]
        took = time.perf_counter() - began
        print(f"{len(forks)} forks in {1000 * took:.2f} ms")

        sides = [said(text, 75) for text in arguments.next]
        futures = [moshi_c.step_many(forks, pcms) for pcms in zip(*sides, strict=True)]
        for i, text in enumerate(arguments.next):
            frames = [step[i] for step in futures]
            print(f"next: {text}\n   -> {''.join(frame.text for frame in frames).strip()}")
            path = arguments.out / f"{i + 1}.wav"
            write_audio(path, np.concatenate([f.pcm for f in past + frames]), model.sample_rate)
    print(f"{arguments.out}: the model's side of each")


if __name__ == "__main__":
    main()
