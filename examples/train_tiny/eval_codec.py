"""Measures a codec in the published layout on sentences it was not trained on.

    python eval_codec.py FOLDER --json FOLDER/eval.json

Half of the sentences are held-out exchanges, half are talk with unheard words. They are said by the
model's voice, by user voices of the training and by user voices that were never heard, and go
through the codec in streaming mode, 80 ms at a time, as in a call. STOI (0 to 1) compares the
24 kHz signals; PESQ is the wide-band score at 16 kHz.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from corpus import MODEL_VOICE, Talk, split, user_voice
from espeak import SAMPLE_RATE, Espeak, Voice
from mimi_tiny import FRAME_SAMPLES, Pcm, StreamingCodec
from pesq import PesqError, pesq
from pystoi import stoi
from scipy.signal import resample_poly

GROUPS = ("model voice", "seen voices", "unseen voices")
LEAD, TAIL = 2 * FRAME_SAMPLES, 3 * FRAME_SAMPLES  # silence around each sentence


def sentences(group: str, count: int, seed: int) -> list[tuple[str, Voice]]:
    """The same ones for the same seed, whatever the codec."""
    generator, talk = random.Random(f"{seed}/{group}"), Talk()
    held_out = generator.sample(split().held_out, count - count // 2)
    if group == "model voice":
        texts = [exchange.spoken for exchange in held_out]
    else:
        texts = [exchange.question for exchange in held_out]
    texts += [talk.sentence(generator, unheard=True) for _ in range(count // 2)]
    if group == "model voice":
        return [(text, MODEL_VOICE) for text in texts]
    unseen = group == "unseen voices"
    return [(text, user_voice(generator, unseen=unseen)) for text in texts]


def wide_band_pesq(clean: Pcm, coded: Pcm) -> float | None:
    """None where PESQ finds no utterance."""
    try:
        return float(pesq(16000, resample_poly(clean, 2, 3), resample_poly(coded, 2, 3), "wb"))
    except PesqError:
        return None


def summary(rows: list[dict[str, Any]]) -> dict[str, float | int]:
    scores = np.array([row["stoi"] for row in rows])
    quality = [row["pesq"] for row in rows if row["pesq"] is not None]
    return {
        "sentences": len(rows),
        "stoi": round(float(scores.mean()), 4),
        "stoi_standard_error": round(float(scores.std(ddof=1) / len(scores) ** 0.5), 4),
        "stoi_lowest": round(float(scores.min()), 4),
        "pesq": round(float(np.mean(quality)), 3),
    }


def evaluate(
    coder: Callable[[Pcm], Pcm], count: int, seed: int, audio: Path | None = None
) -> dict[str, Any]:
    """What `coder` makes of every sentence; it gets and gives a whole number of frames."""
    espeak = Espeak()
    result: dict[str, Any] = {"seed": seed, "groups": {}, "rows": []}
    for group in GROUPS:
        rows = []
        for number, (text, voice) in enumerate(sentences(group, count, seed)):
            speech = espeak.speak(text, voice).pcm
            tail = TAIL + -len(speech) % FRAME_SAMPLES
            clean = np.pad(speech, (LEAD, tail))
            coded = coder(clean)
            spoken = slice(LEAD, LEAD + len(speech))
            score = float(stoi(clean[spoken], coded[spoken], SAMPLE_RATE))
            row = {"group": group, "text": text, "voice": voice.name, "stoi": round(score, 4)}
            rows.append(row | {"pesq": wide_band_pesq(clean, coded)})
            if audio is not None and number % 10 == 0:
                audio.mkdir(parents=True, exist_ok=True)
                name = f"{group.split()[0]}{number:02}"
                soundfile.write(audio / f"{name}_clean.wav", clean, SAMPLE_RATE)
                soundfile.write(audio / f"{name}_coded.wav", coded, SAMPLE_RATE)
        result["groups"][group] = summary(rows)
        result["rows"] += rows
        print(f"{group:14}", result["groups"][group], flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="with mimi-tiny.safetensors and its config")
    parser.add_argument("--sentences", type=int, default=40, help="in each group")
    parser.add_argument("--seed", type=int, default=99)
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--audio", type=Path, help="folder for every tenth sentence, as WAV")
    arguments = parser.parse_args()
    codec = StreamingCodec(arguments.folder)
    result = evaluate(codec.through, arguments.sentences, arguments.seed, arguments.audio)
    result["bits_per_second"] = codec.bits_per_second
    result["versions"] = {name: version(name) for name in ("moshi_c", "pystoi", "pesq")}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
