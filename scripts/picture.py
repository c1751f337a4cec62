"""picture.py: makes what lies beside examples/first_conversation.ipynb, for a changed model too.

question.ogg is its first question, by espeak-ng; first_conversation.png shows the answer.
"""

import sys
from pathlib import Path

import numpy as np

import moshi_c
from moshi_c.audio import read_audio, write_audio

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from hello import spoken  # noqa: E402

TEXT = "what colour is the sky?"
BEFORE_S, AFTER_S = 0.5, 2.5


def main() -> None:
    with moshi_c.load() as model, moshi_c.Session(model, seed=7) as session:
        voice = spoken(TEXT, "en-us+m3", model.sample_rate)
        write_audio(EXAMPLES / "question.ogg", voice, model.sample_rate)
        voice = read_audio(EXAMPLES / "question.ogg", model.sample_rate)
        silence = [np.zeros(int(s * model.sample_rate), np.float32) for s in (BEFORE_S, AFTER_S)]
        recording = session.run(np.concatenate([silence[0], voice, silence[1]]))
    print(recording)
    recording.plot().savefig(EXAMPLES / "first_conversation.png")


if __name__ == "__main__":
    main()
