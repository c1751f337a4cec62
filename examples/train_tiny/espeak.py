"""espeak-ng through ctypes: a waveform with the times of its words and phonemes.

The library is driven in its synchronous mode: one call renders one sentence and hands over blocks
of samples together with events. About 3 ms a sentence, so that data can be made while training.

The phoneme inventory is a list and not a set found on the way: the number of a phoneme must be the
same in every run, or the head that names phonemes starts again from chance at each restart.

    python espeak.py "what is two plus three"      # what was said and when
    python espeak.py --survey                      # phonemes of the corpus that the list lacks
"""

from __future__ import annotations

import argparse
import ctypes
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly

SAMPLE_RATE = 24000
LABEL_SAMPLES = 480  # one phoneme label each 20 ms: four to a frame of the codec

# Number 0 is silence. Names are espeak-ng's own mnemonics, over the accents of corpus.py.
# fmt: off
PHONEMES: tuple[str, ...] = (
    "", "0", "3", "3:", ";", "@", "@2", "@5", "@L", "A:", "A@", "D", "E", "I", "I#", "I2", "IR",
    "N", "O2", "O:", "O@", "OI", "S", "T", "U", "U@", "V", "VR", "Z", "a", "a#", "aI", "aI2",
    "aI3", "aI@", "aU", "aa", "b", "d", "dZ", "e@", "eI", "f", "g", "h", "i", "i:", "i@", "i@3",
    "j", "k", "l", "m", "n", "o@", "oU", "p", "r", "r-", "s", "t", "t#", "t2", "tS", "t[", "u:",
    "v", "w", "w#", "z",
)
# fmt: on
NO_LABEL = -100  # a phoneme that the list lacks: left out of the loss
_NUMBER = {name: number for number, name in enumerate(PHONEMES)}

_EVENT_END, _EVENT_WORD, _EVENT_PHONEME = 0, 1, 7
_SYNCHRONOUS, _PHONEME_EVENTS = 2, 1
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_BY_CHARACTER, _UTF8 = 1, 1


@dataclass(frozen=True)
class Voice:
    """A speaker: espeak-ng's voice name and its settings (rate in words a minute)."""

    name: str
    rate: int = 160
    pitch: int = 50
    pitch_range: int = 50


@dataclass(frozen=True)
class Speech:
    """What was rendered. Times are in seconds from the first sample."""

    pcm: NDArray[np.float32]  # [samples] at 24 kHz
    # Onset and word, one for each word of the text. Empty where espeak-ng read two words as one
    # ("for a"); no answer of the corpus does that.
    words: list[tuple[float, str]]
    phonemes: list[tuple[float, str]]  # onset and mnemonic, pauses as ""

    def labels(self) -> NDArray[np.int16]:
        """The number of the phoneme in each 20 ms, [samples / 480 rounded up]."""
        labels = np.zeros(-(-len(self.pcm) // LABEL_SAMPLES), np.int16)
        per_second = SAMPLE_RATE / LABEL_SAMPLES
        ends = [onset for onset, _ in self.phonemes[1:]] + [len(self.pcm) / SAMPLE_RATE]
        for (onset, name), end in zip(self.phonemes, ends, strict=True):
            labels[int(onset * per_second) : int(end * per_second)] = _NUMBER.get(name, NO_LABEL)
        return labels


class _Name(ctypes.Union):
    _fields_ = (
        ("number", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("string", ctypes.c_char * 8),
    )


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Name),
    )


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class Espeak:
    """The library, which holds one state for the whole process: make one, use it in one thread."""

    def __init__(self, library: str = "libespeak-ng.so.1") -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise OSError(f"{library} is missing: install espeak-ng") from error
        self._rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, None, _PHONEME_EVENTS)
        if self._rate != 22050:
            raise OSError(f"espeak-ng offers {self._rate} Hz where 22050 was expected")
        self._callback = _Callback(self._receive)  # kept here: the library holds only its address
        self._library.espeak_SetSynthCallback(self._callback)
        self._blocks: list[NDArray[np.int16]] = []
        self._onsets: list[float] = []
        self._phonemes: list[tuple[float, str]] = []

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self._blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while (event := events[index]).type != _EVENT_END:
            onset = event.sample / self._rate
            if event.type == _EVENT_WORD and event.length > 0:
                self._onsets.append(onset)
            elif event.type == _EVENT_PHONEME:
                name = bytes(event.id.string).decode("utf-8", "ignore")
                self._phonemes.append((onset, "" if name.startswith("_") else name))
            index += 1
        return 0

    def speak(self, text: str, voice: Voice) -> Speech:
        """Renders one sentence.

        espeak-ng carries phase and noise over from call to call: a program that says the same
        sentences in the same order gets the same samples, but a sentence said twice differs in
        phase, and by a few samples in its times.
        """
        for held in (self._blocks, self._onsets, self._phonemes):
            held.clear()
        if self._library.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice.name!r}")
        settings = {_RATE: voice.rate, _VOLUME: 90, _PITCH: voice.pitch, _RANGE: voice.pitch_range}
        for parameter, value in settings.items():
            self._library.espeak_SetParameter(parameter, value, 0)
        encoded = text.encode() + b"\0"
        self._library.espeak_Synth(
            encoded, ctypes.c_size_t(len(encoded)), 0, _BY_CHARACTER, 0, _UTF8, None, None
        )
        self._library.espeak_Synchronize()
        if not self._blocks:
            raise ValueError(f"espeak-ng said nothing for {text!r}")
        # Events carry a position in the text too, but it is sometimes off: their order is not.
        words = text.split()
        paired = len(words) == len(self._onsets)
        pcm = np.concatenate(self._blocks).astype(np.float32) / 32768
        return Speech(
            pcm=resample_poly(pcm, 160, 147).astype(np.float32),  # 22050 to 24000
            words=list(zip(self._onsets, words, strict=True)) if paired else [],
            phonemes=list(self._phonemes),
        )


def survey() -> Counter[str]:
    """Phonemes of the whole corpus in every accent, by how often they come."""
    from corpus import ACCENTS, MODEL_VOICE, Talk, all_exchanges  # only this needs the corpus

    espeak, found = Espeak(), Counter[str]()
    texts = [text for exchange in all_exchanges() for text in (exchange.question, exchange.spoken)]
    texts += Talk().every_word()
    for voice in [MODEL_VOICE] + [Voice(f"{accent}+m1") for accent in ACCENTS]:
        for text in dict.fromkeys(texts):
            found.update(name for _, name in espeak.speak(text, voice).phonemes)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="?", default="what is two plus three")
    parser.add_argument("--voice", default="en-us+f2")
    parser.add_argument("--survey", action="store_true", help="look for phonemes not in the list")
    arguments = parser.parse_args()
    if arguments.survey:
        found = survey()
        print("missing:", {name: n for name, n in found.items() if name not in _NUMBER} or "none")
        print("unused:", [name for name in PHONEMES if name not in found] or "none")
        return
    speech = Espeak().speak(arguments.text, Voice(arguments.voice))
    print(f"{len(speech.pcm) / SAMPLE_RATE:.2f} s")
    for onset, word in speech.words:
        print(f"{onset:6.2f} {word}")
    print(" ".join(name or "_" for _, name in speech.phonemes))


if __name__ == "__main__":
    main()
