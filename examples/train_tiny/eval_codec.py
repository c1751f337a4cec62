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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from corpus import MODEL_VOICE, Talk, split, user_voice
from espeak import SAMPLE_RATE, Espeak, Voice
from export_codec import load_published
from mimi_tiny import FRAME_SAMPLES
from moshi.models.compression import MimiModel
from numpy.typing import NDArray
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


@torch.no_grad()
def through(mimi: MimiModel, pcm: NDArray[np.float32]) -> NDArray[np.float32]:
    """Encoded and decoded frame by frame; the length is a multiple of the frame's."""
    frames = torch.from_numpy(pcm).view(-1, 1, 1, FRAME_SAMPLES)
    with mimi.streaming(1):
        decoded = [mimi.decode(mimi.encode(frame)) for frame in frames]
    result: NDArray[np.float32] = torch.cat(decoded, -1)[0, 0].numpy()
    return result


def wide_band_pesq(clean: NDArray[np.float32], coded: NDArray[np.float32]) -> float | None:
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


def evaluate(folder: Path, count: int, seed: int, audio: Path | None) -> dict[str, Any]:
    mimi, espeak = load_published(folder), Espeak()
    result: dict[str, Any] = {
        "seed": seed,
        "bits_per_second": round(mimi.num_codebooks * np.log2(mimi.cardinality) * mimi.frame_rate),
        "versions": {name: version(name) for name in ("torch", "moshi", "pystoi", "pesq")},
        "groups": {},
        "rows": [],
    }
    for group in GROUPS:
        rows = []
        for number, (text, voice) in enumerate(sentences(group, count, seed)):
            speech = espeak.speak(text, voice).pcm
            tail = TAIL + -len(speech) % FRAME_SAMPLES
            clean = np.pad(speech, (LEAD, tail))
            coded = through(mimi, clean)
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
    torch.set_num_threads(1)
    result = evaluate(arguments.folder, arguments.sentences, arguments.seed, arguments.audio)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
