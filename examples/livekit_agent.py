"""An agent of LiveKit that speaks with Moshi, in this process.

    pip install "moshi_c[livekit]"
    python -m livekit.agents console examples/livekit_agent.py
    python -m livekit.agents start examples/livekit_agent.py
    python examples/livekit_agent.py question.wav answer.wav

`console` is a call from the terminal, by LiveKit's `lk`; `start` waits for rooms of a server, named
by LIVEKIT_URL, LIVEKIT_API_KEY and LIVEKIT_API_SECRET. MOSHI_MODEL names another model than the
package's. With files the agent hears the first and writes what it says to the second.
"""

import argparse
import asyncio
import os

import numpy as np
from livekit import rtc
from livekit.agents import Agent, AgentServer, AgentSession, JobContext, JobExecutorType
from livekit.agents.voice import io

from moshi_c.audio import read_audio, write_audio
from moshi_c.integrations.livekit import MoshiDuplexModel

RATE = 24000

# Calls in threads of one process share the model, which is loaded when the first of them begins.
server = AgentServer(job_executor_type=JobExecutorType.THREAD)
moshi = MoshiDuplexModel(os.environ.get("MOSHI_MODEL"))


def agent_session() -> AgentSession:
    """A call that prints what the agent says and how soon."""
    session = AgentSession(llm=moshi)

    @session.on("conversation_item_added")
    def show(event) -> None:
        if text := getattr(event.item, "text_content", None):
            print(f"{event.item.role}: {text.strip()}", flush=True)

    @session.on("metrics_collected")
    def tell(event) -> None:
        if getattr(event.metrics, "ttft", -1) > 0:
            print(f"(answered after {event.metrics.ttft:.2f} s)", flush=True)

    return session


@server.rtc_session()
async def entrypoint(context: JobContext) -> None:
    """Called by LiveKit for each room."""
    await agent_session().start(Agent(instructions=""), room=context.room)


class FileInput(io.AudioInput):
    """A file in time, then silence."""

    def __init__(self, path: str) -> None:
        super().__init__(label=path)
        self._samples = (np.clip(read_audio(path, RATE), -1, 1) * 32767).astype(np.int16)
        self._at = 0
        self.seconds = len(self._samples) / RATE

    async def __anext__(self) -> rtc.AudioFrame:
        await asyncio.sleep(0.02)
        piece = self._samples[self._at : self._at + RATE // 50]
        self._at += len(piece)
        piece = np.pad(piece, (0, RATE // 50 - len(piece)))
        return rtc.AudioFrame(piece.tobytes(), RATE, 1, len(piece))


class FileOutput(io.AudioOutput):
    """Keeps what is played."""

    def __init__(self) -> None:
        super().__init__(label="file", capabilities=io.AudioOutputCapabilities(pause=False))
        self.voice = bytearray()
        self._seconds = 0.0

    async def capture_frame(self, frame: rtc.AudioFrame) -> None:
        await super().capture_frame(frame)
        self.voice += frame.data.tobytes()
        self._seconds += frame.duration

    def flush(self) -> None:
        super().flush()
        if self._seconds:
            self.on_playback_finished(playback_position=self._seconds, interrupted=False)
        self._seconds = 0.0

    def clear_buffer(self) -> None:
        self.flush()


async def over_files(source: str, target: str) -> None:
    """The same agent without a room."""
    session, user, speaker = agent_session(), FileInput(source), FileOutput()
    session.input.audio, session.output.audio = user, speaker
    await session.start(Agent(instructions=""))
    await asyncio.sleep(user.seconds + 4.0)
    await session.aclose()
    await moshi.aclose()
    write_audio(target, np.frombuffer(bytes(speaker.voice), "<i2"), RATE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question", help="a file of sound")
    parser.add_argument("answer", help="file to write")
    arguments = parser.parse_args()
    asyncio.run(over_files(arguments.question, arguments.answer))
