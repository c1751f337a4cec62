"""An agent of Pipecat that speaks with Moshi, in this process.

    pip install "moshi_c[pipecat]" "pipecat-ai[runner,webrtc]"
    python examples/pipecat_agent.py
    python examples/pipecat_agent.py question.wav answer.wav

Without files Pipecat's runner serves a page at http://localhost:7860 to talk to the agent, and
telephone calls of Twilio at ws://.../ws; MOSHI_MODEL names another model than the package's. With
files the agent hears the first and writes what it says to the second.
"""

import asyncio
import os
import sys

import numpy as np
from pipecat.frames.frames import (
    Frame,
    InputAudioRawFrame,
    LLMRunFrame,
    SpeechOutputAudioRawFrame,
    TTSTextFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.workers.runner import WorkerRunner

import moshi_c
from moshi_c.audio import read_audio, write_audio
from moshi_c.integrations.pipecat import MoshiLLMService

RATE = 24000


def agent(
    model: moshi_c.Model, hears: list[FrameProcessor], speaks: FrameProcessor
) -> PipelineWorker:
    """The agent between what gives it sound and what takes it. The context keeps what it says."""
    both = LLMContextAggregatorPair(LLMContext())
    service = MoshiLLMService(model)
    pipeline = Pipeline([*hears, both.user(), service, speaks, both.assistant()])
    params = PipelineParams(enable_metrics=True, enable_usage_metrics=True)
    return PipelineWorker(pipeline, params=params)


async def bot(arguments) -> None:  # RunnerArguments, one for each call
    """Called by Pipecat's runner when somebody connects."""
    from pipecat.runner.utils import create_transport
    from pipecat.transports.base_transport import TransportParams
    from pipecat.transports.websocket.fastapi import FastAPIWebsocketParams

    sound = {"audio_in_enabled": True, "audio_out_enabled": True}
    transport = await create_transport(
        arguments,
        {
            "webrtc": lambda: TransportParams(**sound),
            "twilio": lambda: FastAPIWebsocketParams(**sound),
        },
    )
    worker = agent(the_model(), [transport.input()], transport.output())

    @transport.event_handler("on_client_connected")
    async def begin(transport, client) -> None:
        await worker.queue_frame(LLMRunFrame())

    @transport.event_handler("on_client_disconnected")
    async def end(transport, client) -> None:
        await worker.cancel()

    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    await runner.run()


_models: list[moshi_c.Model] = []


def the_model() -> moshi_c.Model:
    """Loaded once; calls share it."""
    if not _models:
        _models.append(moshi_c.load(os.environ.get("MOSHI_MODEL")))
    return _models[0]


class Recorder(FrameProcessor):
    """Keeps what is said and prints the words."""

    def __init__(self) -> None:
        super().__init__()
        self.voice = bytearray()

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, SpeechOutputAudioRawFrame):
            self.voice += frame.audio
        elif isinstance(frame, TTSTextFrame):
            print(frame.text, end="", flush=True)
        await self.push_frame(frame, direction)


async def over_files(source: str, target: str) -> None:
    """The same agent, faster than real time."""
    recorder = Recorder()
    worker = agent(the_model(), [], recorder)
    runner = WorkerRunner()
    await runner.add_workers(worker)

    pcm = np.concatenate([read_audio(source, RATE), np.zeros(4 * RATE, np.float32)])
    samples = (np.clip(pcm, -1, 1) * 32767).astype("<i2")
    sound = [
        InputAudioRawFrame(samples[i : i + 480].tobytes(), RATE, 1)
        for i in range(0, len(samples), 480)
    ]

    @worker.event_handler("on_pipeline_started")
    async def begin(worker, frame) -> None:
        await worker.queue_frames(sound)
        await worker.stop_when_done()

    await runner.run()
    print()
    write_audio(target, np.frombuffer(bytes(recorder.voice), "<i2"), RATE)


if __name__ == "__main__":
    if len(sys.argv) == 3 and not sys.argv[1].startswith("-"):
        asyncio.run(over_files(*sys.argv[1:]))
    else:
        from pipecat.runner.run import main

        main()
