"""A session is upstream's live server: sound in, sound out.

Proven here: a conversation of 26 s (with --long, of a minute), held in a process of its own, equals
the loop of upstream's server in codes, tokens and sound; sessions that are fed codes decode as that
loop does; and sound may come in pieces of any size.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sound
import upstream
from checkpoints import SHAPES
from conftest import Checkpoints, Conversation
from played import assert_same_tokens, frame_row
from tolerances import bound

import moshi_c

pytestmark = [pytest.mark.parity, pytest.mark.slow, pytest.mark.timeout(900)]

FRAME = sound.FRAME
SCRIPT = Path(__file__).with_name("session_process.py")


@pytest.fixture(scope="module")
def ours(
    conversation: Conversation, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray]:
    """The same conversation with `moshi_c`, in a process that never saw upstream."""
    folder = tmp_path_factory.mktemp("conversation")
    np.save(folder / "in.npy", conversation.run.pcm)
    command = [sys.executable, str(SCRIPT), str(conversation.folder)]
    subprocess.run([*command, str(folder / "in.npy"), str(folder / "out.npz")], check=True)
    with np.load(folder / "out.npz") as file:
        return dict(file)


def test_the_conversation_is_worth_comparing_with(conversation: Conversation) -> None:
    run = conversation.run
    assert len(run.pcm) >= 326 * FRAME
    assert run.lead > bound("session_clear") and run.changed < 100
    assert run.lm.margin > bound("greedy_margin")
    assert SHAPES["session"].lm["context"] < 300
    for stream in (run.lm.text, *run.lm.audio.T):
        assert len(set(stream.tolist())) >= bound("distinct_tokens")
    assert run.sound.std() > 0.02 and np.abs(run.sound).max() < 1


def test_it_is_heard_as_upstreams_server_hears_it(
    conversation: Conversation, ours: dict[str, np.ndarray]
) -> None:
    assert_same_tokens(ours["user"], conversation.run.user_codes)


def test_it_is_answered_as_upstreams_server_answers_it(
    conversation: Conversation, ours: dict[str, np.ndarray]
) -> None:
    run = conversation.run
    assert_same_tokens(np.column_stack([ours["text"], ours["codes"]]), run.lm.out)
    silent = run.lm.silent * FRAME
    assert (ours["sound"][:silent] == 0).all()
    assert ours["sound"].dtype == np.float32
    assert np.abs(ours["sound"] - run.sound).max() <= bound("session_sound")


@pytest.mark.parametrize("name", ["moshi", "delays", "depth16"])
def test_a_session_fed_with_codes_decodes_as_upstreams_server_does(
    made: Checkpoints, name: str
) -> None:
    shape, folder = SHAPES[name], made.lm(name)
    user = upstream.user_codes(40, shape.user_q, shape.card, 4)
    with upstream.one_thread():
        run = upstream.lm_greedy(upstream.load_lm(folder), user)
        mimi = upstream.load_mimi(folder, max(shape.dep_q, shape.user_q))
        theirs = upstream.server_decode(mimi, run.out)
    assert run.margin > bound("greedy_margin")
    with (
        moshi_c.load(str(folder), device="cpu", progress=False) as model,
        moshi_c.Session(model, seed=1, text_temperature=0, audio_temperature=0) as session,
    ):
        frames = [
            session.step_codes(np.ascontiguousarray(codes, np.int32), decode=True) for codes in user
        ]
    assert_same_tokens(np.stack([frame_row(frame, shape.dep_q) for frame in frames]), run.out)
    ours = np.concatenate([frame.pcm for frame in frames])
    assert (ours[: shape.max_delay * FRAME] == 0).all()
    assert np.abs(ours - theirs).max() <= bound("session_sound")


def test_speech_recognition_sounds_like_nothing(made: Checkpoints) -> None:
    shape = SHAPES["stt"]
    with (
        moshi_c.load(str(made.lm("stt")), device="cpu", progress=False) as model,
        moshi_c.Session(model, seed=1, text_temperature=0) as session,
    ):
        codes = upstream.user_codes(1, shape.user_q, shape.card, 4)[0]
        frame = session.step_codes(np.ascontiguousarray(codes, np.int32), decode=True)
        assert frame.pcm is None and frame.codes is None and frame.text_token >= 0


@pytest.mark.parametrize("name", ["moshi", "hibiki"])
def test_sound_in_pieces_of_any_size_gives_the_same_conversation(
    made: Checkpoints, name: str
) -> None:
    """`push` and `flush` equal stepping the padded sound and then silence until all is said."""
    shape = SHAPES[name]
    options = {"conditions": {"description": "good"}} if name == "hibiki" else {}
    pcm = sound.minute()[30_000 : 30_000 + 30 * FRAME + 1234]
    padded = np.zeros((31 + shape.max_delay) * FRAME, np.float32)
    padded[: len(pcm)] = pcm
    with (
        moshi_c.load(str(made.lm(name)), device="cpu", progress=False) as model,
        moshi_c.Session(model, seed=5, **options) as stepped,
        moshi_c.Session(model, seed=5, **options) as pushed,
    ):
        want = [stepped.step(chunk) for chunk in padded.reshape(-1, FRAME)]
        rng = np.random.default_rng(3)
        got, at = [], 0
        while at < len(pcm):
            size = int(rng.choice([1, 7, 480, 960, 1919, 1920, 1921, 5000]))
            got += pushed.push(pcm[at : at + size])
            at += size
        assert len(got) == 30
        got += pushed.flush()
    assert len(got) == len(want)
    for mine, other in zip(got, want, strict=True):
        assert mine.text_token == other.text_token
        assert (mine.user_codes == other.user_codes).all()
        assert (mine.pcm == other.pcm).all()
