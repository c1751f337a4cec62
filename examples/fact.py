"""Puts a fact into a call: the model is asked for the time, and says the one that the clock tells.

    python examples/fact.py
    python examples/fact.py "who are you" --fact "i am the voice of the station" --out call.wav

The program listens along, frame by frame. When the caller has fallen silent it gives the model the
words to say: they become its inner monologue, its own voice speaks them, and it goes on listening.
The first line is what it would have said by itself.
"""

import argparse
import datetime

import numpy as np
from hello import spoken

import moshi_c
from moshi_c.audio import Pcm, write_audio

HOURS = ["twelve", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
HOURS += ["ten", "eleven"]
FIVES = ["five", "ten", "a quarter", "twenty", "twenty five", "half"]
QUIET_DB, QUIET_FRAMES = -45.0, 3  # a quarter of a second below this level ends a question


def time_in_words(now: datetime.time) -> str:
    """To five minutes: it is about ten past four."""
    fives = round(now.minute / 5)
    hour = HOURS[(now.hour + (fives > 6)) % 12]
    if fives % 12 == 0:
        return f"it is about {hour}"
    return (
        f"it is about {FIVES[min(fives, 12 - fives) - 1]} {'past' if fives <= 6 else 'to'} {hour}"
    )


def call(session: moshi_c.Session, caller: Pcm, fact: str | None = None) -> list[moshi_c.Frame]:
    """The model's side of a call; the fact comes when the caller has spoken and falls silent."""
    frames: list[moshi_c.Frame] = []
    heard, quiet = False, 0
    for pcm in caller.reshape(-1, session.frame_size):
        frames.append(session.step(pcm))
        heard = heard or frames[-1].level > QUIET_DB
        quiet = quiet + 1 if frames[-1].level <= QUIET_DB else 0
        if fact and heard and quiet == QUIET_FRAMES:
            print(f"{frames[-1].time:.2f} s: the caller is silent, so the fact goes in")
            session.say(fact)
            fact = None
    return frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question", nargs="?", default="what time is it")
    parser.add_argument("--fact", help="words to say (default: the time)")
    parser.add_argument("--out", default="fact.wav", help="the call (default: %(default)s)")
    parser.add_argument("--model", help="folder or hub id (default: the model in the package)")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    fact = arguments.fact or time_in_words(datetime.datetime.now().time())

    with moshi_c.load(arguments.model) as model:
        question = spoken(arguments.question, "en-us+m3", model.sample_rate)
        caller = np.concatenate(
            [np.zeros(12000, np.float32), question, np.zeros(120000, np.float32)]
        )
        caller = np.pad(caller, (0, -len(caller) % model.frame_size))
        with moshi_c.Session(model, seed=arguments.seed) as session:
            alone = call(session, caller)
            print(f"by itself: {''.join(frame.text for frame in alone).strip()}")
            session.reset()
            told = call(session, caller, fact)
    print(f"told:      {''.join(frame.text for frame in told).strip()}")
    both = np.clip(caller + np.concatenate([frame.pcm for frame in told]), -1.0, 1.0)
    print(f"{write_audio(arguments.out, both, 24000)}: both sides of the call")


if __name__ == "__main__":
    main()
