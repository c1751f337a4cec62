"""What company costs on the CPU: sessions in one step, a prompt in one prefill, paced callers.

--parts batch: the 7B's widths cut to 8 temporal layers, bf16, two threads, random weights. Eight
  sessions in one batched step against one session, in turn; beside it upstream's PyTorch with
  batches of eight and of one, where the memory allows. Checked first: a session in company gives
  the tokens that it gives alone.
--parts prefill: the same model reads a prompt of 500 frames in one prefill. The rate is that of the
  multiply-adds of its matrices, over the most that this machine makes with vectors of f32,
  measured around it; tile registers (AMX) can pass that. Checked first: a session goes
  on as one that was stepped.
--parts paced: eight sessions of the package's model, each fed from a thread of its own at 12.5
  frames a second. A frame is late when its answer is not there 80 ms after it was due.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np

THREADS = 2
os.environ["MOSHI_C_THREADS"] = str(THREADS)

import step  # noqa: E402
import torch  # noqa: E402
from moshi.models import LMGen, loaders  # noqa: E402

import moshi_c  # noqa: E402
from moshi_c import _core  # noqa: E402

PARTS = ("paced", "prefill", "batch")
SESSIONS = 8
PROMPT = 500  # frames
GREEDY = {"text_temperature": 0.0, "audio_temperature": 0.0}
LATE = 0.080  # seconds
CALLS = 3  # of a side in a block
CONTEXT = 256  # of the batches: upstream reads a whole ring in each step


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def timed(once: Callable[[], Any]) -> float:
    start = time.perf_counter()
    once()
    return time.perf_counter() - start


def step_codes(sessions: list[moshi_c.Session], codes: np.ndarray) -> list[Any]:
    """One step of all of them by codes [sessions, K], in one call of the core."""
    return _core.step_many([session._core for session in sessions], list(codes), False, True)


def check_company(model: moshi_c.Model, user: np.ndarray) -> None:
    """Exits unless each of eight sessions says what the first one says alone."""
    alone = moshi_c.Session(model, seed=0, **GREEDY)
    expected = [step_codes([alone], codes[None])[0][2:4] for codes in user[:4]]
    alone.close()
    together = [moshi_c.Session(model, seed=0, **GREEDY) for _ in range(SESSIONS)]
    for codes, row in zip(user[:4], expected, strict=True):
        for frame in step_codes(together, np.repeat(codes[None], SESSIONS, 0)):
            if frame[2] != row[0] or not np.array_equal(frame[3], row[1]):
                raise SystemExit("a session in company does not say what it says alone")
    for session in together:
        session.close()


def batch(folder: Path, blocks: int) -> dict[str, Any]:
    path = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text()) | {"context": CONTEXT}
    settings: dict[str, Any] = {"config": folder / "config.json", "context": CONTEXT}
    user = np.random.default_rng(3).integers(0, 2048, (256, SESSIONS, 8)).astype(np.int32)
    with moshi_c.load(path, max_sessions=1 + SESSIONS, **settings) as model:
        check_company(model, user[:, 0])
        sessions = [moshi_c.Session(model, seed=i, **GREEDY) for i in range(1 + SESSIONS)]

        def ours(count: int) -> Iterator[Callable[[], None]]:
            group, index = sessions[:1] if count == 1 else sessions[1:], itertools.count()
            yield lambda: step_codes(group, user[next(index) % 256, :count])

        sides = {"one": (ours, 1), "eight": (ours, SESSIONS)}
        with_torch = available_bytes() > 1.4 * path.stat().st_size
        if with_torch:
            lm = loaders.get_moshi_lm(path, lm_kwargs=dict(config), dtype=torch.bfloat16).eval()

            def theirs(count: int) -> Iterator[Callable[[], None]]:
                generator = LMGen(lm, use_sampling=False)
                codes = torch.from_numpy(user[0, :count].astype(np.int64))[:, :, None]
                with generator.streaming(count):
                    yield lambda: generator.step(codes)

            sides |= {"pytorch_one": (theirs, 1), "pytorch_eight": (theirs, SESSIONS)}
        times: dict[str, list[list[float]]] = {name: [] for name in sides}
        for _ in range(blocks):
            for name, (side, count) in sides.items():
                with contextlib.contextmanager(side)(count) as once:
                    once()
                    times[name].append([timed(once) for _ in range(CALLS)])
        for session in sessions:
            session.close()
    result = common.summary(times)
    if not with_torch:
        result["pytorch"] = "left out: the memory does not hold its copy of the weights"
    for name in ("", "pytorch_")[: 1 + with_torch]:
        medians = [np.median(times[name + side]) for side in ("eight", "one")]
        result[f"{name}eight_over_{name}one"] = round(float(medians[0] / medians[1]), 3)
    return result


def check_prefill(model: moshi_c.Model, given: tuple[np.ndarray, ...]) -> None:
    """Exits unless the logits after a few given frames are those after stepping them, but for the
    codes of the late streams, which a step forces all or none of."""
    text, codes, user = (array[..., :6] for array in given)
    found = []
    for stepped in (False, True):
        with moshi_c.Session(model, seed=1, keep_logits=True, **GREEDY) as session:
            if stepped:
                for t in range(5):
                    late = codes[1:, max(t - 1, 0)]
                    session._force_next(int(text[t]), np.array([codes[0, t], *late], np.int32))
                    session.step_codes(user[:, t], decode=False)
            else:
                session.prefill(text[:5], codes[:, :5], user[:, :5])
            session._force_next(int(text[5]), np.array([codes[0, 5], *codes[1:, 4]], np.int32))
            session.step_codes(user[:, 5], decode=False)
            found.append(session.logits[0].tobytes())
    if found[0] != found[1]:
        raise SystemExit("a prefill does not leave the session where stepping does")


def prefill(folder: Path, frames: int, repeats: int) -> dict[str, Any]:
    rng = np.random.default_rng(4)
    text = rng.integers(4, 32000, frames).astype(np.int32)
    codes, user = rng.integers(0, 2048, (2, 8, frames)).astype(np.int32)
    path = folder / "model.safetensors"
    with moshi_c.load(path, config=folder / "config.json", max_sessions=1) as model:
        check_prefill(model, (text, codes, user))
        flops = 2 * frames * step.LAYERS * 205_520_896
        # Scores and sums of values, over the keys that each frame sees.
        flops += 4 * 4096 * step.LAYERS * frames * (frames + 1) // 2
        shares, seconds, rates = [], [], []
        with moshi_c.Session(model, seed=1, **GREEDY) as session:
            for _ in range(repeats):
                session.reset()
                before = common.multiply_rate(THREADS)
                start = time.perf_counter()
                session.prefill(text, codes, user)
                seconds.append(time.perf_counter() - start)
                rates.append(max(before, common.multiply_rate(THREADS)))
                shares.append(flops / seconds[-1] / 1e9 / rates[-1])
            stepped = []
            for t in range(5):
                start = time.perf_counter()
                session.step_codes(user[:, t], decode=False)
                stepped.append(time.perf_counter() - start)
            one = float(np.median(stepped))
    return {
        "frames": frames,
        "p50_s": round(float(np.median(seconds)), 3),
        "seconds": [round(value, 3) for value in seconds],
        "gflop": round(flops / 1e9, 1),
        "multiply_rate_gflop_s": [round(value, 1) for value in rates],
        "share_of_multiply_rate": round(float(np.median(shares)), 3),
        "shares": [round(value, 3) for value in shares],
        "steps_would_take_s": round(frames * one, 1),
    }


def paced(seconds: float) -> dict[str, Any]:
    """Every session from its own thread, all of them in step with one clock, at moments of their
    own within a frame's time."""
    frames = int(seconds * 12.5)
    lags: list[list[float]] = [[] for _ in range(SESSIONS)]
    with moshi_c.load(max_sessions=SESSIONS) as model:
        begin = time.perf_counter() + 1.0

        def talk(who: int) -> None:
            rng = np.random.default_rng(who)
            sound = (0.05 * rng.standard_normal((64, model.frame_size))).astype(np.float32)
            with moshi_c.Session(model, seed=who) as session:
                for index in range(frames):
                    due = begin + (index + who / SESSIONS) * LATE
                    if (wait := due - time.perf_counter()) > 0:
                        time.sleep(wait)
                    session.step(sound[index % 64])
                    lags[who].append(time.perf_counter() - due)

        threads = [threading.Thread(target=talk, args=(who,)) for who in range(SESSIONS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = model.stats
    every = np.concatenate([np.array(row) for row in lags]) * 1e3
    return {
        "sessions": SESSIONS,
        "seconds": seconds,
        "frames": int(every.size),
        "ticks": stats.ticks,
        "p50_ms": round(float(np.percentile(every, 50)), 2),
        "p99_ms": round(float(np.percentile(every, 99)), 2),
        "max_ms": round(float(every.max()), 2),
        "late": int((every > 1e3 * LATE).sum()),
    }


def main() -> None:
    parser = common.arguments(__doc__, "company")
    parser.add_argument("--parts", default=",".join(PARTS), help="the others' results stay")
    parser.add_argument("--layers", type=int, default=8, help="of the cut")
    parser.add_argument("--frames", type=int, default=PROMPT, help="of the prompt")
    parser.add_argument("--repeats", type=int, default=3, help="of the prefill")
    parser.add_argument("--seconds", type=float, default=600, help="of the paced calls")
    options = parser.parse_args()
    parts = options.parts.split(",")
    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(False)
    step.LAYERS = options.layers
    result: dict[str, Any] = {"threads": THREADS, "layers": options.layers, "dtype": "bf16"}
    if options.out.exists():
        before = json.loads(options.out.read_text("utf-8"))
        result |= {part: before[part] for part in PARTS if part in before}
    when = {"date": datetime.date.today().isoformat(), "commit": common.commit()}
    if "paced" in parts:
        result["paced"] = when | paced(options.seconds)
        print(result["paced"], flush=True)
    if "batch" in parts or "prefill" in parts:
        with tempfile.TemporaryDirectory() as name:
            folder = step.make(Path(name))
            if "prefill" in parts:
                result["prefill"] = when | prefill(folder, options.frames, options.repeats)
                print(result["prefill"], flush=True)
            if "batch" in parts:
                result["batch"] = when | batch(folder, options.blocks)
    common.report("company", options.out, result)


if __name__ == "__main__":
    main()
