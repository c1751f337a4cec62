"""Conversations as the language model sees them: 17 rows of tokens, 12.5 columns a second.

    python timelines.py DATA --shards 200       # makes what is missing of shards 0 to 199

Row 0 is the model's text, rows 1 to 8 its own codes, rows 9 to 16 the codes of the user. A timeline
is 32 seconds of one user: questions and their answers, now and then an answer cut short by "stop",
talk that nobody needs to answer, pauses, noise. Some timelines are talk or quiet from end to end.

Both sides are as in a call. The user is speech and noise that go through the codec in one stream.
The model is never encoded in a call, it is what the language model says: lasting silence has one
fixed code, and an answer has the codes that its sound has after silence, beginning on a frame.
They are the same every time, so that there is something to learn. After its last sounding frame the
stream returns to the code of silence at once, and the decoder is as silent as after the codec's own
tail.

Text is written two frames ahead of the sound. Written at the sound, it would be read off the
model's own first consonant, which in a call nobody has chosen yet.

DATA also gets `tokenizer_tiny.model` and `answers.npz`, the codes of all trained answers. Shards
may be made while training reads them: a shard appears when it is complete.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from corpus import (
    MODEL_VOICE,
    STOP,
    WEIGHTS,
    Exchange,
    Talk,
    all_exchanges,
    split,
    user_voice,
)
from espeak import SAMPLE_RATE, Espeak, Speech, Voice
from mimi_tiny import CODEC_FOLDER, FRAME_SAMPLES, Codes, Pcm, StreamingCodec
from numpy.typing import NDArray

FRAMES = 400
SHARD = 96  # timelines in a file
TOGETHER = 24  # timelines that go through the codec side by side
TEXT_TOKENS = 400
PAD, WORD_COMES = 3, 0  # text tokens of a frame without text, and of the one before a word
TEXT_LEAD = 2
GAP = (6, 8)  # frames from the end of a question to the first of its answer
STOP_FRAMES = 2  # from the end of "stop" to the first silent frame
HEARD_WORDS = 4  # how many of the last words the listening heads name
LISTEN_FRAMES = 10  # for how long after the last word

TOKENIZER, ANSWERS = "tokenizer_tiny.model", "answers.npz"


# ---- text ------------------------------------------------------------------------------------


def train_tokenizer(path: Path) -> None:
    """Pieces of what the model says, most words whole; every letter, for text that is forced."""
    words = {word for exchange in all_exchanges() for word in exchange.answer.split()}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sorted(words | set("abcdefghijklmnopqrstuvwxyz'"))),
        model_writer=model,
        vocab_size=TEXT_TOKENS,
        model_type="bpe",
        unk_id=WORD_COMES,
        bos_id=1,
        eos_id=2,
        pad_id=PAD,
        character_coverage=1.0,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def question_words() -> list[str]:
    """What the listening heads can name, by number. 0 is no word, 1 any other."""
    words = {word for exchange in all_exchanges() for word in exchange.question.split()}
    return ["", "?", *sorted(words | {STOP})]


_WORD_NUMBER = {word: number for number, word in enumerate(question_words())}


# ---- answers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What the model says, frame by frame, and the pieces of each word with its frame."""

    codes: Codes  # [8, frames]
    words: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def frames(self) -> int:
        return int(self.codes.shape[1])


def trimmed(pcm: Pcm, floor: float) -> slice:
    """Where a sentence sounds: espeak-ng leaves some silence at both ends."""
    loud = np.flatnonzero(np.abs(pcm) > floor)
    return slice(int(loud[0]), int(loud[-1]) + SAMPLE_RATE // 100)


def answer_pcm(espeak: Espeak, exchange: Exchange) -> tuple[Pcm, Speech]:
    """The sound of an answer in whole frames, and when its words come."""
    speech = espeak.speak(exchange.spoken, MODEL_VOICE)
    sounding = speech.pcm[: trimmed(speech.pcm, 1e-3).stop]
    return np.pad(sounding, (0, -len(sounding) % FRAME_SAMPLES)), speech


def make_answers(
    exchanges: list[Exchange],
    espeak: Espeak,
    codec: StreamingCodec,
    tokenizer: sentencepiece.SentencePieceProcessor,
) -> dict[str, Answer]:
    """The codes of all answers, each after more silence than the codec remembers."""
    silence = 40
    answers: dict[str, Answer] = {}
    said = {exchange.answer: exchange for exchange in exchanges}
    for text, exchange in said.items():
        pcm, speech = answer_pcm(espeak, exchange)
        codes = codec.encode(np.pad(pcm, (silence * FRAME_SAMPLES, 0))[None])[0, :, silence:]
        words = tuple(
            (int(onset * SAMPLE_RATE) // FRAME_SAMPLES, tuple(tokenizer.encode(word)))
            for (onset, _), word in zip(speech.words, text.split(), strict=True)
        )
        answers[text] = Answer(codes, words)
    return answers


def save_answers(path: Path, answers: dict[str, Answer], silence: Codes) -> None:
    words = {text: answer.words for text, answer in answers.items()}
    codes = {f"codes{number}": answer.codes for number, answer in enumerate(answers.values())}
    _save(path, words=np.array(json.dumps(words)), silence=silence, **codes)


def load_answers(path: Path) -> tuple[dict[str, Answer], Codes]:
    with np.load(path) as file:
        answers = {
            text: Answer(file[f"codes{number}"], tuple((frame, tuple(ids)) for frame, ids in words))
            for number, (text, words) in enumerate(json.loads(str(file["words"])).items())
        }
        return answers, file["silence"]


def write_text(row: NDArray[np.int16], answer: Answer, start: int, end: int) -> None:
    """Writes an answer whose sound begins at frame `start`; nothing is written from `end` on."""
    free = start - TEXT_LEAD - 1  # the first frame that no earlier word has taken
    for frame, pieces in answer.words:
        place = max(start + frame - TEXT_LEAD, free)
        if place >= end:
            return
        if place > free:
            row[place - 1] = WORD_COMES
        for piece in pieces[: max(0, end - place)]:
            row[place], place = piece, place + 1
        free = place


# ---- one timeline ----------------------------------------------------------------------------


class Noise:
    """What a microphone adds: hiss, rumble or hum, at one level."""

    def __init__(self, generator: random.Random) -> None:
        self.level = 10 ** (generator.uniform(-75, -42) / 20) if generator.random() < 0.8 else 0.0
        self.kind = generator.choices(("hiss", "rumble", "hum"), (0.7, 0.2, 0.1))[0]
        self._hum = generator.choice((50.0, 60.0, 100.0, 120.0))
        self._seed = generator.randrange(1 << 32)

    def samples(self, count: int) -> Pcm:
        if self.level == 0:
            return np.zeros(count, np.float32)
        noise = np.random.default_rng(self._seed).standard_normal(count, np.float32)
        if self.kind == "rumble":  # falls with frequency: a leaky sum in blocks of a few samples
            noise = np.convolve(noise, np.exp(-np.arange(64, dtype=np.float32) / 12), "same")
        if self.kind == "hum":
            angle = 2 * math.pi * self._hum / SAMPLE_RATE * np.arange(count)
            tone = np.sin(angle) + 0.4 * np.sin(3 * angle)
            noise = 0.3 * noise + tone.astype(np.float32)
        return (noise * (self.level / float(noise.std()))).astype(np.float32)


class Timeline:
    """One conversation under construction. Frames count from its beginning."""

    def __init__(self, silence: Codes, frames: int = FRAMES) -> None:
        self.frames = frames
        self.user: Pcm = np.zeros(frames * FRAME_SAMPLES, np.float32)
        self.text = np.full(frames, PAD, np.int16)
        self.own = np.repeat(silence[:, None], frames, axis=1)
        self.heard = np.zeros((HEARD_WORDS, frames), np.uint8)
        self.speaking = np.zeros(frames, bool)  # the model
        self.engaged = np.zeros(frames, bool)  # from the first sound of a question to its answer
        self.events: list[dict[str, Any]] = []

    def hear(self, speech: Speech, start: int, gain: float) -> int:
        """Adds what a user says from sample `start` on; the sample where it ends."""
        sounding = trimmed(speech.pcm, 2e-3)
        pcm = speech.pcm[sounding]
        end = start + len(pcm)
        self.user[start:end] += np.float32(gain) * pcm[: max(0, len(self.user) - start)]
        self._note_words(speech, start - sounding.start, end)
        return end

    def _note_words(self, speech: Speech, origin: int, end: int) -> None:
        """At each frame the last words that were complete when it began."""
        if not speech.words:
            return
        numbers = [_WORD_NUMBER.get(word, 1) for _, word in speech.words]
        onsets = [origin + int(onset * SAMPLE_RATE) for onset, _ in speech.words]
        ends = [math.ceil(sample / FRAME_SAMPLES) for sample in (*onsets[1:], end)]
        for count, frame in enumerate(ends, start=1):
            last = ends[count] if count < len(ends) else frame + LISTEN_FRAMES
            for back, number in enumerate(reversed(numbers[max(0, count - HEARD_WORDS) : count])):
                self.heard[back, frame:last] = number

    def speak(self, answer: Answer, start: int, cut: int | None = None) -> int:
        """Lets the model say an answer from frame `start`, up to `cut`; the frame where it ends."""
        end = start + answer.frames if cut is None else min(cut, start + answer.frames)
        self.own[:, start:end] = answer.codes[:, : end - start]
        self.speaking[start:end] = True
        write_text(self.text, answer, start, end)
        return end

    def rows(self, user_codes: Codes) -> NDArray[np.int16]:
        return np.concatenate([self.text[None], self.own, user_codes]).astype(np.int16)


class Script:
    """Draws timelines: who says what, and when."""

    def __init__(self, answers: dict[str, Answer], silence: Codes, espeak: Espeak) -> None:
        self._answers, self._silence, self._espeak = answers, silence, espeak
        self._exchanges, self._talk = split().trained, Talk()
        self._weights = [WEIGHTS.get(exchange.family, 1.0) for exchange in self._exchanges]

    def draw(self, generator: random.Random) -> Timeline:
        timeline = Timeline(self._silence)
        kind = generator.choices(("dialogue", "talk", "quiet"), (0.86, 0.08, 0.06))[0]
        if kind == "dialogue":
            self._converse(timeline, generator, questions=0.87)
        elif kind == "talk":
            self._converse(timeline, generator, questions=0.0)
        timeline.user += Noise(generator).samples(len(timeline.user))
        np.clip(timeline.user, -1, 1, out=timeline.user)
        return timeline

    def _converse(self, timeline: Timeline, generator: random.Random, questions: float) -> None:
        voice, level = user_voice(generator), generator.uniform(-12, 2)
        second = generator.uniform(0.2, 1.2)
        end = timeline.frames * FRAME_SAMPLES / SAMPLE_RATE
        while second < end:
            start = int(second * SAMPLE_RATE)
            gain = 10 ** ((level + generator.uniform(-2, 2)) / 20)
            if generator.random() < questions:
                silent_from = self._exchange(timeline, generator, voice, start, gain)
                if silent_from is None:
                    return
                second = silent_from * FRAME_SAMPLES / SAMPLE_RATE
            else:
                stranger = user_voice(generator) if generator.random() < 0.4 else voice
                aside = generator.random() < 0.15
                text = STOP if aside else self._talk.sentence(generator)
                sample = timeline.hear(self._espeak.speak(text, stranger), start, gain)
                frame = math.ceil(sample / FRAME_SAMPLES)
                timeline.events.append({"talk": text, "end": frame})
                second = sample / SAMPLE_RATE
            long = generator.random() < 0.1
            second += generator.uniform(2, 6) if long else generator.uniform(0.3, 1.4)

    def _exchange(
        self, timeline: Timeline, generator: random.Random, voice: Voice, start: int, gain: float
    ) -> int | None:
        """A question and its answer; the frame where the model is silent again, or None where the
        timeline is too short for them."""
        exchange = generator.choices(self._exchanges, self._weights)[0]
        answer = self._answers[exchange.answer]
        speech = self._espeak.speak(exchange.question, voice)
        sounding = trimmed(speech.pcm, 2e-3)
        question_end = math.ceil((start + sounding.stop - sounding.start) / FRAME_SAMPLES)
        first = question_end + generator.randint(*GAP)
        if first + answer.frames + 4 > timeline.frames:
            return None
        timeline.hear(speech, start, gain)
        cut, chance = None, generator.random()
        if chance < 0.16:
            cut = self._interrupt(timeline, generator, voice, gain, first, answer.frames)
        elif chance < 0.21:  # somebody says a word or two meanwhile: no reason to stop
            words = self._talk.sentence(generator).split()[:2]
            at = (first + generator.randrange(answer.frames)) * FRAME_SAMPLES
            timeline.hear(self._espeak.speak(" ".join(words), voice), at, gain)
        end = timeline.speak(answer, first, cut)
        timeline.engaged[start // FRAME_SAMPLES : end] = True
        timeline.events.append(
            {
                "question": exchange.question,
                "answer": exchange.answer,
                "end": question_end,
                "first": first,
                "cut": cut,
            }
        )
        return end

    def _interrupt(
        self,
        timeline: Timeline,
        generator: random.Random,
        voice: Voice,
        gain: float,
        first: int,
        frames: int,
    ) -> int | None:
        """Says "stop" into an answer; the first silent frame, or None where it is over by then."""
        start = int((first + generator.uniform(0, max(2, frames - 6))) * FRAME_SAMPLES)
        end = timeline.hear(self._espeak.speak(STOP, voice), start, gain)
        cut = math.ceil(end / FRAME_SAMPLES) + STOP_FRAMES
        return cut if cut < first + frames else None


# ---- files -----------------------------------------------------------------------------------


def _save(path: Path, **arrays: Any) -> None:
    """All of the file or nothing, for those who read while it is written."""
    unfinished = path.with_suffix(".part")
    with unfinished.open("wb") as file:
        np.savez_compressed(file, **arrays)
    unfinished.replace(path)


def prepare(data: Path, espeak: Espeak, codec: StreamingCodec) -> tuple[dict[str, Answer], Codes]:
    """The tokenizer and the answers, made once: every shard must say the same in the same codes."""
    data.mkdir(parents=True, exist_ok=True)
    if not (data / TOKENIZER).exists():
        train_tokenizer(data / TOKENIZER)
    if not (data / ANSWERS).exists():
        tokenizer = sentencepiece.SentencePieceProcessor(str(data / TOKENIZER))
        trained = list(split().trained)
        save_answers(
            data / ANSWERS, make_answers(trained, espeak, codec, tokenizer), codec.silence()
        )
    return load_answers(data / ANSWERS)


def make_shard(path: Path, script: Script, codec: StreamingCodec, seed: str) -> None:
    generator = random.Random(seed)
    timelines: list[Timeline] = []
    rows: list[NDArray[np.int16]] = []
    for _ in range(SHARD // TOGETHER):
        drawn = [script.draw(generator) for _ in range(TOGETHER)]
        codes = codec.encode(np.stack([timeline.user for timeline in drawn]))
        rows += [line.rows(user) for line, user in zip(drawn, codes, strict=True)]
        for line in drawn:
            line.user = line.user[:0]
        timelines += drawn
    _save(
        path,
        rows=np.stack(rows),
        heard=np.stack([line.heard for line in timelines]),
        speaking=np.stack([line.speaking for line in timelines]),
        engaged=np.stack([line.engaged for line in timelines]),
        events=np.array(json.dumps([line.events for line in timelines])),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the shards; present ones stay")
    parser.add_argument("--shards", type=int, default=200, help=f"of {SHARD} timelines each")
    parser.add_argument("--codec", type=Path, default=CODEC_FOLDER, help="folder of the codec")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    espeak, codec = Espeak(), StreamingCodec(arguments.codec)
    script = Script(*prepare(arguments.data, espeak, codec), espeak)
    for number in range(arguments.shards):
        path = arguments.data / f"shard{number:04}.npz"
        if path.exists():
            continue
        began = time.monotonic()
        make_shard(path, script, codec, f"{arguments.seed}/{number}")
        speed = SHARD * FRAMES * FRAME_SAMPLES / SAMPLE_RATE / (time.monotonic() - began)
        size = path.stat().st_size / 1e6
        print(f"{path.name}  {speed:.0f} times real time, {size:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
