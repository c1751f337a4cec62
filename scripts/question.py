"""question.py OUT.wav [TEXT]: a question by espeak-ng, with silence after it for the answer."""

import io
import subprocess
import sys

import numpy as np
import soundfile

BEFORE_S, AFTER_S = 0.5, 5.0


def main() -> None:
    path = sys.argv[1]
    text = sys.argv[2] if len(sys.argv) > 2 else "what colour is the sky?"
    command = ["espeak-ng", "-v", "en-us+m3", "-s", "150", "--stdout", text]
    spoken = subprocess.run(command, check=True, capture_output=True).stdout
    pcm, rate = soundfile.read(io.BytesIO(spoken), dtype="float32")
    silence = [np.zeros(int(seconds * rate), np.float32) for seconds in (BEFORE_S, AFTER_S)]
    soundfile.write(path, np.concatenate([silence[0], 0.5 * pcm, silence[1]]), rate)
    print(f"{path}: {text!r}, {len(pcm) / rate:.1f} s of speech at {rate} Hz")


if __name__ == "__main__":
    main()
