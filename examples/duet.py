"""Two sessions of a model talk to each other; a stereo file keeps it.

    python examples/duet.py
    python examples/duet.py "how are you" "my fish is yellow" --seconds 60 --out talk.wav

espeak-ng says the first sentence in the left one's place, and a further one each time both have
fallen silent; from there on each of the two hears nothing but the other. `moshi-c duet` does the
same from files. The small model echoes what it hears, so that its talk goes round like a whispered
word, until one of them mishears.
"""

import argparse
import itertools

from hello import spoken

import moshi_c
from moshi_c.audio import AudioWriter
from moshi_c.duet import duet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sentences", nargs="*", default=["what is your name", "my dog is black"])
    parser.add_argument("--out", default="duet.wav", help="stereo file (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="default: %(default)s")
    parser.add_argument("--model", help="folder or hub id (default: the model in the package)")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    try:
        talk(arguments)
    except (moshi_c.MoshiError, OSError) as error:
        raise SystemExit(f"duet.py: {error}") from None


def talk(arguments: argparse.Namespace) -> None:
    with (
        moshi_c.load(arguments.model, max_sessions=2) as model,
        moshi_c.Session(model, seed=arguments.seed) as left,
        moshi_c.Session(model, seed=arguments.seed + 1) as right,
        AudioWriter(arguments.out, model.sample_rate, channels=2) as writer,
    ):
        sentences = [spoken(text, "en-us+m3", model.sample_rate) for text in arguments.sentences]
        frames = round(arguments.seconds * model.frame_rate)
        speaker = None
        for a, b, sound in itertools.islice(duet(left, right, sentences), frames):
            writer.write(sound)
            for name, frame in (("left", a), ("right", b)):
                if frame.text and name != speaker:
                    print(f"\n{frame.time:6.2f} s  {name:<5} ", end="")
                    speaker = name
                print(frame.text, end="", flush=True)
    print(f"\n{arguments.out}: left and right on a channel each")


if __name__ == "__main__":
    main()
