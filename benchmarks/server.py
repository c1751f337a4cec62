"""`moshi-c serve` under load, with the small model: eight callers at once, and many short calls.

The server is a process of its own, the callers are two others. A caller sends a frame of 80 ms
every 80 ms; the time of an answer runs from when the frame's last byte was given to the system to
when the answer's first byte came, on the caller's clock. An answer after 80 ms is late. Other
figures have the names of vLLM-Omni's load driver. From mouth to ear there is more, which is listed
apart: the frame has to be spoken before it can be sent, and the model answers some frames later.

Every caller's sound is compared with `Session.run` first.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import common
import numpy as np

PROCESSES = 2
FRAME_MS = 80.0
UNDERRUN_MS = 100.0  # a gap between two answers that a listener would hear


class Server:
    """The command, with its memory and descriptors."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moshi_c", "serve", "--port", "0", *arguments],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        self.url = ""
        for line in self.process.stderr:
            if match := re.search(r"listening on (\S+),", line):
                self.url = match[1]
                break
        # its log goes on, and must be read
        self.log = asyncio.create_task(asyncio.to_thread(self.process.stderr.read))

    def usage(self) -> dict[str, float]:
        folder = Path("/proc") / str(self.process.pid)
        resident = re.search(r"VmRSS:\s+(\d+)", (folder / "status").read_text())
        assert resident is not None
        return {
            "memory_mb": round(int(resident[1]) / 1024, 2),
            "descriptors": len(list((folder / "fd").iterdir())),
        }

    async def metrics(self) -> dict[str, float]:
        async with aiohttp.ClientSession() as http, http.get(self.url + "/metrics") as response:
            lines = (await response.text()).splitlines()
        return {
            name: float(value)
            for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
        }

    async def stop(self) -> int:
        self.process.terminate()
        await self.log
        return self.process.wait()


async def load(url: str, callers: int, frames: int, seed: int) -> list[dict[str, Any]]:
    """Callers at random phases; of each the times of its frames and answers."""
    import callers as calls
    from test_api import sound

    rng = np.random.default_rng(seed)

    async def one(number: int) -> dict[str, Any]:
        await asyncio.sleep(float(rng.uniform(0, 1)))
        voice = sound(frames, seed=number)
        async with calls.calling(url, seed=1) as caller:
            await caller.ready()
            begin = time.monotonic()
            sent = []
            for frame in range(frames):
                await asyncio.sleep(max(0.0, begin + frame * FRAME_MS / 1e3 - time.monotonic()))
                await caller.send(voice[frame * calls.FRAME : (frame + 1) * calls.FRAME])
                sent.append(time.monotonic())
            await caller.until(lambda: len(caller.heard) >= frames)
            return {"begin": begin, "sent": sent, "answered": caller.times[:frames]}

    return list(await asyncio.gather(*[one(seed * callers + i) for i in range(callers)]))


def figures(runs: list[dict[str, Any]], frames: int) -> dict[str, Any]:
    """What the callers saw."""

    def spread(values: Any) -> dict[str, float]:
        p50, p99 = np.percentile(values, [50, 99])
        return {
            "p50": round(float(p50), 3),
            "p99": round(float(p99), 3),
            "max": round(float(np.max(values)), 3),
        }

    sent = np.array([run["sent"] for run in runs]) * 1e3
    answered = np.array([run["answered"] for run in runs]) * 1e3
    begin = np.array([run["begin"] for run in runs])[:, None] * 1e3
    latency = answered - sent
    gaps = np.diff(answered, axis=1)
    underruns = gaps > UNDERRUN_MS
    return {
        "frames": int(latency.size),
        "answer_ms": spread(latency),
        "late": int(np.sum(latency > FRAME_MS)),
        "client_audio_packet_interval_ms": spread(gaps),
        "client_first_audio_after_stream_start_ms": spread(answered[:, 0] - begin[:, 0]),
        "client_stream_rtf": spread((answered[:, -1] - begin[:, 0]) / (frames * FRAME_MS)),
        "client_send_lateness_ms": spread(sent - begin - np.arange(frames) * FRAME_MS),
        "frame_deficit": int(len(runs) * frames - latency.size),
        "frame_coverage_ratio": round(latency.size / (len(runs) * frames), 6),
        "audio_underrun_event_count": int(np.sum(underruns)),
        "audio_underrun_s": round(float(np.sum((gaps - FRAME_MS)[underruns])) / 1e3, 3),
    }


async def parity(url: str) -> None:
    """A call gives what the session gives."""
    import callers as calls
    from test_api import sound

    import moshi_c

    voice = sound(30)
    with moshi_c.load(progress=False) as model, moshi_c.Session(model, seed=1) as session:
        expected = session.run(voice).pcm
    caller = await calls.converse(url, voice, float("inf"), live=0, seed=1)
    assert expected is not None and caller.pcm.tobytes() == expected.tobytes()


async def short_calls(server: Server, count: int) -> dict[str, Any]:
    """Calls of a frame, four at a time; what the server holds before and after."""
    import callers as calls
    from test_api import sound

    voice = sound(1)

    async def some(number: int) -> None:
        async def row(length: int) -> None:
            for _ in range(length):
                caller = await calls.converse(server.url, voice, float("inf"), live=0)
                assert caller.code == 1000

        await asyncio.gather(*[row(number // 4) for _ in range(4)])
        while (await server.metrics())["moshi_open_channels"]:
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)

    await some(count // 5)
    before = server.usage()
    begin = time.monotonic()
    await some(count)
    return {
        "calls": count,
        "seconds": round(time.monotonic() - begin, 2),
        "before": before,
        "after": server.usage(),
    }


async def measure(options: Any) -> dict[str, Any]:
    import moshi_c

    extra = ["--threads", str(options.threads)] if options.threads else []
    server = Server("--sessions", str(options.callers), *extra)
    await parity(server.url)
    frames = round(options.seconds * 1e3 / FRAME_MS)
    before = await server.metrics()
    processes = []
    for number in range(PROCESSES):
        arguments = [server.url, str(options.callers // PROCESSES), str(frames), str(number)]
        processes.append(
            await asyncio.create_subprocess_exec(
                sys.executable, __file__, "--load", *arguments, stdout=asyncio.subprocess.PIPE
            )
        )
    texts = [(await process.communicate())[0] for process in processes]
    runs = [run for text in texts for run in json.loads(text)]
    after = await server.metrics()
    seen = figures(runs, frames)
    steps = after["moshi_answer_duration_count"] - before["moshi_answer_duration_count"]
    spent = after["moshi_answer_duration_sum"] - before["moshi_answer_duration_sum"]
    short = await short_calls(server, options.calls)
    assert await server.stop() == 0
    with moshi_c.load(progress=False) as model:
        model_ms = model.max_delay * FRAME_MS
    reader = moshi_c.OggOpusReader()
    reader.append(moshi_c.OggOpusWriter().append(np.zeros(1920, np.float32)))
    opus_ms = 2 * reader.pre_skip / 24
    return {
        "callers": options.callers,
        "client_processes": PROCESSES,
        "seconds": options.seconds,
        **seen,
        "server": {
            "answer_mean_ms": round(1e3 * spent / steps, 3),
            "late": int(after["moshi_late_frames_total"] - before["moshi_late_frames_total"]),
            "silence": int(after["moshi_silence_steps_total"]),
            "dropped": int(
                sum(v for k, v in after.items() if k.startswith("moshi_dropped_frames_total"))
            ),
        },
        "mouth_to_ear_ms": {
            "a frame has to be spoken": FRAME_MS,
            "answer, p50": seen["answer_ms"]["p50"],
            "the model's delay": model_ms,
            "Opus both ways, on /api/chat": round(opus_ms, 1),
            "without network and sound cards": round(
                FRAME_MS + seen["answer_ms"]["p50"] + model_ms + opus_ms, 1
            ),
        },
        "short_calls": short,
    }


def main() -> None:
    if sys.argv[1:2] == ["--load"]:
        url, callers, frames, seed = sys.argv[2:]
        print(json.dumps(asyncio.run(load(url, int(callers), int(frames), int(seed)))))
        return
    parser = common.arguments(__doc__, "server")
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--calls", type=int, default=1000, help="short ones")
    parser.add_argument("--threads", type=int, help="of the server's model")
    options = parser.parse_args()
    common.report("server", options.out, asyncio.run(measure(options)))


if __name__ == "__main__":
    main()
