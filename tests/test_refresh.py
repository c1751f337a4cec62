"""A refreshed context is that of a conversation which began with the last frames, and nothing but
the conversation itself decides when it is made."""

from __future__ import annotations

import json
import struct
import threading
from typing import Any

import numpy as np
import pytest
from checkpoints import SHAPES, Shape
from conftest import Checkpoints
from numpy.typing import NDArray
from test_prefill import GREEDY, GUIDED, SAMPLED, Call, held, step_all, users_codes

import moshi_c
from moshi_c import CheckpointError, Frame, Model, Session

FRAME = 1920
#: Of the package's model, with a range of 100 frames: 50 are kept, and reading them takes 5 steps.
STEPS = 5


def events(frames: list[Frame]) -> list[tuple[int, str]]:
    return [(frame.index, frame.event) for frame in frames if frame.event]


def steps_of(keep: int) -> int:
    return -(-keep // 15) + 1


def call_of(model: Model, shape: Shape, frames: int, **options: Any) -> tuple[Call, list[int]]:
    """A refreshed call, and the first frames of its contexts."""
    call = held(model, shape, frames, context_policy="refresh", **options)
    with Session(model, seed=5, keep_logits=True, context_policy="refresh", **options) as session:
        out = [session.step_codes(codes, decode=False) for codes in call.user.T]
    return call, [frame.index for frame in out if frame.event == "refresh_end"]


@pytest.mark.parametrize("name", ["moshi", "hibiki", "hibiki guided", "delays", "stt"])
def test_a_refreshed_context_is_that_of_a_new_conversation(made: Checkpoints, name: str) -> None:
    """It was given the last frames and nothing else: every logit is the same until the next one."""
    options = {**GREEDY, **({**GUIDED, "cfg_masked_until": None} if "guided" in name else {})}
    name = name.split()[0]
    shape = SHAPES[name]
    keep, span = 20, {"context_range": 60, "context_keep": 20}
    with moshi_c.load(made.lm(name), max_sessions=2, progress=False) as model:
        call, ends = call_of(model, shape, 150, **options, **span)
        assert len(ends) >= 2
        for end, following in zip(ends, [*ends[1:], 130], strict=True):
            kept = keep + steps_of(keep) - 1
            with Session(model, seed=5, keep_logits=True, **options) as session:
                call.prefill(session, end - kept, end)
                fresh = step_all(session, call.user, end, following)
            for ours, theirs in zip(fresh, call.seen[end:following], strict=True):
                assert ours[2:5] == theirs[2:5] and ours[6] == theirs[6]


def test_a_refresh_comes_in_a_pause_and_tells_of_itself() -> None:
    silence = np.zeros(FRAME, np.float32)
    with moshi_c.load() as model, Session(model, seed=1, context_policy="refresh") as session:
        out = [session.step(silence) for _ in range(145)]
    assert events(out) == [
        (79, "context_80"),
        (80, "refresh_begin"),
        (80 + STEPS, "refresh_end"),
        (80 + STEPS + 25, "context_80"),
        (80 + STEPS + 26, "refresh_begin"),
        (80 + 2 * STEPS + 26, "refresh_end"),
        (80 + 2 * STEPS + 26 + 25, "context_80"),
        (80 + 2 * STEPS + 26 + 26, "refresh_begin"),
    ]


def test_without_a_pause_it_ends_with_the_range() -> None:
    loud = (0.1 * np.random.default_rng(0).standard_normal(FRAME)).astype(np.float32)
    with moshi_c.load() as model, Session(model, seed=1, context_policy="refresh") as session:
        out = [session.step(loud) for _ in range(102)]
    assert events(out) == [(79, "context_80"), (93, "refresh_begin"), (98, "refresh_end")]


def test_a_ring_tells_that_it_fills_and_is_left_alone() -> None:
    silence = np.zeros(FRAME, np.float32)
    with moshi_c.load() as model, Session(model, seed=1) as session:
        out = [session.step(silence, decode=False) for _ in range(220)]
    assert events(out) == [(79, "context_80")]


def test_snapshots_and_forks_go_on_with_a_refresh(made: Checkpoints) -> None:
    """Before it, while the new context is read, and after."""
    shape = SHAPES["hibiki"]
    for options in (SAMPLED, {**SAMPLED, **GUIDED}):
        options = {**options, "context_range": 50, "context_keep": 20}
        with moshi_c.load(made.lm("hibiki"), max_sessions=3, progress=False) as model:
            call, ends = call_of(model, shape, 100, **options)
            with Session(
                model, seed=5, keep_logits=True, context_policy="refresh", **options
            ) as session:
                done = 0
                for stop in (10, ends[0] - 3, ends[0] - 1, ends[0], ends[0] + 1, ends[1] - 2):
                    step_all(session, call.user, done, stop)
                    done = stop
                    data = session.snapshot()
                    with session.fork() as fork, Session.from_snapshot(model, data) as restored:
                        for other in (fork, restored):
                            assert step_all(other, call.user, stop) == call.seen[stop:]


def test_neighbours_do_not_change_when_it_comes_or_what_it_is(made: Checkpoints) -> None:
    shape = SHAPES["moshi"]
    span = {"context_range": 50, "context_keep": 20, **SAMPLED}
    stop = threading.Event()

    def talk(session: Session) -> None:
        silence = np.zeros(shape.user_q, np.int32)
        while not stop.is_set():
            session.step_codes(silence, decode=False)

    with moshi_c.load(made.lm("moshi"), max_sessions=4, progress=False) as model:
        call, _ = call_of(model, shape, 120, **span)
        neighbours = [
            Session(model, context_policy="refresh", context_range=50, context_keep=20),
            Session(model),
        ]
        threads = [threading.Thread(target=talk, args=(session,)) for session in neighbours]
        for thread in threads:
            thread.start()
        try:
            with Session(
                model, seed=5, keep_logits=True, context_policy="refresh", **span
            ) as session:
                again = step_all(session, call.user)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert again == call.seen
        for session in neighbours:
            session.close()


def test_reset_forgets_a_refresh_under_way() -> None:
    silence = np.zeros(FRAME, np.float32)
    with moshi_c.load() as model, Session(model, seed=1, context_policy="refresh") as session:
        first = [session.step(silence) for _ in range(83)]
        session.reset()
        again = [session.step(silence) for _ in range(90)]
        assert events(again)[: len(events(first))] == events(first)
        assert events(again)[-1] == (80 + STEPS, "refresh_end")


def test_frames_given_to_the_end_of_the_range_are_refreshed_at_once(made: Checkpoints) -> None:
    shape = SHAPES["moshi"]
    span = {"context_range": 60, "context_keep": 20}
    with moshi_c.load(made.lm("moshi"), progress=False) as model:
        call = held(model, shape, 200, **GREEDY)
        with Session(
            model, seed=5, keep_logits=True, context_policy="refresh", **GREEDY, **span
        ) as session:
            call.prefill(session, 0, 150)
            refreshed = step_all(session, call.user, 150, 170)
        with Session(model, seed=5, keep_logits=True, **GREEDY) as session:
            call.prefill(session, 130, 150)
            fresh = step_all(session, call.user, 150, 170)
    assert [row[2:5] + row[6:] for row in refreshed] == [row[2:5] + row[6:] for row in fresh]


def test_memory_is_flat_over_many_refreshes(made: Checkpoints) -> None:
    shape = SHAPES["moshi"]
    user = users_codes(shape, 60)
    most = []
    with (
        moshi_c.load(made.lm("moshi"), progress=False) as model,
        Session(model, context_policy="refresh", context_range=50, context_keep=20) as session,
    ):
        for _ in range(6):
            used = []
            for codes in user.T:
                session.step_codes(codes, decode=False)
                used.append(model.memory.used)
            most.append(max(used))
    assert max(most[2:]) <= max(most[:2])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"context_policy": "forget"}, "context_policy is 'forget'; expected 'ring' or 'refresh'"),
        ({"context_range": 10}, "context_range is 10 and context_keep 5 of a context of 100"),
        ({"context_keep": 90}, "context_range is 100 and context_keep 90"),
        ({"context_range": 1000, "context_keep": 98}, "expected a context_keep that leaves"),
        ({"context_keep": -1}, "context_keep -1, expected 0 or more"),
    ],
)
def test_a_span_that_leaves_no_call_is_refused(options: dict[str, Any], match: str) -> None:
    with moshi_c.load() as model, pytest.raises(ValueError, match=match):
        Session(model, **{"context_policy": "refresh", **options})


def test_a_restored_ring_tells_of_the_same_range() -> None:
    silence = np.zeros(FRAME, np.float32)
    with moshi_c.load() as model, Session(model, context_range=20) as session:
        for _ in range(10):
            session.step(silence, decode=False)
        with Session.from_snapshot(model, session.snapshot()) as again:
            events = [again.step(silence, decode=False).event for _ in range(10)]
    assert events == [None] * 5 + ["context_80"] + [None] * 4


def damaged(data: bytes, name: str, change: Any) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    first, last = header[name]["data_offsets"]
    values: NDArray[np.int32] = np.frombuffer(
        data[8 + size + first : 8 + size + last], "<i4"
    ).copy()
    change(values)
    return data[: 8 + size + first] + values.tobytes() + data[8 + size + last :]


@pytest.mark.parametrize(
    ("name", "index", "value", "match"),
    [
        ("session.refresh", 0, -5, "context_range is -5"),
        ("session.refresh", 1, 99, "context_keep 99"),
        ("session.refresh", 0, 0, "a range of 0"),
        ("session.refresh", 1, 0, "0 frames to keep"),
        ("session.refresh", 2, -1, "-1 rows"),
        ("session.refresh", 2, 1000, "session.history is I32"),
        ("session.refresh", 2, 7, "session.history is I32"),
        ("session.refresh", 3, 1000, "1000 begun"),
        ("session.refresh", 3, -1, "-1 begun"),
        ("session.refresh", 4, 99, "99 left"),
        ("session.refresh", 5, 99, "99 quiet"),
        ("session.history", 0, 401, "session.history has 401 in stream 0, expected -1 to 400"),
        ("session.history", 5, -2, "session.history has -2 in stream 5, expected -1 to 512"),
    ],
)
def test_a_lie_about_a_refresh_is_refused_by_its_name(
    name: str, index: int, value: int, match: str
) -> None:
    silence = np.zeros(FRAME, np.float32)
    with moshi_c.load() as model, Session(model, context_policy="refresh") as session:
        for _ in range(20):
            session.step(silence, decode=False)
        data = damaged(session.snapshot(), name, lambda values: values.__setitem__(index, value))
        with pytest.raises(CheckpointError, match=match):
            Session.from_snapshot(model, data)
