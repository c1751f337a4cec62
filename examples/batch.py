"""Answers a whole folder of recordings, several at once, with the words in time as JSON.

    python examples/batch.py
    python examples/batch.py FOLDER --out answers --at-once 8 --model kyutai/moshiko-pytorch-bf16

For each sound NAME.* the folder `answers` gets NAME.wav, the model's voice, and NAME.json, its
words with their times. Without a FOLDER espeak-ng asks some questions. The same seed gives the same
answers however many are asked at once.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from hello import spoken

import moshi_c
from moshi_c.audio import write_audio

QUESTIONS = (
    "what colour is the sky",
    "say the numbers seven twelve",
    "my dog is black",
    "what is the opposite of hot",
    "count to five",
)
SOUNDS = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="of sounds (default: made here)")
    parser.add_argument("--out", type=Path, default=Path("answers"), help="folder for the files")
    parser.add_argument("--at-once", type=int, default=4, help="sessions (default: %(default)s)")
    parser.add_argument("--after", type=float, default=4.0, help="seconds to answer in")
    parser.add_argument("--model", help="folder or hub id (default: the model in the package)")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    try:
        answer_all(arguments)
    except (moshi_c.MoshiError, OSError) as error:
        raise SystemExit(f"batch.py: {error}") from None


def answer_all(arguments: argparse.Namespace) -> None:
    arguments.out.mkdir(parents=True, exist_ok=True)
    folder = arguments.folder or questions_in(arguments.out / "questions")
    sounds = sorted(path for path in folder.iterdir() if path.suffix.lower() in SOUNDS)
    with moshi_c.load(arguments.model, max_sessions=arguments.at_once) as model:

        def answer(path: Path) -> moshi_c.Recording:
            # Sessions in threads of their own: the engine steps those that wait in one batch.
            with moshi_c.Session(model, seed=arguments.seed) as session:
                recording = session.run(path, after=arguments.after)
            recording.save(arguments.out / f"{path.stem}.wav", words=True)
            return recording

        began, seconds = time.perf_counter(), 0.0
        with ThreadPoolExecutor(arguments.at_once) as pool:
            for path, recording in zip(sounds, pool.map(answer, sounds), strict=True):
                words = " ".join(f"{word.text}@{word.start:.2f}" for word in recording.words)
                print(f"{path.name}: {words or '(nothing)'}")
                seconds += recording.duration
        took = time.perf_counter() - began
    print(f"{arguments.out}: {len(sounds)} answers, {seconds:.1f} s of sound in {took:.1f} s")


def questions_in(folder: Path) -> Path:
    """A folder of questions that espeak-ng asks."""
    folder.mkdir(exist_ok=True)
    for text in QUESTIONS:
        voice = np.pad(spoken(text, "en-us+m3", 24000), (12000, 0))  # nobody speaks at once
        write_audio(folder / f"{text.replace(' ', '-')}.wav", voice, 24000)
    return folder


if __name__ == "__main__":
    main()
