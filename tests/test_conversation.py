"""What the integrations share: a conversation in an event loop, without any framework."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sound

import moshi_c
from moshi_c.integrations.conversation import (
    BACKLOG,
    FRAME,
    RATE,
    Conversation,
    SharedModel,
    from_int16,
)
from moshi_c.turns import Moment, Turns

pytestmark = pytest.mark.python

QUESTION, ANSWER = "what colour is the sky", "the sky is blue"
SEED = 7


@pytest.fixture(scope="module")
def model() -> Iterator[moshi_c.Model]:
    with moshi_c.load() as model:
        yield model


def asked(before: float = 0.5, after: float = 4.0) -> np.ndarray:
    """The question between silences, in whole frames."""
    parts = [sound.silence(before), 0.5 * sound.speech(QUESTION), sound.silence(after)]
    pcm = np.concatenate(parts)
    return np.concatenate([pcm, np.zeros(-len(pcm) % FRAME, np.float32)])


async def finished(conversation: Conversation) -> list[Moment]:
    """All that is left of it."""
    conversation.finish()
    moments = [moment async for moment in conversation]
    await conversation.close()
    return moments


def text_of(moments: list[Moment]) -> str:
    return "".join(moment.frame.text for moment in moments).strip()


@pytest.mark.parametrize("size", [240, 1920, 5000, 10**6])
def test_sound_in_any_pieces_gives_the_frames_of_a_session(model: moshi_c.Model, size: int) -> None:
    pcm = asked(after=1.0)

    async def call() -> list[Moment]:
        conversation = Conversation(SharedModel(model), silence_after=None, seed=SEED)
        for i in range(0, len(pcm) // 2, size):  # before it is open, and after
            conversation.hear(pcm[i : min(i + size, len(pcm) // 2)], RATE)
        await conversation.open()
        conversation.hear(pcm[len(pcm) // 2 :], RATE)
        return await finished(conversation)

    frames = [moment.frame for moment in asyncio.run(call())]
    with moshi_c.Session(model, seed=SEED) as session:
        expected = [session.step(each) for each in pcm.reshape(-1, FRAME)]
    assert [frame.text for frame in frames] == [frame.text for frame in expected]
    for frame, other in zip(frames, expected, strict=True):
        assert np.array_equal(frame.pcm, other.pcm)


def test_a_gap_in_the_sound_is_silence_and_a_late_burst_makes_up_for_it(
    model: moshi_c.Model,
) -> None:
    pcm = asked(after=8.0)
    head, tail = pcm[: 5 * FRAME], pcm[5 * FRAME :]

    async def call() -> tuple[list[Moment], list[Moment]]:
        conversation = Conversation(SharedModel(model), silence_after=0.05, seed=SEED)
        await conversation.open()
        conversation.hear(head, RATE)
        stalled = [await anext(conversation) for _ in range(5 + 20)]
        conversation.hear(tail, RATE)
        return stalled, await finished(conversation)

    stalled, rest = asyncio.run(call())
    assert all(moment.frame.level == -120 for moment in stalled[5:])
    assert text_of(rest) == ANSWER
    # The question is whole, the pause behind it was cut by as many frames as had been put in; a few
    # more if the machine was slow.
    loud = [moment for moment in rest if moment.frame.level > -60]
    assert len(loud) == sum(np.abs(tail.reshape(-1, FRAME)).max(axis=1) > 0.01)
    assert len(stalled) + len(rest) <= len(pcm) // FRAME


def test_without_sound_nothing_is_stepped_until_it_is_told_to_begin(model: moshi_c.Model) -> None:
    async def call() -> Moment:
        conversation = Conversation(SharedModel(model), silence_after=0.05)
        await conversation.open()
        waiting = asyncio.create_task(anext(conversation))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        conversation.begin()
        moment = await waiting
        await conversation.close()
        return moment

    assert asyncio.run(call()).frame.index == 0


def test_cancelled_in_the_middle_it_gives_the_slot_back() -> None:
    async def call(model: moshi_c.Model, when: float) -> None:
        conversation = Conversation(SharedModel(model))
        conversation.hear(sound.silence(20.0), RATE)

        async def talk() -> None:
            try:
                await conversation.open()
                async for _ in conversation:
                    pass
            finally:
                await conversation.close()

        task = asyncio.create_task(talk())
        await asyncio.sleep(when)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled() and conversation.stats is None
        # a session that was being made in a thread closes when it is there
        await asyncio.get_running_loop().shutdown_default_executor()
        await asyncio.sleep(0.1)
        moshi_c.Session(model).close()
        conversation.hear(sound.silence(1.0), RATE)  # late sound
        conversation.say("hello")

    with moshi_c.load(max_sessions=1) as model:
        for when in (0.0, 0.001, 0.01, 0.1):
            asyncio.run(call(model, when))


def test_no_more_than_the_backlog_waits(model: moshi_c.Model) -> None:
    async def call() -> Conversation:
        conversation = Conversation(SharedModel(model), silence_after=None)
        for _ in range(5):
            conversation.hear(sound.silence(8.0), RATE)
        await conversation.open()
        assert len(await finished(conversation)) == BACKLOG
        return conversation

    assert asyncio.run(call()).dropped == 500 - BACKLOG


def test_text_waits_for_the_model_and_what_it_cannot_spell_is_refused(
    model: moshi_c.Model,
) -> None:
    async def call() -> list[Moment]:
        conversation = Conversation(SharedModel(model), silence_after=None, seed=SEED)
        conversation.say("my name")
        conversation.say("Ωμέγα")  # nobody is there to be told
        await conversation.open()
        with pytest.raises(ValueError, match="vocabulary"):
            conversation.say("Ωμέγα")
        conversation.say("is anna")
        conversation.hear(sound.silence(2.0), RATE)
        return await finished(conversation)

    assert text_of(asyncio.run(call())) == "my name is anna"


@pytest.mark.parametrize(
    ("pcm", "rate"), [(np.full(9, np.nan), RATE), (np.zeros((2, 2)), RATE), (np.zeros(9), 1)]
)
def test_bad_sound_is_refused_and_changes_nothing(
    model: moshi_c.Model, pcm: np.ndarray, rate: int
) -> None:
    async def call() -> None:
        conversation = Conversation(SharedModel(model), silence_after=None)
        await conversation.open()
        with pytest.raises(moshi_c.AudioError):
            conversation.hear(pcm, rate)
        conversation.hear(sound.silence(0.8), RATE)
        assert len(await finished(conversation)) == 10

    asyncio.run(call())


def test_a_change_of_rate_loses_no_sound(model: moshi_c.Model) -> None:
    async def call() -> None:
        conversation = Conversation(SharedModel(model), silence_after=None)
        await conversation.open()
        for rate in (8000, 48000, RATE):
            conversation.hear(np.zeros(rate, np.int16), rate)
        assert len(await finished(conversation)) == 3 * RATE // FRAME

    asyncio.run(call())


def test_a_model_that_was_given_stays_open(model: moshi_c.Model) -> None:
    SharedModel(model).close()
    moshi_c.Session(model).close()
    own = SharedModel()
    assert own.get() is own.get()
    own.close()
    own.close()


def test_turns_tell_who_begins_and_who_stops(model: moshi_c.Model) -> None:
    with moshi_c.Session(model, seed=SEED) as session:
        frames = [session.step(each) for each in asked().reshape(-1, FRAME)]
    turns = Turns()
    moments = [turns.add(frame) for frame in frames]
    changes = [(m.user, m.began, m.ended) for m in moments if m.user is not None or m.began]
    assert changes == [(True, False, False), (None, True, False), (False, False, False)]
    (end,) = [moment for moment in moments if moment.ended]
    assert end.reply is not None and end.reply.text.strip() == ANSWER
    last_loud = max(frame.time for frame in frames if frame.level > -45)
    assert end.reply.latency == pytest.approx(end.reply.start - last_loud)
    assert end.reply.output_codes == end.reply.input_codes == 8 * end.reply.frames


def test_a_click_is_no_turn(model: moshi_c.Model) -> None:
    with moshi_c.Session(model, seed=SEED) as session:
        frame = session.step(sound.silence(0.08))
    turns = Turns()
    levels = [-20.0, -120.0, -20.0, -120.0]
    frames = [replace(frame, index=i, time=0.08 * i, level=x) for i, x in enumerate(levels)]
    assert [turns.add(each).user for each in frames] == [None] * 4


def test_channels_are_mixed_and_odd_bytes_are_left_out() -> None:
    stereo = np.array([[100, 300], [-5, -7]], "<i2").tobytes()
    assert from_int16(stereo, 2).tolist() == [200, -6]
    assert from_int16(stereo[:-1], 2).tolist() == [200]
    assert from_int16(b"\x01", 1).tolist() == []


def test_the_package_imports_no_framework() -> None:
    check = "import sys, moshi_c.cli, moshi_c.integrations.conversation as c;" + (
        "print(sorted({'pipecat', 'livekit', 'fastrtc'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", ["pipecat", "livekit", "fastrtc"])
def test_without_the_framework_the_import_says_how_to_get_it(name: str) -> None:
    check = f"import sys; sys.modules[{name!r}] = None; import moshi_c.integrations.{name}"  # as if
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 1
    assert f'pip install "moshi_c[{name}]"' in done.stderr.splitlines()[-1]


def test_only_the_integrations_know_the_frameworks() -> None:
    package = Path(moshi_c.__file__).parent
    for path in package.glob("**/*.py"):
        inside = path.parent.name == "integrations"
        named = [n for n in ("pipecat", "livekit", "fastrtc") if f"from {n}" in path.read_text()]
        assert named == ([path.stem] if inside and path.stem in named else []), path.name
        assert inside or not re.search(r"(import|from)\s[\w.]*integrations", path.read_text())
