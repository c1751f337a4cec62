"""Frames that are given at once leave a session where stepping them would have."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import SHAPES, Shape
from conftest import Checkpoints
from numpy.typing import NDArray

import moshi_c
from moshi_c import AudioError, CheckpointError, Model, Session, SessionError

Ints = NDArray[np.int32]
GREEDY = {"text_temperature": 0.0, "audio_temperature": 0.0}
SAMPLED = {"text_temperature": 0.9, "audio_temperature": 0.9}
GUIDED = {"cfg_coef": 2.5, "null_conditions": {"description": "very_bad"}, "cfg_masked_until": 30}
AFTER = 50  # frames that follow


def users_codes(shape: Shape, frames: int, seed: int = 0) -> Ints:
    """int32[K, T]"""
    rng = np.random.default_rng(seed)
    return rng.integers(0, shape.card, (shape.user_q, frames)).astype(np.int32)


def step_all(session: Session, user: Ints, first: int = 0, last: int | None = None) -> list[Any]:
    """Everything that comes out of some frames."""
    seen = []
    for codes in user[:, first:last].T:
        frame = session.step_codes(codes, decode=False)
        said = None if frame.codes is None else frame.codes.tolist()
        heads = None if frame.heads is None else frame.heads.tobytes()
        logits = [array.tobytes() for array in session.logits]
        seen.append(
            (frame.index, frame.text, frame.text_token, said, heads, frame.speaking, logits)
        )
    return seen


@dataclass
class Call:
    """A conversation that was stepped."""

    user: Ints  # [K, T]
    seen: list[Any]
    text: Ints  # of each moment
    codes: Ints  # [K, T] of each moment

    def prefill(self, session: Session, first: int, last: int) -> None:
        part = slice(first, last)
        session.prefill(self.text[part], self.codes[:, part], self.user[:, part])


def held(model: Model, shape: Shape, frames: int, **options: Any) -> Call:
    user = users_codes(shape, frames)
    with Session(model, seed=5, keep_logits=True, **options) as session:
        seen = step_all(session, user)
    out = seen[shape.max_delay :]
    text = np.array([row[2] for row in out], np.int32)
    codes = np.array([row[3] or [] for row in out], np.int32).T
    return Call(user, seen, text, codes.reshape(shape.dep_q, len(out)))


CASES = {
    "moshi": {},
    "moshi sampled": SAMPLED,
    "hibiki": {},
    "hibiki guided": GUIDED,
    "hibiki guided without text": {"cfg_coef": 1.7, "cfg_is_no_text": True},
    "stt": {},
    "depth16": {},
    "delays": {},
    "delays sampled": SAMPLED,
}


@pytest.mark.parametrize(("case", "options"), CASES.items(), ids=list(CASES))
def test_prefill_equals_stepping(made: Checkpoints, case: str, options: dict[str, Any]) -> None:
    """Also in several parts, after steps, and past the end of the ring of keys and values."""
    name = case.split()[0]
    shape = SHAPES[name]
    ring = -(-int(shape.lm["context"]) // 64) * 64
    with moshi_c.load(made.lm(name), max_sessions=2, progress=False) as model:
        for frames in (20, ring + 21):
            call = held(model, shape, frames + AFTER, **{**GREEDY, **options})
            for parts in ([0, frames], [0, 1, 2, 9, frames], [7, frames]):
                with Session(model, seed=5, keep_logits=True, **{**GREEDY, **options}) as session:
                    step_all(session, call.user, 0, parts[0])
                    for first, last in pairwise(parts):
                        call.prefill(session, first, last)
                    again = step_all(session, call.user, frames)
                assert again == call.seen[frames:], (frames, parts)


def test_the_last_codes_of_late_streams_are_said_by_the_next_steps(made: Checkpoints) -> None:
    shape = SHAPES["delays"]
    rng = np.random.default_rng(3)
    text = rng.integers(0, shape.text_card, 12)
    codes = rng.integers(0, shape.card, (shape.dep_q, 12))
    user = users_codes(shape, 40)
    with (
        moshi_c.load(made.lm("delays"), progress=False) as model,
        Session(model, seed=1, **GREEDY) as session,
    ):
        session.prefill(text, codes, user[:, :12])
        out = [session.step_codes(user[:, 12 + i], decode=False) for i in range(shape.max_delay)]
    assert [frame.index for frame in out] == list(range(12, 12 + shape.max_delay))
    for i, frame in enumerate(out):
        moment = 12 - shape.max_delay + i
        assert frame.text_token == text[moment]
        assert frame.codes is not None and frame.codes.tolist() == codes[:, moment].tolist()


def test_any_tokens_are_taken_as_if_they_had_been_forced(made: Checkpoints) -> None:
    """Tokens that the model would never have said."""
    shape = SHAPES["moshi"]  # one frame late but for the text and the first codes
    rng = np.random.default_rng(4)
    text = rng.integers(0, shape.text_card, 30)
    codes = rng.integers(0, shape.card, (shape.dep_q, 30)).astype(np.int32)
    user = users_codes(shape, 30 + AFTER)
    with moshi_c.load(made.lm("moshi"), progress=False) as model:
        with Session(model, seed=2, keep_logits=True, **SAMPLED) as session:
            for step in range(30):
                late = codes[1:, max(step - 1, 0)]
                session._force_next(int(text[step]), np.array([codes[0, step], *late], np.int32))
                session.step_codes(user[:, step], decode=False)
            expected = session.snapshot()
        with Session(model, seed=2, keep_logits=True, **SAMPLED) as session:
            session.prefill(text[:29], codes[:, :29], user[:, :29])
            session._force_next(int(text[29]), np.array([codes[0, 29], *codes[1:, 28]], np.int32))
            session.step_codes(user[:, 29], decode=False)
            with Session.from_snapshot(model, expected) as stepped:
                assert step_all(session, user, 30) == step_all(stepped, user, 30)


def test_snapshots_and_forks_keep_what_is_still_to_be_said(made: Checkpoints) -> None:
    shape = SHAPES["hibiki"]
    with moshi_c.load(made.lm("hibiki"), progress=False) as model:
        call = held(model, shape, 20 + AFTER, **GREEDY)
        with Session(model, seed=5, keep_logits=True, **GREEDY) as session:
            call.prefill(session, 0, 20)
            data = session.snapshot()
            with session.fork() as fork, Session.from_snapshot(model, data) as restored:
                for other in (session, fork, restored):
                    assert step_all(other, call.user, 20) == call.seen[20:]


def test_a_model_of_many_slots_prefills_as_one_of_few(made: Checkpoints) -> None:
    """Its passes have room for more rows than one prefill takes."""
    shape = SHAPES["moshi"]
    for slots in (1, 128):
        with moshi_c.load(made.lm("moshi"), max_sessions=slots, progress=False) as model:
            call = held(model, shape, 140 + AFTER, **GREEDY)
            with Session(model, seed=5, keep_logits=True, **GREEDY) as session:
                call.prefill(session, 0, 140)
                assert step_all(session, call.user, 140) == call.seen[140:]


def test_neighbours_do_not_change_a_prefill(made: Checkpoints) -> None:
    """Another session steps all the while, so that the passes are cut short."""
    shape = SHAPES["moshi"]
    stop = threading.Event()

    def talk(session: Session) -> None:
        silence = np.zeros(shape.user_q, np.int32)
        while not stop.is_set():
            session.step_codes(silence, decode=False)

    with moshi_c.load(made.lm("moshi"), progress=False) as model:
        call = held(model, shape, 80 + AFTER, **GREEDY)
        with (
            Session(model) as neighbour,
            Session(model, seed=5, keep_logits=True, **GREEDY) as session,
        ):
            thread = threading.Thread(target=talk, args=(neighbour,))
            thread.start()
            try:
                call.prefill(session, 0, 80)
                again = step_all(session, call.user, 80)
            finally:
                stop.set()
                thread.join()
        assert again == call.seen[80:]


def test_what_is_left_out_is_silence() -> None:
    with moshi_c.load() as model:
        quiet = model.mimi.encode(np.zeros(10 * model.frame_size, np.float32))
        padding = np.full(10, 3)
        spoken = np.random.default_rng(0).integers(4, 300, 10)
        with Session(model, seed=1, **GREEDY) as session:
            states = []
            for given in (
                {"text_tokens": spoken},
                {"text_tokens": spoken, "codes": quiet, "user_codes": quiet},
                {"codes": quiet},
                {"text_tokens": padding, "user_codes": quiet},
            ):
                session.reset()
                session.prefill(**given)
                states.append(session.snapshot())
        assert states[0] == states[1] and states[2] == states[3] and states[0] != states[2]


def test_text_that_waits_to_be_said_is_said_after_a_prefill() -> None:
    with moshi_c.load() as model, Session(model, seed=1, **GREEDY) as session:
        session.force_text([7, 8, 9])
        session.prefill(text_tokens=[3] * 5)
        assert session._core.forced_left == 3
        silence = np.zeros(model.frame_size, np.float32)
        out = [session.step(silence).text_token for _ in range(4)]
        assert out == [3, 7, 8, 9]


def test_a_voice_follows_a_prefill() -> None:
    """The codec has heard nothing yet, and goes on from here."""
    with moshi_c.load() as model, Session(model, seed=1) as session:
        session.prefill(text_tokens=[3] * 30)
        frame = session.step(np.zeros(model.frame_size, np.float32))
        assert frame.index == 30 and frame.pcm is not None
        assert len(frame.pcm) == model.frame_size and np.isfinite(frame.pcm).all()


def test_what_cannot_be_given_is_refused_and_changes_nothing(made: Checkpoints) -> None:
    shape = SHAPES["moshi"]
    user = users_codes(shape, 6)
    codes = np.zeros((shape.dep_q, 6), np.int32)
    text = np.full(6, 3)

    def changed(array: Any, value: int) -> Any:
        array = np.array(array)
        array[..., -1] = value
        return array

    with (
        moshi_c.load(made.lm("moshi"), progress=False) as model,
        Session(model, seed=1, keep_logits=True) as session,
    ):
        before = session.snapshot()
        wrong_code = np.vstack([codes[:7], changed(codes[7:], 256)])
        refusals: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
            (ValueError, "prefill got no frames", ()),
            (
                AudioError,
                r"codes has shape \(8, 5\); expected \(8, 6\)",
                (text, codes[:, 1:], user),
            ),
            (AudioError, r"user_codes has shape \(6, 8\); expected", (text, codes, user.T)),
            (AudioError, r"codes has shape \(6,\); expected", (text, codes[0], user)),
            (AudioError, "text_tokens is float64; expected integers", (text / 1, codes, user)),
            (ValueError, "text token 200 is not in 0 to 199", (changed(text, 200), codes, user)),
            (ValueError, "text token -1 is not in", (changed(text, -1), codes, user)),
            (ValueError, "code 7 is 256, expected 0 to 255", (text, wrong_code, user)),
            (AudioError, "user code 0 is -2, expected 0 to 256", (text, codes, changed(user, -2))),
        ]
        for error, match, given in refusals:
            with pytest.raises(error, match=match):
                session.prefill(*given)
        session.prefill(text[:0], codes[:, :0], user[:, :0])
        assert session.snapshot() == before
        session.prefill(text, codes, user)
        with pytest.raises(SessionError, match="no logits before a step has made them"):
            _ = session.logits
    with pytest.raises(SessionError, match="closed"):
        session.prefill(text, codes, user)


def test_silence_needs_a_codec(made: Checkpoints, tmp_path: Path) -> None:
    folder = tmp_path / "voiceless"
    shutil.copytree(made.lm("moshi"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / config.pop("mimi_name")).unlink()
    (folder / "config.json").write_text(json.dumps(config))
    with (
        moshi_c.load(folder, progress=False) as model,
        Session(model) as session,
        pytest.raises(CheckpointError, match="loaded without a codec"),
    ):
        session.prefill(text_tokens=[3, 3])
