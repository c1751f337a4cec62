"""What is done to a process that holds open sessions: Ctrl-C at any moment, fork, the end of the
interpreter. Run as a fresh process: `hostile_process.py SCENARIO`; its exit code tells.
"""

from __future__ import annotations

import asyncio
import atexit
import faulthandler
import functools
import gc
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import moshi_c

FRAME = 1920
SILENCE = np.zeros(FRAME, np.float32)


def voice(frames: int) -> np.ndarray:
    rng = np.random.default_rng(5)
    return (0.1 * rng.standard_normal(frames * FRAME)).astype(np.float32)


def codes_of(session: moshi_c.Session, frames: int) -> list[bytes]:
    """What a session makes of the same sound."""
    made = [session.step(frame) for frame in voice(frames).reshape(-1, FRAME)]
    return [b"" if frame.codes is None else frame.codes.tobytes() for frame in made]


# ---- Ctrl-C ------------------------------------------------------------------------------------


class Interrupts:
    """Ctrl-C after a random time."""

    def __init__(self, most: float) -> None:
        self._most = most
        self._random = random.Random(3)
        self.count = 0
        signal.signal(signal.SIGALRM, self._interrupt)

    def _interrupt(self, *_: Any) -> None:
        self.count += 1
        raise KeyboardInterrupt

    def during(self, call: Callable[[], Any]) -> None:
        """Calls it; at most one interrupt, which goes no further wherever it falls."""
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, self._random.uniform(1e-5, self._most))
                call()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                time.sleep(0)  # what came by now is raised here
        except KeyboardInterrupt:
            pass


def interrupted_steps() -> None:
    """Each step happened or did not, and the next one works."""
    with moshi_c.load(threads=1) as model, moshi_c.Session(model, seed=1) as session:
        expected = codes_of(session, 12)
        start = time.perf_counter()
        session.push(voice(10))
        interrupts = Interrupts((time.perf_counter() - start) / 5)
        session.reset()
        last = -1
        for _ in range(2000):
            interrupts.during(lambda: session.step(SILENCE))
            index = session.step(SILENCE).index
            assert index - last in (1, 2), (last, index)
            last = index
            if interrupts.count > 20:
                break
        assert interrupts.count > 5, interrupts.count
        session.reset()
        assert codes_of(session, 12) == expected


def interrupted_pushes() -> None:
    """No frame is stepped twice, at the model's rate and at another."""
    for rate in (24000, 16000):
        with (
            moshi_c.load(threads=1) as model,
            moshi_c.Session(model, seed=1, sample_rate=rate) as session,
        ):
            piece = np.zeros(3 * session.frame_size, np.float32)
            start = time.perf_counter()
            session.push(piece)
            session.push(piece)
            interrupts = Interrupts(time.perf_counter() - start)
            session.reset()
            pushed = 0
            for _ in range(2000):
                pushed += 3
                interrupts.during(functools.partial(session.push, piece))
                if interrupts.count > 5:
                    break
            frames = session.flush()
            assert frames[-1].index < pushed + 1 + model.max_delay, (frames[-1].index, pushed)
            assert interrupts.count > 5, interrupts.count


def interrupted_runs() -> None:
    """A session that was interrupted in a recording is whole after a reset."""
    with moshi_c.load(threads=1) as model, moshi_c.Session(model, seed=1) as session:
        expected = codes_of(session, 8)
        start = time.perf_counter()
        session.run(voice(5))
        interrupts = Interrupts(time.perf_counter() - start)
        for _ in range(200):
            interrupts.during(lambda: session.run(voice(5)))
            session.reset()
            if interrupts.count > 5:
                break
        assert interrupts.count > 5, interrupts.count
        assert codes_of(session, 8) == expected


def interrupted_loads() -> None:
    """What an interrupted load leaves behind is freed, and the next one works."""
    moshi_c.load().close()
    start = time.perf_counter()
    moshi_c.load().close()
    interrupts = Interrupts(time.perf_counter() - start)
    for _ in range(200):
        interrupts.during(lambda: moshi_c.load().close())
        if interrupts.count > 5:
            break
    assert interrupts.count > 5, interrupts.count
    with moshi_c.load() as model, moshi_c.Session(model, seed=1) as session:
        assert len(codes_of(session, 3)) == 3


# ---- fork --------------------------------------------------------------------------------------


def _in_child(body: Callable[[], None]) -> None:
    """Runs `body` in a forked child, whose failure or hanging is ours."""
    pid = os.fork()
    if pid == 0:
        code = 1
        faulthandler.dump_traceback_later(30, exit=True)
        try:
            body()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


def _refused(call: Callable[[], Any]) -> None:
    try:
        call()
    except moshi_c.SessionError as error:
        assert "forked from it" in str(error), error
        assert "expected a model loaded in this process" in str(error), error
    else:
        raise AssertionError("a call on what the parent made was not refused")


def forked() -> None:
    """Every call on what the parent made is refused at once; a model of the child's own works, and
    the parent's conversation goes on."""
    model = moshi_c.load()
    session = moshi_c.Session(model, seed=1)
    stream = model.mimi.stream()
    expected = codes_of(session, 4)
    session.reset()
    session.step(voice(4)[:FRAME])
    snapshot, after = session.snapshot(), expected[1:]

    def child() -> None:
        for call in (
            lambda: session.step(SILENCE),
            lambda: session.push(SILENCE),
            lambda: session.push(SILENCE[:5]),
            lambda: session.run(SILENCE),
            lambda: session.step_codes([0] * 8),
            lambda: moshi_c.step_many([session], [SILENCE]),
            lambda: session.say("hello"),
            lambda: session.saying,
            lambda: session.logits,
            session.flush,
            session.reset,
            session.snapshot,
            session.fork,
            lambda: asyncio.run(session.astep(SILENCE)),
            lambda: moshi_c.Session.from_snapshot(model, snapshot),
            lambda: moshi_c.Session(model),
            lambda: model.memory,
            lambda: model.stats,
            lambda: model.mimi.encode(SILENCE),
            lambda: model.mimi.decode([[0]] * 8),
            lambda: model.mimi.stream(),
            lambda: stream.encode(SILENCE),
            lambda: stream.decode([0] * 8),
            stream.reset,
            stream.snapshot,
            lambda: stream.restore(b"x"),
        ):
            _refused(call)
        with moshi_c.load() as own, moshi_c.Session(own, seed=1) as fresh:
            assert codes_of(fresh, 4) == expected
            with moshi_c.Session.from_snapshot(own, snapshot) as moved:
                rest = [moved.step(frame) for frame in voice(4).reshape(-1, FRAME)[1:]]
            assert [frame.codes.tobytes() for frame in rest if frame.codes is not None] == after
        session.close()
        stream.close()
        model.close()
        assert session.closed
        assert model.closed
        gc.collect()

    _in_child(child)
    rest = [session.step(frame) for frame in voice(4).reshape(-1, FRAME)[1:]]
    assert [frame.codes.tobytes() for frame in rest if frame.codes is not None] == after
    with model:
        pass


def forked_during_a_step() -> None:
    """Threads that the child does not have hold the locks and flags of what they were in."""
    model = moshi_c.load()
    session = moshi_c.Session(model, seed=1)
    done = threading.Event()

    def talk() -> None:
        while not done.is_set():
            session.step(SILENCE)
            model.mimi.encode(SILENCE)

    thread = threading.Thread(target=talk)
    thread.start()
    for _ in range(10):
        time.sleep(0.01)

        def child() -> None:
            _refused(lambda: session.step(SILENCE))
            _refused(lambda: model.memory)
            _refused(lambda: moshi_c.Session(model))
            with model:
                _refused(lambda: session.push(SILENCE))
            assert session.closed
            assert model.closed

        _in_child(child)
    done.set()
    thread.join()
    session.close()
    model.close()


def _worker(model: moshi_c.Model, answers: Any) -> None:
    try:
        moshi_c.Session(model)
    except moshi_c.SessionError as error:
        answers.put(str(error))
    with moshi_c.load() as own, moshi_c.Session(own, seed=1) as session:
        answers.put(codes_of(session, 3))


def forked_by_multiprocessing() -> None:
    """A worker inherits the model, is told so, loads its own, and ends through all its exits."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    with moshi_c.load() as model, moshi_c.Session(model, seed=1) as session:
        expected = codes_of(session, 3)
        process = context.Process(target=_worker, args=(model, answers))
        process.start()
        assert "forked from it" in answers.get()
        assert answers.get() == expected
        process.join(30)
        assert process.exitcode == 0


# ---- the end of the interpreter ----------------------------------------------------------------

keep: list[Any] = []


def exit_with_open_sessions() -> None:
    model = moshi_c.load()
    keep.extend([moshi_c.Session(model), model.mimi.stream(), model, moshi_c.load_mimi()])
    keep.append(keep)
    keep[0].step(SILENCE)


def exit_during_a_step() -> None:
    """Daemon threads are inside steps and whole files when the interpreter ends."""
    model = moshi_c.load()
    keep.append(model)
    started = threading.Semaphore(0)

    def talk(call: Callable[[], Any]) -> None:
        call()
        started.release()
        while True:
            call()

    sessions = [moshi_c.Session(model) for _ in range(2)]
    long = np.zeros(50 * FRAME, np.float32)
    for call in (
        lambda: sessions[0].step(SILENCE),
        lambda: sessions[1].run(long),
        lambda: model.mimi.encode(long),
    ):
        threading.Thread(target=talk, args=(call,), daemon=True).start()
        started.acquire()


def exit_with_a_last_word() -> None:
    """A step from an exit handler, after the main module has ended."""
    session = moshi_c.Session(moshi_c.load(), seed=1)
    session.step(SILENCE)
    atexit.register(lambda: print(session.step(SILENCE).index))


def exit_by_an_exception() -> None:
    with moshi_c.load() as model:
        keep.append(moshi_c.Session(model))
        keep[0].step(SILENCE)
        raise SystemExit(7)


if __name__ == "__main__":
    faulthandler.enable()
    globals()[sys.argv[1]]()
