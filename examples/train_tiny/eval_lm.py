"""Talks to an exported moshi-tiny and counts what it gets right.

    python eval_lm.py MODEL --json eval.json
    python eval_lm.py MODEL --temperatures 0.3 0.2          # of sound and text; greedy without

Sessions of moshi_c hear the user's samples and answer in samples, frame by frame as in a call.
Users are voices that were never trained on, with noise. Times are those of a listener: what comes
out of a step is heard when the frame that went into it has ended.

Asked are trained exchanges, held-out ones of the families that copy or add, and trained ones half a
minute into the call, when its beginning has left the model's memory. An answer is exact when its
whole text is right; its STOI compares it with espeak-ng's own rendering. Quiet windows of 10 s are
silence, noise at -50 dBFS, and talk that needs no answer: nothing may be said. Stops are long
answers into which the user says "stop".
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from corpus import STOP, Exchange, Talk, split, user_voice
from espeak import SAMPLE_RATE, Espeak, Voice
from mimi_tiny import FRAME_SAMPLES, Pcm
from pystoi import stoi
from timelines import answer_pcm, trimmed

import moshi_c

TOGETHER = 24  # conversations side by side
AUDIBLE = 0.01  # of full scale
AFTER = 60  # frames from the end of a question to the end of the conversation
WINDOW = 125  # frames of a quiet window


@dataclass(frozen=True)
class Reply:
    """What came back, frame by frame on the listener's clock."""

    texts: list[str]  # [T]
    pcm: Pcm  # [(T + 1) * 1920]

    def text(self, first: int = 0, last: int | None = None) -> str:
        """The words of some frames."""
        return "".join(self.texts[first:last]).strip()

    def onset(self, after: int = 0) -> int | None:
        """The first audible sample from `after` on."""
        loud = np.flatnonzero(np.abs(self.pcm[after:]) > AUDIBLE)
        return after + int(loud[0]) if len(loud) else None


class Listener:
    """A model to talk to.

    temperatures: of sound and text; (0, 0) is greedy, None the model's own.
    options: more of moshi_c.load.
    """

    def __init__(
        self,
        folder: Path | None = None,
        temperatures: tuple[float, float] | None = (0.0, 0.0),
        seed: int = 0,
        threads: int | None = 1,
        **options: Any,
    ) -> None:
        self._model = moshi_c.load(folder, max_sessions=TOGETHER, threads=threads, **options)
        self._options: dict[str, Any] = {}
        if temperatures is not None:
            sound, text = temperatures
            self._options = {"audio_temperature": sound, "text_temperature": text}
        self._seeds = itertools.count(seed)

    def converse(self, users: list[Pcm]) -> list[Reply]:
        replies: list[Reply] = []
        for first in range(0, len(users), TOGETHER):
            replies += self._side_by_side(users[first : first + TOGETHER])
        return replies

    def _side_by_side(self, users: list[Pcm]) -> list[Reply]:
        size = FRAME_SAMPLES
        times = max(len(user) for user in users) // size
        heard = np.stack([np.pad(user, (0, times * size - len(user))) for user in users])
        with contextlib.ExitStack() as stack:
            sessions = [
                stack.enter_context(
                    moshi_c.Session(self._model, seed=next(self._seeds), **self._options)
                )
                for _ in users
            ]
            texts: list[list[str]] = [[] for _ in users]
            pcm = np.zeros((len(users), (times + 1) * size), np.float32)
            for time in range(times):
                now, later = slice(time * size, (time + 1) * size), (time + 1) * size
                frames = moshi_c.step_many(sessions, list(heard[:, now]))
                for row, frame in enumerate(frames):
                    texts[row].append(frame.text)
                    if frame.pcm is not None:
                        pcm[row, later : later + size] = frame.pcm
        return [Reply(*reply) for reply in zip(texts, pcm, strict=True)]


class Users:
    """What the users of an evaluation say: the same for the same seed, whatever the model."""

    def __init__(self, espeak: Espeak, seed: int) -> None:
        self.random, self._espeak, self._talk = random.Random(seed), espeak, Talk()

    def background(self, frames: int, level: float | None = None) -> Pcm:
        """Hiss at `level` in dBFS, or between -75 and -48."""
        decibels = self.random.uniform(-75, -48) if level is None else level
        generator = np.random.default_rng(self.random.randrange(1 << 32))
        hiss = generator.standard_normal(frames * FRAME_SAMPLES, np.float32)
        return hiss * np.float32(10 ** (decibels / 20))

    def voice(self) -> tuple[Voice, np.float32]:
        return user_voice(self.random, unseen=True), np.float32(
            10 ** (self.random.uniform(-9, 0) / 20)
        )

    def say(self, text: str, voice: Voice) -> Pcm:
        pcm = self._espeak.speak(text, voice).pcm
        return pcm[trimmed(pcm, 2e-3)]

    def ask(
        self, question: str, *, interrupt: bool = False, after: float = 0.0
    ) -> tuple[Pcm, int, tuple[int, int]]:
        """The user's stream with a question some seconds `after` the call began, the sample where
        the question ends, and where a "stop" in the answer begins and ends."""
        voice, gain = self.voice()
        speech = gain * self.say(question, voice)
        start = int((after + self.random.uniform(0.4, 2.0)) * SAMPLE_RATE)
        end = start + len(speech)
        frames = end // FRAME_SAMPLES + 1 + AFTER
        user = self.background(frames)
        user[start:end] += speech
        stop = end + int(self.random.uniform(0.8, 1.4) * SAMPLE_RATE)
        stop_end = stop
        if interrupt:
            word = gain * self.say(STOP, voice)
            stop_end = stop + len(word)
            user[stop:stop_end] += word
        return user, end, (stop, stop_end)

    def chatter(self, frames: int) -> Pcm:
        """Talk of unheard words with pauses."""
        user = self.background(frames)
        voice, gain = self.voice()
        at = int(0.5 * SAMPLE_RATE)
        while at < len(user):
            speech = gain * self.say(self._talk.sentence(self.random, unheard=True), voice)
            user[at : at + len(speech)] += speech[: len(user) - at]
            at += len(speech) + int(self.random.uniform(0.3, 1.4) * SAMPLE_RATE)
        return user


def aligned_stoi(wanted: Pcm, reply: Reply) -> float:
    """The best over shifts of 10 ms around the onset."""
    onset, scores = reply.onset(), [0.0]
    if onset is not None:
        for shift in range(-FRAME_SAMPLES, FRAME_SAMPLES, SAMPLE_RATE // 100):
            begin = max(0, onset + shift)
            heard = reply.pcm[begin : begin + len(wanted)]
            scores.append(float(stoi(wanted, np.pad(heard, (0, len(wanted) - len(heard))), 24000)))
    return max(scores)


def ask_all(
    listener: Listener,
    espeak: Espeak,
    exchanges: Sequence[Exchange],
    seed: int,
    *,
    after: float = 0.0,
    sounds: int = 24,
) -> dict[str, Any]:
    """Asks each exchange once, in a call of its own; STOI of the first `sounds` exact answers."""
    users = Users(espeak, seed)
    asked = [users.ask(exchange.question, after=after) for exchange in exchanges]
    replies = listener.converse([user for user, _, _ in asked])
    families: dict[str, list[bool]] = defaultdict(list)
    delays: list[float] = []
    scores: list[float] = []
    wrong: list[dict[str, str]] = []
    in_time = early = 0
    for exchange, (_, end, _), reply in zip(exchanges, asked, replies, strict=True):
        text, onset = reply.text(), reply.onset()
        exact = text == exchange.answer
        families[exchange.family].append(exact)
        if not exact:
            wrong.append({"question": exchange.question, "said": text})
        if onset is not None:
            delays.append((onset - end) / SAMPLE_RATE)
            early += onset < end
            in_time += 0 <= delays[-1] <= 1.0
        if exact and len(scores) < sounds:
            scores.append(aligned_stoi(answer_pcm(espeak, exchange)[0], reply))
    right = [exact for family in families.values() for exact in family]
    return {
        "asked": len(right),
        "exact": round(float(np.mean(right)), 4),
        "by_family": {name: round(float(np.mean(rows)), 3) for name, rows in families.items()},
        "begun_within_1s": round(in_time / len(right), 4),
        "begun_early": early,
        "delay_median": round(float(np.median(delays)), 3) if delays else None,
        "delay_95": round(float(np.quantile(delays, 0.95)), 3) if delays else None,
        "stoi": round(float(np.mean(scores)), 4) if scores else None,
        "stoi_of": len(scores),
        "wrong": wrong,
    }


def quiet_windows(
    listener: Listener, espeak: Espeak, kind: str, streams: int, seed: int
) -> dict[str, Any]:
    """Streams of three windows. A window fails where a word or a sound is in it."""
    users, frames = Users(espeak, seed), 3 * WINDOW
    heard: list[Pcm] = []
    for _ in range(streams):
        if kind == "talk":
            heard.append(users.chatter(frames))
        elif kind == "noise":
            heard.append(users.background(frames, level=-50))
        else:
            heard.append(np.zeros(frames * FRAME_SAMPLES, np.float32))
    borne = 0
    said: list[str] = []
    for reply in listener.converse(heard):
        for first in range(0, frames, WINDOW):
            text = reply.text(first, first + WINDOW)
            sound = reply.pcm[first * FRAME_SAMPLES : (first + WINDOW) * FRAME_SAMPLES]
            borne += text == "" and float(np.abs(sound).max()) < AUDIBLE
            said += [text] if text else []
    windows = 3 * streams
    return {"windows": windows, "borne": round(borne / windows, 4), "said": said}


def stops(listener: Listener, espeak: Espeak, count: int, seed: int) -> dict[str, Any]:
    """Counts the answers that were under way at "stop" and would have gone on for a second."""
    users = Users(espeak, seed)
    long = [exchange for exchange in split().trained if len(exchange.answer.split()) >= 5]
    exchanges = [users.random.choice(long) for _ in range(count)]
    asked = [users.ask(exchange.question, interrupt=True) for exchange in exchanges]
    replies = listener.converse([user for user, _, _ in asked])
    delays: list[float] = []
    for exchange, (_, _, (stop, end)), reply in zip(exchanges, asked, replies, strict=True):
        onset = reply.onset()
        if onset is None or onset > stop:
            continue
        if onset + len(answer_pcm(espeak, exchange)[0]) < end + SAMPLE_RATE:
            continue
        last = int(np.flatnonzero(np.abs(reply.pcm) > AUDIBLE)[-1])
        delays.append((last - end) / SAMPLE_RATE)
    return {
        "stopped": len(delays),
        "silent_within_0.6s": round(float(np.mean([delay <= 0.6 for delay in delays])), 4)
        if delays
        else None,
        "delay_median": round(float(np.median(delays)), 3) if delays else None,
    }


def evaluate(listener: Listener, count: int, seed: int) -> dict[str, Any]:
    espeak, parts = Espeak(), split()
    order = random.Random(seed)
    trained = order.sample(parts.trained, len(parts.trained))
    held_out = order.sample(parts.held_out, len(parts.held_out))
    result: dict[str, Any] = {"seed": seed}

    def note(name: str, figures: dict[str, Any]) -> None:
        result[name] = figures
        shown = {key: value for key, value in figures.items() if key not in ("wrong", "said")}
        print(f"{name:9}", shown, flush=True)

    note("trained", ask_all(listener, espeak, trained[:count], seed))
    note("held out", ask_all(listener, espeak, held_out[:count], seed + 1))
    note("late", ask_all(listener, espeak, trained[: min(48, count)], seed, after=30))
    for kind in ("silence", "noise", "talk"):
        streams = max(4, min(24, count // 4))
        note(kind, quiet_windows(listener, espeak, kind, streams, seed + 2))
    note("stop", stops(listener, espeak, min(60, count), seed + 3))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of export_lm.py")
    parser.add_argument("--count", type=int, default=1000, help="of exchanges in a group, at most")
    parser.add_argument("--temperatures", type=float, nargs=2, metavar=("SOUND", "TEXT"))
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    sound, text = arguments.temperatures or (0.0, 0.0)
    listener = Listener(arguments.model, (sound, text), arguments.seed, arguments.threads)
    result = {"temperatures": [sound, text]} | evaluate(listener, arguments.count, arguments.seed)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
