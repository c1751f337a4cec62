"""The clock of a live call, on times that are made up: what is stepped, when, and what is not."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest

from moshi_c.server.clock import FOLLOW, KEPT, LEAD, SILENCE, STEP, WAIT, WINDOW, Clock

pytestmark = pytest.mark.python

FRAME = 0.08
TOLERANCE = 0.2
MOST = 25  # frames that may wait


@dataclass
class Run:
    """What a call did: when each frame was stepped and what it was, and how long sound waited."""

    steps: list[tuple[float, int | None]] = field(default_factory=list)  # time, frame or silence
    waits: list[float] = field(default_factory=list)
    dropped: int = 0

    @property
    def silent(self) -> list[float]:
        return [time for time, frame in self.steps if frame is None]

    @property
    def heard(self) -> list[int]:
        return [frame for _, frame in self.steps if frame is not None]


def run(arrivals: list[float], until: float | None = None, step: float = 0.002) -> Run:
    """A call whose frames arrive at these times, each step taking `step` seconds."""
    clock, result = Clock(FRAME, TOLERANCE), Run()
    coming = list(enumerate(arrivals))
    queue: list[tuple[int, float]] = []
    now = 0.0
    end = arrivals[-1] + 0.1 if until is None else until
    while now < end:
        while coming and coming[0][1] <= now:
            queue.append(coming.pop(0))
            old = max(clock.too_old(len(queue)), len(queue) - MOST)
            result.dropped += old
            del queue[:old]
        what, at = clock.decide(now, len(queue))
        if what == STEP:
            frame, came = queue.pop(0)
            lag = clock.stepped(came, len(queue))
            result.dropped += lag
            del queue[:lag]
            result.steps.append((now, frame))
            result.waits.append(now - came)
            now += step
        elif what == SILENCE:
            clock.silent()
            result.steps.append((now, None))
            now += step
        else:
            now = min(at, coming[0][1] if coming else at, end)
    return result


def steady(count: int, start: float = 0.0, every: float = FRAME) -> list[float]:
    return [start + i * every for i in range(count)]


def test_a_steady_caller_loses_nothing_and_never_waits() -> None:
    call = run(steady(500))
    assert call.heard == list(range(500))
    assert not call.silent
    assert max(call.waits) < 0.001


def test_jitter_within_the_tolerance_changes_nothing() -> None:
    times = steady(500)
    for i in range(0, 500, 7):
        times[i] += 0.15
    call = run([max(times[: i + 1]) for i in range(500)])
    assert call.heard == list(range(500))
    assert not call.silent


def test_sound_that_comes_every_half_second_is_stepped_whole() -> None:
    times = [i // 6 * 6 * FRAME for i in range(600)]
    call = run(times, until=times[-1] + 1)
    assert call.heard == list(range(600))
    assert [time for time in call.silent if time < times[-1]] == []


def test_who_has_not_begun_gets_no_silence() -> None:
    call = run(steady(10, start=30.0))
    assert call.heard == list(range(10))
    assert not call.silent


def test_fault_14_a_stall_is_silence_on_the_clock_and_its_burst_is_dropped() -> None:
    """Frames 50 to 86 are held up for 3 s by the network, and come all at once."""
    times = steady(200)
    times[50:87] = [times[87]] * 37
    call = run(times)
    gaps = [b - a for (a, _), (b, _) in pairwise(call.steps)]
    assert max(gaps) < FRAME + TOLERANCE + 0.01, "the model stood still"
    assert 33 <= len(call.silent) <= 37
    assert call.dropped >= 37 - len(call.silent) + 30 - KEPT
    # what is heard afterwards is what is said then
    after = [wait for wait, (_, frame) in zip(call.waits, reals(call), strict=True) if frame > 95]
    assert max(after) < 0.001
    assert call.heard[-1] == 199
    # as many frames out as time has passed, give or take what may be ahead
    assert abs(len(call.steps) - 200) <= 1 + LEAD / FRAME


def reals(call: Run) -> list[tuple[float, int]]:
    return [(time, frame) for time, frame in call.steps if frame is not None]


def test_a_microphone_that_was_muted_comes_back_whole() -> None:
    for every in (1, 2):  # frames in a message
        back = [10.03 + i // every * every * FRAME for i in range(100)]
        call = run(steady(20) + back)
        assert call.heard == list(range(120))
        assert call.dropped == 0
        assert len(call.silent) > 100


def test_fault_13_ten_times_too_fast_is_stepped_in_real_time() -> None:
    call = run(steady(2000, every=FRAME / 10), until=16.0)
    assert len(call.steps) <= (16.0 * (1 + FOLLOW) + LEAD) / FRAME + 2
    assert not call.silent
    assert call.dropped > 1500


def test_fault_14_a_sound_card_that_drifts_gathers_no_lag_and_no_gaps() -> None:
    for drift in (1.001, 0.999, 1.01, 0.99):
        call = run(steady(20000, every=FRAME * drift))
        assert call.heard == list(range(20000)), drift
        assert not call.silent, drift
        assert max(call.waits[2 * WINDOW :]) < 0.001, drift


def test_a_start_in_a_burst_leaves_no_lag() -> None:
    """A second of sound at once, as from a microphone that ran before the call."""
    call = run([0.0] * 12 + steady(300, start=FRAME))
    assert max(call.waits[100:]) < 0.001
    assert call.heard[-1] == 311


def test_fault_23_a_slow_server_catches_up_and_drops_what_would_stay_behind() -> None:
    """Steps of 100 ms: a fifth has to go, and what is heard is never older than 2 s and a bit."""
    call = run(steady(1000), step=0.1)
    assert call.dropped > 100
    assert not call.silent
    assert max(call.waits) < (MOST + 1) * FRAME + 0.2


def test_a_server_that_was_held_up_looks_before_it_puts_in_silence() -> None:
    clock = Clock(FRAME, TOLERANCE)
    assert clock.decide(0.0, 1)[0] == STEP
    clock.stepped(0.0, 0)
    clock.was_held_up(5.0)
    assert clock.decide(5.0, 0)[0] != SILENCE
    assert clock.decide(5.0 + TOLERANCE, 0)[0] == SILENCE


def test_a_model_that_has_something_to_say_hears_silence_until_the_first_frame() -> None:
    clock = Clock(FRAME, TOLERANCE)
    assert clock.decide(1.0, 0) == (WAIT, float("inf"))
    clock.begin(1.0)
    steps = []
    for _ in range(10):
        what, at = clock.decide(steps[-1] if steps else 1.0, 0)
        assert what == WAIT and clock.decide(at, 0)[0] == SILENCE
        clock.silent()
        clock.begin(at)  # changes nothing once it runs
        steps.append(at)
    assert np.allclose(np.diff([1.0 + TOLERANCE - FRAME, *steps]), FRAME)
    assert clock.decide(steps[-1] + 0.01, 1)[0] == STEP
