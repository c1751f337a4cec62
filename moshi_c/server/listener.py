"""The port: how many may connect, in all and from one address, and how soon they have to speak.

A connection has its place from the moment at which the system hands it over: who does not get on
with a TLS handshake, or connects and says nothing, takes one of the places of the own address, and
loses it when the time is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

#: Seconds until the next try when the system has no descriptor left for a connection.
_NONE_LEFT = 0.2


def neighbourhood(address: str) -> str:
    """What counts as one address: of IPv6 the network that one household has."""
    with contextlib.suppress(ValueError):
        ip = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address):
            if ip.ipv4_mapped:
                return str(ip.ipv4_mapped)
            return str(ipaddress.ip_network((ip, 64), strict=False))
    return address


class Listener:
    """Accepts connections for a server of HTTP."""

    def __init__(
        self,
        handler: Callable[[], asyncio.Protocol],
        *,
        most: int,
        per_address: int,
        first_seconds: float,
        tls: ssl.SSLContext | None,
        refused: Callable[[str], None],
    ) -> None:
        """handler: makes the protocol of a connection. most, per_address: connections in all and
        from one address; 0 is no bound. first_seconds: until its first request, half of them for
        the handshake. refused: is told why a connection was."""
        self._handler, self._tls, self._refused = handler, tls, refused
        self._most, self._per_address, self._first_seconds = most, per_address, first_seconds
        self._open: Counter[str] = Counter()
        self._silent: dict[Any, asyncio.TimerHandle] = {}  # connections without a request yet
        self._sockets: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def listen(self, host: str, port: int) -> None:
        """Listens.

        Raises:
            OSError: the address is in use, or not this machine's.
        """
        loop = asyncio.get_running_loop()
        bound = await loop.create_server(self._handler, host, port, start_serving=False)
        self._sockets = [each.dup() for each in bound.sockets]
        bound.close()
        self.port = int(self._sockets[0].getsockname()[1])
        try:
            for each in self._sockets:
                each.listen(1024)
        except OSError:
            for each in self._sockets:
                each.close()
            raise
        for each in self._sockets:
            self._task(self._accept(each)).add_done_callback(partial(_close, each))

    def close(self) -> None:
        """Takes no more; those that are open stay, but for handshakes."""
        for task in self._tasks:
            task.cancel()

    def spoke(self, handler: object) -> None:
        """A request has come."""
        timer = self._silent.pop(handler, None)
        if timer is not None:
            timer.cancel()

    def _task(self, part: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(part)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, peer = await loop.sock_accept(listening)
            except ConnectionError:
                continue
            except OSError:
                await asyncio.sleep(_NONE_LEFT)
                continue
            address = neighbourhood(str(peer[0]))
            if self._open.total() >= self._most:
                self._refused("connections")
                connection.close()
            elif self._per_address and self._open[address] >= self._per_address:
                self._refused("connections_of_address")
                connection.close()
            else:
                self._open[address] += 1
                self._task(self._begin(connection, address))
            await asyncio.sleep(0)  # those that are open get a turn

    async def _begin(self, connection: socket.socket, address: str) -> None:
        loop = asyncio.get_running_loop()
        handler = self._handler()
        line = _Line(handler, lambda: self._over(handler, address))
        self._silent[handler] = loop.call_later(self._first_seconds, line.cut)
        try:
            await loop.connect_accepted_socket(
                lambda: line,
                connection,
                ssl=self._tls,
                ssl_handshake_timeout=self._first_seconds / 2 if self._tls else None,
            )
        except asyncio.CancelledError:
            line.over()
        except Exception:  # OSError above all, but there may also be no memory for a handshake
            line.over()
            connection.close()  # which no transport does that was not made

    def _over(self, handler: asyncio.Protocol, address: str) -> None:
        self.spoke(handler)
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]


def _close(listening: socket.socket, task: asyncio.Task[None]) -> None:
    """When the loop has let go of it."""
    listening.close()


class _Line(asyncio.Protocol):
    """A connection's protocol, and word of its end."""

    def __init__(self, handler: asyncio.Protocol, over: Callable[[], None]) -> None:
        self._handler, self._over = handler, over
        self._transport: asyncio.Transport | None = None
        self._is_over = False

    def over(self) -> None:
        """Once."""
        if not self._is_over:
            self._is_over = True
            self._over()

    def cut(self) -> None:
        """Its time is over."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._handler.connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._handler.connection_lost(error)
        self.over()

    def data_received(self, data: bytes) -> None:
        self._handler.data_received(data)

    def eof_received(self) -> bool | None:
        return self._handler.eof_received()

    def pause_writing(self) -> None:
        self._handler.pause_writing()

    def resume_writing(self) -> None:
        self._handler.resume_writing()
