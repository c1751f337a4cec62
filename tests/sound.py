"""Sound for the tests: speech, music, noise and silence at 24 kHz, the same on every run.

Speech is spoken by espeak-ng, the rest is synthesised from seeds, so no recording is stored.
Everything is mono float32 within -1..1.
"""

from __future__ import annotations

import functools
import io
import shutil
import subprocess
import wave

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter, resample_poly

Sound = NDArray[np.float32]

RATE = 24000
FRAME = 1920

TALK = (
    "Good morning. I would like to book a table for two people, please, at half past seven.",
    "The quick brown fox jumps over the lazy dog, while seventeen zebras watch from the hill.",
    "Could you tell me how far it is to the station? My train leaves in twenty minutes!",
    "Thank you very much. No, really, that was the best advice anybody gave me all year.",
)
OTHER_TALK = (
    "A ship in harbour is safe, but that is not what ships are built for.",
    "Measure the flour, whisk six eggs, and fold them gently into the melted chocolate.",
    "Why does the moon look larger near the horizon than high up in the sky?",
    "He paid four hundred and fifty six pounds for a bicycle with only one wheel.",
    "Just sit down, relax, and listen to the rain on the roof for a while.",
    "Visibility was poor; the pilot asked for permission to land on the northern runway.",
)


@functools.cache
def _spoken(text: str, voice: str, words_per_minute: int, pitch: int) -> Sound:
    program = shutil.which("espeak-ng")
    if program is None:
        raise RuntimeError("espeak-ng is not installed; the tests need it to make speech")
    options = ["-v", voice, "-s", str(words_per_minute), "-p", str(pitch), "--stdout"]
    spoken = subprocess.run([program, *options, text], check=True, capture_output=True).stdout
    # The header of a piped file does not know the length, so take all that follows it.
    with wave.open(io.BytesIO(spoken)) as file:
        rate, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
    if (rate, width, channels) != (22050, 2, 1):
        raise RuntimeError(f"espeak-ng spoke in an unexpected format: {rate}, {width}, {channels}")
    data = spoken[spoken.index(b"data") + 8 :]
    samples = np.frombuffer(data[: len(data) // 2 * 2], "<i2").astype(np.float64) / 32768
    sound: Sound = resample_poly(samples, 160, 147).astype(np.float32)
    sound.flags.writeable = False
    return sound


def speech(text: str, voice: str = "en-us", words_per_minute: int = 160, pitch: int = 50) -> Sound:
    """What espeak-ng makes of the text."""
    return _spoken(text, voice, words_per_minute, pitch).copy()


def music(seconds: float, seed: int) -> Sound:
    """Decaying harmonic notes in random chords over a beat of noise bursts."""
    rng = np.random.default_rng(seed)
    total = round(seconds * RATE)
    out = np.zeros(total + 2 * RATE)
    beat = RATE * 60 // int(rng.integers(80, 150)) // 2
    root = float(rng.uniform(90, 200))
    scale = np.array([0, 2, 4, 5, 7, 9, 11, 12, 14, 16, 19])
    for start in range(0, total, beat):
        length = int(beat * rng.uniform(1.0, 3.0))
        time = np.arange(length) / RATE
        envelope = np.minimum(time / 0.01, 1) * np.exp(-time * rng.uniform(2, 7))
        for step in rng.choice(scale, int(rng.integers(1, 4)), replace=False):
            pitch = root * 2 ** (step / 12) * rng.uniform(0.998, 1.002)
            for harmonic in range(1, 9):
                if pitch * harmonic < RATE / 2:
                    level = rng.uniform(0.3, 1.0) / harmonic**1.2
                    phase = 2 * np.pi * (pitch * harmonic * time + rng.uniform())
                    out[start : start + length] += level * envelope * np.sin(phase)
        if rng.uniform() < 0.6:
            burst = rng.standard_normal(beat // 3) * np.exp(-np.arange(beat // 3) / (0.02 * RATE))
            out[start : start + len(burst)] += rng.uniform(0.2, 0.8) * burst
    out = out[:total]
    return (0.6 * out / np.abs(out).max()).astype(np.float32)


def noise(seconds: float, seed: int) -> Sound:
    """White and reddish noise whose level and colour change every 80 ms."""
    rng = np.random.default_rng(seed)
    total = round(seconds * RATE)
    parts = []
    for _ in range(-(-total // FRAME)):
        white = rng.standard_normal(FRAME)
        pole = rng.uniform(0.0, 0.97)
        parts.append(lfilter([1 - pole], [1, -pole], white) * 10 ** rng.uniform(-2.5, -0.5))
    return np.clip(np.concatenate(parts)[:total], -1, 1).astype(np.float32)


def silence(seconds: float) -> Sound:
    """Digital silence."""
    return np.zeros(round(seconds * RATE), np.float32)


def question(
    text: str = "what is the opposite of hot",
    *,
    before: float = 0.0,
    after: float = 2.5,
    level: float = 1.0,
) -> Sound:
    """Something that the small model answers, at a part of its level, between seconds of silence;
    whole frames."""
    parts = [silence(before), np.float32(level) * speech(text), silence(after)]
    pcm = np.concatenate(parts)
    return np.pad(pcm, (0, -len(pcm) % FRAME))


def _exactly(parts: list[Sound], samples: int) -> Sound:
    joined = np.concatenate(parts)
    if len(joined) < samples:
        joined = np.tile(joined, -(-samples // len(joined)))
    return np.ascontiguousarray(joined[:samples])


@functools.cache
def _minute() -> Sound:
    def said(which: int, voice: str, pace: int, pitch: int) -> Sound:
        return speech(TALK[which], voice, pace, pitch)

    spoken = [
        np.concatenate([said(0, "en-us", 160, 50), said(2, "en-us+f2", 175, 60)]),
        np.concatenate([said(1, "en-gb-x-rp", 150, 40), said(3, "en-gb-scotland", 165, 55)]),
        np.concatenate([said(3, "en-us+f3", 185, 65), said(0, "en-us+m3", 140, 30)]),
    ]
    parts = [
        _exactly([spoken[0]], 10 * RATE),
        music(10, 1),
        silence(2),
        _exactly([spoken[1]], 10 * RATE),
        noise(8, 2),
        _exactly([spoken[2]], 10 * RATE),
        music(8, 3) * np.float32(0.5),
        silence(2),
    ]
    return _exactly(parts, 60 * RATE)


def minute() -> Sound:
    """Exactly 60 s (750 frames): three voices, music twice, noise, and silence twice."""
    return _minute().copy()


def other_sound(seconds: float) -> Sound:
    """Sound that shares no phrase, tune or noise with `minute`: what codebooks are made from."""
    parts: list[Sound] = []
    voices = ("en-us", "en-us+f2", "en-gb-x-rp", "en-029", "en-us+m4", "en-gb-scotland+f4")
    seed = 100
    while sum(map(len, parts)) < seconds * RATE:
        turn = seed - 100
        voice = voices[turn % len(voices)]
        text = OTHER_TALK[(turn + turn // len(voices)) % len(OTHER_TALK)]
        parts += [speech(text, voice, 135 + 13 * (turn % 5), 30 + 9 * (turn % 6))]
        parts += [music(3, seed) * np.float32(0.4 + 0.1 * (turn % 6)), noise(1.5, seed)]
        seed += 1
    return _exactly(parts, round(seconds * RATE))
