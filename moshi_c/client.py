"""`moshi-c client`: a call to a server that speaks the WebSocket protocol of Moshi, `/api/chat`.

Binary messages whose first byte is the kind: 0 handshake (of any length; the server is ready), 1 a
slice of one Ogg Opus stream at 24 kHz, 2 text in UTF-8, 5 an error in words, 6 a ping, which may
carry our place in the line as JSON. What else there is means nothing here.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit, urlunsplit

import numpy as np

from .audio import AudioWriter, Pcm, read_audio
from .errors import MoshiError, SessionError
from .ogg_opus import OggOpusReader, OggOpusWriter
from .soundcard import EchoGate, Loudspeaker, gone, microphone

RATE, FRAME = 24000, 1920
FRAME_SECONDS = FRAME / RATE
HANDSHAKE, SOUND, TEXT, ERROR, PING = 0, 1, 2, 5, 6

_STATUSES = {status.value for status in HTTPStatus}
#: Seconds for the rest of the answer after the end of the input, and for a server to hang up.
_LAST_SECONDS = 2.0
#: A message of this many bytes is more than any sound or text, and ends the call.
_MOST_BYTES = 1 << 20
#: Seconds of sound in one message that are believed.
_MOST_SECONDS = 60.0
#: Blocks of the microphone that may wait for the network; older ones are left out.
_MOST_BLOCKS = 25


@dataclass(frozen=True, slots=True)
class Call:
    """What a call is made with.

    url: of the server; ws, wss, http and https are taken, `/api/chat` is added where no path is.
    source: a file that is said in real time, and `after` seconds of silence; None: the microphone.
    target: a file for the answer; None: the loudspeaker.
    seed: asked of the server, where it takes wishes.
    verify: whether the certificate of a TLS server must be known.
    """

    url: str
    source: Path | None = None
    target: Path | None = None
    after: float = 0.0
    token: str | None = None
    seed: int | None = None
    verify: bool = True
    echo_gate: bool = True
    microphone: int | str | None = None
    speaker: int | str | None = None


@dataclass(slots=True)
class Counts:
    """Of one call, in samples at 24 kHz, and blocks that the network was too slow for."""

    sent: int = 0
    heard: int = 0
    left_out: int = 0


def address(url: str, seed: int | None = None) -> str:
    """The WebSocket's address behind what a user types.

    Raises:
        ValueError: no such scheme, no host, or a file.
    """
    with contextlib.suppress(OSError):  # too long for a file's name, with a token in it
        if Path(url).is_file():
            raise ValueError(f"{url} is a file; expected the address of a server, and --in {url}")
    parts = urlsplit(url if "://" in url else f"ws://{url}")
    scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
    if scheme not in ("ws", "wss") or not parts.hostname:
        raise ValueError(f"{url} is no address of a server; expected one like ws://localhost:8998")
    path = parts.path if parts.path.strip("/") else "/api/chat"
    query = [parts.query] if parts.query else []
    if seed is not None:
        query.append(urlencode({"seed": seed}))
    return urlunsplit((scheme, parts.netloc, path, "&".join(query), ""))


def talk(
    call: Call, said: Callable[[str], None], waiting: Callable[[int], None] = lambda place: None
) -> Counts:
    """Holds a call: until the file has been said and answered, or, with a microphone, until the
    server hangs up.

    Args:
        call: what to call with.
        said: takes the text as it comes.
        waiting: takes our place in the line, where the server tells it.

    Raises:
        SessionError: the server cannot be reached, refuses, ends the call with a reason, or hangs
            up before the file has been said and answered.
        AudioError: a file, or what the server sends, is no sound.
        DeviceError: no sounddevice, no PortAudio, or no such device.
        MoshiError: aiohttp is missing.
    """
    return asyncio.run(_Caller(call, said, waiting).run())


def _aiohttp() -> Any:
    try:
        import aiohttp
    except ImportError as error:
        raise MoshiError("the client needs aiohttp: pip install 'moshi_c[server]'") from error
    return aiohttp


def printable(text: str) -> str:
    """The text without what would move a terminal's cursor or change its colours."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "" for c in text)


class _Caller:
    def __init__(
        self, call: Call, said: Callable[[str], None], waiting: Callable[[int], None]
    ) -> None:
        self._call, self._said, self._waiting = call, said, waiting
        self._url = address(call.url, call.seed)
        self._counts = Counts()
        self._ready = asyncio.Event()
        self._answered = asyncio.Event()
        self._all_sent = False
        self._length: int | None = None  # samples of the file
        self._reader = OggOpusReader(RATE, max_seconds=_MOST_SECONDS)
        self._text = codecs.getincrementaldecoder("utf-8")("replace")

    async def run(self) -> Counts:
        aiohttp = _aiohttp()
        call = self._call
        said = None if call.source is None else self._file(self._whole(call.source))
        headers = {"Authorization": f"Bearer {call.token}"} if call.token else {}
        with contextlib.ExitStack() as stack:
            if call.target is None:
                self._play = self._sink(stack)
            try:
                async with (
                    aiohttp.ClientSession() as client,
                    client.ws_connect(
                        self._url,
                        headers=headers,
                        max_msg_size=_MOST_BYTES,
                        heartbeat=10.0,
                        ssl=call.verify,
                    ) as socket,
                ):
                    blocks = said or self._blocks(self._microphone(stack))
                    if call.target is not None:  # only now: an old file stays without a call
                        self._play = self._sink(stack)
                    try:
                        await self._converse(socket, blocks)
                    finally:
                        with contextlib.suppress(Exception):
                            await asyncio.wait_for(socket.close(), _LAST_SECONDS)
            except aiohttp.WSServerHandshakeError as error:
                phrase = HTTPStatus(error.status).phrase if error.status in _STATUSES else ""
                raise SessionError(
                    f"{self._url} refused the call: {error.status} {phrase}"
                ) from error
            except aiohttp.ClientError as error:
                reason = getattr(error, "strerror", None) or error
                raise SessionError(f"{self._url} cannot be reached: {reason}") from error
        return self._counts

    # ---- where sound comes from, and goes to ---------------------------------------------------

    def _sink(self, stack: contextlib.ExitStack) -> Callable[[Pcm], None]:
        call = self._call
        self._speaker = None
        if call.target is not None:
            return stack.enter_context(AudioWriter(call.target, RATE)).write
        self._speaker = stack.enter_context(Loudspeaker(RATE, call.speaker))
        return self._speaker.play

    def _whole(self, source: Path) -> Pcm:
        """What is said, in whole frames."""
        silence = np.zeros(round(self._call.after * RATE), np.float32)
        pcm = np.concatenate([read_audio(source, RATE), silence])
        pcm = np.pad(pcm, (0, -len(pcm) % FRAME))
        self._length = len(pcm)
        return pcm

    async def _file(self, pcm: Pcm) -> AsyncIterator[Pcm]:
        """A frame every 80 ms, on the clock."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        for index, frame in enumerate(pcm.reshape(-1, FRAME)):
            await asyncio.sleep(began + index * FRAME_SECONDS - loop.time())
            yield frame

    def _microphone(self, stack: contextlib.ExitStack) -> asyncio.Queue[Pcm | None]:
        heard: asyncio.Queue[Pcm | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(pcm: Pcm | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(heard.put_nowait, pcm)

        stack.enter_context(microphone(RATE, FRAME, deliver, self._call.microphone))
        return heard

    async def _blocks(self, heard: asyncio.Queue[Pcm | None]) -> AsyncIterator[Pcm]:
        while not heard.empty():  # what was said before the server was ready
            heard.get_nowait()
        gate = EchoGate(self._speaker, shut=self._call.echo_gate) if self._speaker else None
        while (block := await heard.get()) is not None:
            while heard.qsize() > _MOST_BLOCKS:
                heard.get_nowait()
                self._counts.left_out += 1
            yield gate(block) if gate else block
        raise gone()

    # ---- the call ------------------------------------------------------------------------------

    async def _converse(self, socket: Any, blocks: AsyncIterator[Pcm]) -> None:
        receive = asyncio.ensure_future(self._receive(socket))
        send = asyncio.ensure_future(self._send(socket, blocks))
        answered = asyncio.ensure_future(self._answered.wait())
        first: dict[str, Any] = {"return_when": asyncio.FIRST_COMPLETED}
        try:
            await asyncio.wait({receive, send}, **first)
            if not receive.done() and isinstance(send.exception(), ConnectionError):
                # the server has hung up, and says why in what is still to be read
                await asyncio.wait({receive}, timeout=_LAST_SECONDS)
            if not receive.done():
                send.result()
                heard = -1  # until no more comes
                while heard != self._counts.heard and not (receive.done() or answered.done()):
                    heard = self._counts.heard
                    await asyncio.wait({receive, answered}, **first, timeout=_LAST_SECONDS)
            if receive.done():
                receive.result()
        finally:
            for task in (receive, send, answered):
                task.cancel()
            await asyncio.gather(receive, send, answered, return_exceptions=True)

    async def _send(self, socket: Any, blocks: AsyncIterator[Pcm]) -> None:
        writer = OggOpusWriter(RATE)
        await self._ready.wait()
        async for pcm in blocks:
            await socket.send_bytes(bytes([SOUND]) + writer.append(pcm))
            self._counts.sent += len(pcm)
        self._all_sent = True
        self._check_answered()

    def _check_answered(self) -> None:
        if self._all_sent and self._counts.heard >= self._counts.sent:
            self._answered.set()

    async def _receive(self, socket: Any) -> None:
        """Until the server hangs up without a complaint."""
        types = _aiohttp().WSMsgType
        while True:
            message = await socket.receive()
            if message.type == types.BINARY:
                self._take(message.data)
            elif message.type == types.CLOSE and message.data in (1000, 1001):
                self._check_whole()
                return
            elif message.type in (types.CLOSE, types.CLOSING, types.CLOSED, types.ERROR):
                reason = message.extra if message.type == types.CLOSE else None
                raise SessionError(
                    f"{self._url} ended the call: "
                    + printable(str(reason or f"the connection was lost ({socket.close_code})"))
                )

    def _check_whole(self) -> None:
        """A server that hangs up has to have answered the whole file; a microphone has no whole."""
        if self._length is None or self._answered.is_set():
            return
        sent, length, heard = (
            f"{samples / RATE:.2f} s"
            for samples in (self._counts.sent, self._length, self._counts.heard)
        )
        raise SessionError(
            f"{self._url} hung up before the end: {sent} of {length} were said, {heard} heard"
        )

    def _take(self, data: bytes) -> None:
        kind, rest = data[:1], data[1:]
        if kind == bytes([HANDSHAKE]):
            self._ready.set()
        elif kind == bytes([SOUND]):
            pcm = self._reader.append(rest)
            self._counts.heard += len(pcm)
            self._play(pcm)
            self._check_answered()
        elif kind == bytes([TEXT]):
            if text := printable(self._text.decode(rest)):
                self._said(text)
        elif kind == bytes([ERROR]):
            reason = printable(rest.decode("utf-8", "replace"))
            raise SessionError(f"{self._url} ended the call: {reason}")
        elif kind == bytes([PING]) and rest:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                self._waiting(int(json.loads(rest)["position"]))
