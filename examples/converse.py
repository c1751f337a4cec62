"""Holds a conversation over a recording: each frame of 80 ms goes in, one comes out.

    python examples/converse.py question.wav answer.wav --model FOLDER --seed 7

The same loop as examples/session.c, and the same samples: with --raw both read and write raw
little-endian float32 at 24 kHz, so that the files can be compared byte for byte.
"""

import argparse
from pathlib import Path

import numpy as np

import moshi_c
from moshi_c.audio import read_audio, write_audio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input", type=Path, help="what the user says")
    parser.add_argument("output", type=Path, help="what the model says")
    parser.add_argument("--model", help="folder or hub id (default: the model in the package)")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--raw", action="store_true", help="files of raw float32 samples")
    arguments = parser.parse_args()

    with moshi_c.load(arguments.model) as model:
        if arguments.raw:
            user = np.fromfile(arguments.input, "<f4").astype(np.float32)
        else:
            user = read_audio(arguments.input, model.sample_rate)
        size = model.frame_size
        silence = -len(user) % size + model.max_delay * size  # the answer comes max_delay late
        user = np.concatenate([user, np.zeros(silence, np.float32)])

        answer = []
        with moshi_c.Session(model, seed=arguments.seed) as session:
            for frame_of_user in user.reshape(-1, size):
                frame = session.step(frame_of_user)
                print(frame.text, end="", flush=True)
                answer.append(frame.pcm if frame.pcm is not None else np.zeros(0, np.float32))
            print(f"\nreal-time factor {session.stats.real_time_factor:.3f}")

        pcm = np.concatenate(answer) if answer else np.zeros(0, np.float32)
        if arguments.raw:
            pcm.astype("<f4").tofile(arguments.output)
        else:
            write_audio(arguments.output, pcm, model.sample_rate)


if __name__ == "__main__":
    main()
