"""A phone call: 8 kHz mu-law in packets of 20 ms, in and out, as a telephone network carries them.

    python examples/phone.py
    python examples/phone.py caller.ulaw --out answer.ulaw --model kyutai/moshiko-pytorch-bf16

The files hold bare G.711 bytes: `sox -t ul -r 8000 -c 1 answer.ulaw answer.wav` makes them a WAV.
Without a caller espeak-ng calls. The session takes and gives 8 kHz; 20 ms are a quarter of a frame,
so most packets go in without a frame coming out, and each fourth brings 80 ms.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import soundfile
from hello import spoken

import moshi_c
from moshi_c.audio import Pcm

RATE, PACKET = 8000, 160  # bytes are samples


def decode(data: bytes) -> Pcm:
    """Samples of mu-law bytes."""
    pcm, _ = soundfile.read(
        io.BytesIO(data), dtype="float32", samplerate=RATE, channels=1, format="RAW", subtype="ULAW"
    )
    return pcm


def encode(pcm: Pcm) -> bytes:
    """Mu-law bytes of samples."""
    file = io.BytesIO()
    soundfile.write(file, pcm, RATE, format="RAW", subtype="ULAW")
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("caller", nargs="?", type=Path, help="mu-law bytes (default: made here)")
    parser.add_argument("--say", default="can you hear me", help="what the made caller says")
    parser.add_argument("--out", type=Path, default=Path("answer.ulaw"), help="%(default)s")
    parser.add_argument("--model", help="folder or hub id (default: the model in the package)")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.caller is None:
        arguments.caller = Path("caller.ulaw")
        voice = spoken(arguments.say, "en-us+m3", RATE)
        arguments.caller.write_bytes(encode(np.pad(voice, (RATE // 2, 4 * RATE))))
    line = arguments.caller.read_bytes()

    with (
        moshi_c.load(arguments.model) as model,
        moshi_c.Session(
            model, seed=arguments.seed, sample_rate=RATE, output_sample_rate=RATE
        ) as session,
        arguments.out.open("wb") as out,
    ):
        for start in range(0, len(line), PACKET):
            for frame in session.push(decode(line[start : start + PACKET])):
                out.write(encode(frame.pcm))
                if frame.text.strip():
                    print(f"{frame.time:6.2f} s {frame.text}")
        sent = out.tell()
    print(f"{arguments.caller}: {len(line) / RATE:.2f} s; {arguments.out}: {sent / RATE:.2f} s")


if __name__ == "__main__":
    main()
