"""What the training data of the tiny model promises: examples/train_tiny."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "train_tiny"))

import corpus
import eval_lm
import timelines
from espeak import Espeak
from mimi_tiny import CODEBOOKS, FRAME_SAMPLES
from timelines import PAD, WORD_COMES, Answer, Timeline

pytestmark = pytest.mark.python

SILENCE = np.full(CODEBOOKS, 7, np.int16)


def fake_answer(frames: int, *words: tuple[int, tuple[int, ...]]) -> Answer:
    codes = np.arange(CODEBOOKS * frames, dtype=np.int16).reshape(CODEBOOKS, frames) + 100
    return Answer(codes, words)


@pytest.fixture(scope="module")
def espeak() -> Espeak:
    return Espeak()


@pytest.fixture(scope="module")
def drawn(espeak: Espeak) -> list[Timeline]:
    """Timelines as in training, but for the codes of the answers."""
    answers = {
        exchange.answer: fake_answer(4 * len(exchange.answer.split()), (0, (9,)))
        for exchange in corpus.split().trained
    }
    script, generator = timelines.Script(answers, SILENCE, espeak), random.Random(1)
    return [script.draw(generator) for _ in range(6)]


def test_every_word_of_an_answer_has_its_time_in_order(espeak: Espeak) -> None:
    for exchange in corpus.all_exchanges():
        pcm, speech = timelines.answer_pcm(espeak, exchange)
        onsets = [onset for onset, _ in speech.words]
        assert len(onsets) == len(exchange.answer.split()), exchange.answer
        assert onsets == sorted(onsets), exchange.answer
        assert onsets[-1] < len(pcm) / 24000, exchange.answer


def test_text_leads_the_sound_by_two_frames() -> None:
    timeline = Timeline(SILENCE, frames=40)
    end = timeline.speak(fake_answer(12, (0, (11,)), (5, (12, 13)), (6, (14,))), start=20)
    assert end == 32
    first = [WORD_COMES, 11, PAD, PAD, PAD]
    second = [WORD_COMES, 12, 13, 14]  # its second piece pushes the next word back
    assert timeline.text[17:27].tolist() == [*first, *second, PAD]
    assert (timeline.own[:, :20] == 7).all()
    assert (timeline.own[:, 20:32] >= 100).all()
    assert (timeline.own[:, 32:] == 7).all()


def test_an_answer_that_is_cut_ends_in_sound_and_text() -> None:
    timeline = Timeline(SILENCE, frames=40)
    assert timeline.speak(fake_answer(12, (0, (11,)), (7, (12, 13))), start=20, cut=26) == 26
    assert timeline.text[25] == 12
    assert (timeline.text[26:] == PAD).all()
    assert (timeline.own[:, 26:] == 7).all()
    assert timeline.speaking[25]
    assert not timeline.speaking[26:].any()


def test_answers_begin_six_to_eight_frames_after_the_question(drawn: list[Timeline]) -> None:
    exchanges = [event for line in drawn for event in line.events if "question" in event]
    assert len(exchanges) > 10
    for event in exchanges:
        assert 6 <= event["first"] - event["end"] <= 8
    for line in drawn:
        loud = np.abs(line.user).reshape(-1, FRAME_SAMPLES).max(1)
        for event in line.events:
            if "question" in event:
                assert loud[event["end"] - 8 : event["end"]].max() > 1.5 * loud[event["end"] + 1]


def test_the_model_is_silent_but_for_its_answers(drawn: list[Timeline]) -> None:
    for line in drawn:
        assert line.speaking.sum() == sum(
            (event["cut"] or event["first"] + 4 * len(event["answer"].split())) - event["first"]
            for event in line.events
            if "question" in event
        )
        assert (line.own[:, ~line.speaking] == 7).all()
        assert not (line.speaking & ~line.engaged).any()


def test_held_out_exchanges_are_never_asked_in_training(drawn: list[Timeline]) -> None:
    parts = corpus.split()
    held_out = {exchange.question for exchange in parts.held_out}
    assert held_out
    assert not held_out & {exchange.question for exchange in parts.trained}
    asked = {event.get("question") for line in drawn for event in line.events}
    assert not held_out & asked


def test_held_out_exchanges_are_made_of_trained_words_and_sums() -> None:
    parts = corpus.split()
    trained = {exchange.question for exchange in parts.trained}
    words = {word for question in trained for word in question.split()}
    for exchange in parts.held_out:
        assert set(exchange.question.split()) <= words
        if exchange.family == "sum":
            first, _, second = exchange.question.removeprefix("what is ").split()
            assert f"what is {second} plus {first}" in trained


def test_users_of_an_evaluation_have_voices_and_talk_of_their_own() -> None:
    generator, talk = random.Random(2), corpus.Talk()

    def speakers(*, unseen: bool) -> set[str]:
        voices = [corpus.user_voice(generator, unseen=unseen) for _ in range(200)]
        return {voice.name.split("+")[1] for voice in voices}

    assert not speakers(unseen=False) & speakers(unseen=True)
    heard = {talk.sentence(generator) for _ in range(500)}
    assert not heard & {talk.sentence(generator, unheard=True) for _ in range(500)}


# ---- the evaluation ----------------------------------------------------------------------------


class Recorded:
    """A listener that answers what it was told, in turn."""

    def __init__(self, replies: list[eval_lm.Reply]) -> None:
        self.replies = replies

    def converse(self, users: list[np.ndarray]) -> list[eval_lm.Reply]:
        return [self.replies.pop(0) for _ in users]


def reply(user: np.ndarray, text: str, sound: np.ndarray, at: int) -> eval_lm.Reply:
    frames = len(user) // FRAME_SAMPLES
    pcm = np.zeros((frames + 1) * FRAME_SAMPLES, np.float32)
    pcm[at : at + len(sound)] = sound[: len(pcm) - at]
    return eval_lm.Reply([""] * (frames - 1) + [f" {text}"], pcm)


def test_the_evaluation_counts_words_times_and_sound(espeak: Espeak) -> None:
    exchanges = corpus.split().trained[:4]
    users = eval_lm.Users(espeak, 1)
    calls = [users.ask(exchange.question) for exchange in exchanges]
    voice = [timelines.answer_pcm(espeak, exchange)[0] for exchange in exchanges]
    spoken = [pcm[np.flatnonzero(np.abs(pcm) > eval_lm.AUDIBLE)[0] :] for pcm in voice]
    in_time, late, early = 12000, 36000, -2400
    replies = [
        reply(calls[0][0], exchanges[0].answer, spoken[0], calls[0][1] + in_time),
        reply(calls[1][0], exchanges[1].answer, spoken[1], calls[1][1] + late),
        reply(calls[2][0], "something else", spoken[2], calls[2][1] + early),
        reply(calls[3][0], "", spoken[3][:0], 0),
    ]
    found = eval_lm.ask_all(Recorded(replies), espeak, exchanges, 1)
    assert found["asked"] == 4 and found["exact"] == 0.5
    assert found["begun_within_1s"] == 0.25 and found["begun_early"] == 1
    # Of -0.1, 0.5 and 1.5; espeak-ng says the same a little differently the next time.
    assert found["delay_median"] == pytest.approx(0.5, abs=0.1)
    assert found["stoi_of"] == 2 and found["stoi"] > 0.9
    assert [entry["said"] for entry in found["wrong"]] == ["something else", ""]


def test_the_evaluation_finds_what_is_said_into_silence(espeak: Espeak) -> None:
    frames = 3 * eval_lm.WINDOW
    quiet = np.zeros(frames * FRAME_SAMPLES, np.float32)
    click = np.full(10, 0.02, np.float32)
    replies = [
        reply(quiet, "", click, eval_lm.WINDOW * FRAME_SAMPLES),
        reply(quiet, "hello", click[:0], 0),
    ]
    found = eval_lm.quiet_windows(Recorded(replies), espeak, "silence", 2, 1)
    assert found["windows"] == 6 and found["borne"] == round(4 / 6, 4)
    assert found["said"] == ["hello"]
