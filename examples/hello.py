"""Asks a question aloud and listens to the answer.

    python examples/hello.py
    python examples/hello.py "what is two plus three" --voice en-gb-scotland+f3 --out answers
    python examples/hello.py question.wav --model FOLDER

espeak-ng speaks the question, unless it is a file of sound. The answer is printed, both sides are
drawn in time, and the folder gets question.wav, answer.wav and, where matplotlib is installed,
conversation.png.
"""

import argparse
import importlib.util
import io
import shutil
import subprocess
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

import moshi_c
from moshi_c.audio import read_audio, write_audio

BEFORE_S, AFTER_S = 0.5, 4.5  # of silence around the question


def spoken(text: str, voice: str, rate: int) -> NDArray[np.float32]:
    """The text as espeak-ng says it, at `rate` samples a second, half as loud as it can be."""
    command = ["espeak-ng", "-v", voice, "-s", "150", "--stdout", text]
    try:
        wav = subprocess.run(command, check=True, capture_output=True).stdout
    except FileNotFoundError:
        raise SystemExit(
            "espeak-ng is not installed; install it, or give a file of sound as the question"
        ) from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"espeak-ng can't say it: {error.stderr.decode().strip()}") from None
    pcm, from_rate = soundfile.read(io.BytesIO(wav), dtype="float32")
    return 0.5 * moshi_c.audio.resample(pcm, from_rate, rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "question", nargs="?", default="what colour is the sky?", help="words, or a file of sound"
    )
    parser.add_argument("--voice", default="en-us+m3", help="of espeak-ng (default: %(default)s)")
    parser.add_argument("--model", help="folder or hub id (default: the model in the package)")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("hello"), help="folder for the files")
    arguments = parser.parse_args()
    try:
        ask(arguments)
    except (moshi_c.MoshiError, OSError) as error:
        raise SystemExit(f"hello.py: {error}") from None


def ask(arguments: argparse.Namespace) -> None:
    """Asks, shows what came back, and keeps it."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    with moshi_c.load(arguments.model) as model:
        rate = model.sample_rate
        # A name that ends like a file's is one, be it there or not.
        if Path(arguments.question).suffix[1:].isalnum() or Path(arguments.question).is_file():
            question = read_audio(arguments.question, rate)
        else:
            question = spoken(arguments.question, arguments.voice, rate)
        silence = [np.zeros(round(seconds * rate), np.float32) for seconds in (BEFORE_S, AFTER_S)]
        user = np.concatenate([silence[0], question, silence[1]])
        with moshi_c.Session(model, seed=arguments.seed) as session:
            recording = session.run(user)
            stats = session.stats

    write_audio(arguments.out / "question.wav", user, rate)
    recording.save(arguments.out / "answer.wav")
    print(f"you    {arguments.question}")
    print(f"model  {recording.text.strip()}\n")
    print(recording.timeline(shutil.get_terminal_size().columns))
    print(f"\na frame of 80 ms took {stats.p50_ms:.2f} ms (median)")
    files = "question.wav, answer.wav"
    if importlib.util.find_spec("matplotlib"):
        recording.plot().savefig(arguments.out / "conversation.png")
        files += ", conversation.png"
    print(f"{arguments.out}: {files}")


if __name__ == "__main__":
    main()
