"""What the training data of the tiny model promises: examples/train_tiny."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "train_tiny"))

import corpus
import timelines
from espeak import Espeak
from mimi_tiny import CODEBOOKS, FRAME_SAMPLES
from timelines import PAD, WORD_COMES, Answer, Timeline

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
