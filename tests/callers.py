"""Callers of a server, for tests and benchmarks: in real time or not, well-behaved or not. Those
whose protocols are JSON stand with the tests of these."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
import numpy as np
from numpy.typing import NDArray

from moshi_c import Model
from moshi_c.server import Server, Settings

FRAME, RATE = 1920, 24000
#: Settings for calls whose sound has to arrive whole however busy the machine is.
PATIENT = {"silence_after": 60.0, "backlog_seconds": 60.0, "slow_seconds": 60.0}

Pcm = NDArray[np.float32]
Event = dict[str, Any]
T = TypeVar("T")
AnyCaller = TypeVar("AnyCaller", bound="Listening")


def scenario(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """A test as a coroutine, with an end."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(asyncio.wait_for(test(**fixtures), 300))

    run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    return run


def value(server: Server, name: str, **labels: str) -> float:
    """One number of the metrics."""
    return server.metrics._registry.get_sample_value(name, labels) or 0.0


async def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits for something that the server does by itself."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        await asyncio.sleep(0.01)


async def all_over(server: Server) -> None:
    """Waits until every call has ended and been counted."""
    await eventually(lambda: not server._calls)


@contextlib.asynccontextmanager
async def serving(model: Model, **options: Any) -> AsyncIterator[Server]:
    """A server in this event loop, on a free port of 127.0.0.1."""
    server = Server(model, Settings(**{"port": 0, **options}))
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0.0)


def websocket(server: Server | str) -> str:
    """Its address for WebSockets."""
    url = server if isinstance(server, str) else server.url
    return url.replace("http", "ws", 1)


async def get(server: Server | str, path: str, **options: Any) -> tuple[int, str, Any]:
    """Status, text and headers of a page."""
    url = server if isinstance(server, str) else server.url
    async with aiohttp.ClientSession() as client, client.get(url + path, **options) as response:
        return response.status, await response.text(), response.headers


def cut(data: Any, size: int) -> Iterator[Any]:
    """Samples or bytes in pieces; the last may be shorter."""
    return (data[start : start + size] for start in range(0, len(data), size))


async def in_time(pieces: Iterable[T], seconds: float) -> AsyncIterator[T]:
    """Pieces that last so long each, as they are due in real time."""
    begin = time.monotonic()
    for number, piece in enumerate(pieces):
        wait = begin + number * seconds - time.monotonic()
        if wait > 0:
            await asyncio.sleep(wait)
        yield piece


@dataclass
class Listening:
    """One call over a WebSocket. A kind of caller says what it makes of a message (`take`), and has
    `notes`, which are shown when a call ends before what a test waits for."""

    socket: aiohttp.ClientWebSocketResponse
    progress: asyncio.Event = field(default_factory=asyncio.Event)
    over: bool = False

    def take(self, message: aiohttp.WSMessage) -> None:
        """A message has come."""
        raise NotImplementedError

    async def listen(self) -> None:
        """Until the close."""
        async for message in self.socket:
            self.take(message)
            self.progress.set()
        self.over = True
        self.progress.set()

    async def until(self, condition: Callable[[], Any], seconds: float = 60.0) -> None:
        """Waits for something to be true of what has come; TimeoutError if the call ends first."""

        async def wait() -> None:
            while not condition():
                if self.over:
                    raise TimeoutError(f"the call ended: {self.code}, {self.notes}")
                self.progress.clear()
                await self.progress.wait()

        await asyncio.wait_for(wait(), seconds)

    async def finished(self, seconds: float = 60.0) -> None:
        """Waits for the close."""
        await self.until(lambda: self.over, seconds)

    @property
    def code(self) -> int | None:
        """Of the close frame."""
        return self.socket.close_code


@contextlib.asynccontextmanager
async def connected(
    server: Server | str, path: str, kind: type[AnyCaller], **options: Any
) -> AsyncIterator[AnyCaller]:
    """A call by a caller of this kind, who listens; aiohttp.WSServerHandshakeError when refused."""
    async with (
        aiohttp.ClientSession() as http,
        http.ws_connect(websocket(server) + path, max_msg_size=0, **options) as connection,
    ):
        caller = kind(connection)
        listening = asyncio.create_task(caller.listen())
        try:
            yield caller
        finally:
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listening


@dataclass
class Caller(Listening):
    """One call over `/ws/pcm`. What has come is in `heard`, `times`, `notes`."""

    heard: list[Pcm] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # of each message of sound
    sent: list[float] = field(default_factory=list)  # of each frame
    notes: list[dict[str, Any]] = field(default_factory=list)

    def take(self, message: aiohttp.WSMessage) -> None:
        """See Listening."""
        if message.type == aiohttp.WSMsgType.BINARY:
            self.heard.append(np.frombuffer(message.data, np.float32))
            self.times.append(time.monotonic())
        elif message.type == aiohttp.WSMsgType.TEXT:
            self.notes.append(json.loads(message.data))

    async def ready(self) -> dict[str, Any]:
        """Waits for the slot."""
        await self.until(lambda: self.kinds("ready"))
        return self.kinds("ready")[0]

    async def send(self, pcm: Pcm) -> None:
        """Samples as one message."""
        await self.socket.send_bytes(pcm.astype("<f4", copy=False).tobytes())

    async def say(self, pcm: Pcm, speed: float = 1.0, piece: int = FRAME) -> None:
        """Samples at a multiple of real time; infinity is at once."""
        async for samples in in_time(cut(pcm, piece), piece / RATE / speed):
            self.sent.append(time.monotonic())
            await self.send(samples)

    async def end(self) -> None:
        """The end of the input."""
        await self.socket.send_str('{"type": "end"}')

    def kinds(self, kind: str) -> list[dict[str, Any]]:
        """The notes of a type."""
        return [note for note in self.notes if note["type"] == kind]

    @property
    def pcm(self) -> Pcm:
        """All that was heard."""
        return np.concatenate(self.heard) if self.heard else np.zeros(0, np.float32)

    @property
    def text(self) -> str:
        """All that was said in words."""
        return "".join(note["text"] for note in self.kinds("text"))


def calling(
    server: Server | str, headers: dict[str, str] | None = None, **query: Any
) -> AbstractAsyncContextManager[Caller]:
    """A call over `/ws/pcm`."""
    return connected(server, "/ws/pcm", Caller, params=query, headers=headers)


@dataclass
class Chatter(Listening):
    """One call over `/api/chat`, as the published clients hold it."""

    messages: list[tuple[float, bytes]] = field(default_factory=list)

    def take(self, message: aiohttp.WSMessage) -> None:
        """Every one is binary."""
        assert message.type == aiohttp.WSMsgType.BINARY
        self.messages.append((time.monotonic(), message.data))

    def kind(self, kind: int) -> list[bytes]:
        """What stands behind the first byte of the messages of a kind."""
        return [data[1:] for _, data in self.messages if data[0] == kind]

    @property
    def notes(self) -> list[bytes]:
        """The errors."""
        return self.kind(5)

    async def ready(self) -> None:
        """Waits for the handshake."""
        await self.until(lambda: self.kind(0))

    async def send(self, data: bytes) -> None:
        """A piece of the Opus stream."""
        if data:
            await self.socket.send_bytes(b"\x01" + data)

    async def say(self, pieces: list[bytes], seconds: float) -> None:
        """Pieces that last so long each, in real time."""
        async for piece in in_time(pieces, seconds):
            await self.send(piece)

    @property
    def text(self) -> str:
        """All that was said in words; every piece is whole characters."""
        return "".join(piece.decode() for piece in self.kind(2))


def chatting(
    server: Server | str, query: str = "", origin: str | None = None
) -> AbstractAsyncContextManager[Chatter]:
    """A call over `/api/chat`; origin: the page that a browser would be on."""
    return connected(server, f"/api/chat{query}", Chatter, origin=origin)


@dataclass
class JsonCaller(Listening):
    """One call whose messages are all JSON. What has come is in `events`."""

    events: list[Event] = field(default_factory=list)

    def take(self, message: aiohttp.WSMessage) -> None:
        """Every one is an event."""
        assert message.type == aiohttp.WSMsgType.TEXT
        self.events.append(json.loads(message.data))


@dataclass
class EventCaller(JsonCaller):
    """Its events have a "type"."""

    async def send(self, kind: str, **facts: Any) -> None:
        """An event."""
        await self.socket.send_str(json.dumps({"type": kind, **facts}))

    def kinds(self, kind: str) -> list[Event]:
        """The events of a type."""
        return [event for event in self.events if event["type"] == kind]


async def converse(server: Server | str, pcm: Pcm, speed: float = 1.0, **query: Any) -> Caller:
    """A whole call."""
    async with calling(server, **query) as caller:
        await caller.ready()
        await caller.say(pcm, speed)
        await caller.end()
        await caller.finished()
        return caller


def reset(caller: Listening) -> None:
    """Cuts the connection with a TCP reset, as a machine does that goes away."""
    response = caller.socket._response
    assert response.connection is not None and response.connection.transport is not None
    transport = response.connection.transport
    reset_socket(transport.get_extra_info("socket"))
    transport.abort()


def reset_socket(connection: Any) -> None:
    """Makes the close a reset."""
    linger = struct.pack("ii", 1, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


async def raw(
    port: int, text: bytes, source: str = "127.0.0.1"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection by hand, with the first bytes sent, from an address of this machine."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
    writer.write(text)
    await writer.drain()
    return reader, writer


UPGRADE = (
    b"GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
