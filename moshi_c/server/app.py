"""The server: its routes, its start and its end.

Paths: `/` and `/page/...` the page; calls at `/api/chat`, `/ws/pcm`, `/v1/live/sessions`,
`/v1/realtime` and `/twilio/media`; `/twilio/answer` what Twilio asks when the telephone rings;
`/api/info` what the page has to know; `/health` the process lives, `/ready` a caller would be let
in, `/metrics` for Prometheus.

A request that cannot become a call is refused before its upgrade, with a JSON body
`{"error", "reason"}`: 400 an option, 401 the token, 403 host, origin or Twilio's signature, 404 no
such path or no telephone here, 405 the method, 408 and 413 a form too slow or too large, 426 no
WebSocket, 429 too many from one address, 503 full or stopping; the last two with Retry-After. A
call ends with a close frame: 1000 the input has ended or the time is up, 1003 messages without
meaning, 1008 options that the model refuses, 1009 a message too large, 1011 an error, 1012 the
server stops, 1013 no slot after all, 4400 sound that cannot be decoded, 4408 no sound came or
nothing was read for too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

try:
    from aiohttp import WSCloseCode, web
except ImportError as error:
    raise ImportError("the server needs aiohttp: pip install 'moshi_c[server]'") from error

from .. import __version__
from ..model import Model
from ..session import Session
from . import pages
from .admission import Admission
from .call import Call, Ending, Wire
from .chat import ChatWire
from .guard import Guard, Refused
from .listener import Listener
from .live import LiveWire
from .metrics import Metrics
from .pcm import FORMATS, PcmWire
from .realtime import RealtimeWire
from .settings import Settings, read_rate, read_sampling
from .twilio import TwilioWire, busy, check_signature, connect_to

log = logging.getLogger("moshi_c.server")

#: Seconds in which a connection has to say what it wants.
_FIRST_REQUEST = 10.0
#: Connections from one address for each call that it may hold: pages come by several at once.
_CONNECTIONS_PER_CALL = 4
#: Seconds between WebSocket pings.
_HEARTBEAT = 10.0
#: Bytes that the system may hold for a caller who does not read.
_SEND_BUFFER = 1 << 16
#: Seconds for which a caller may leave what was sent unacknowledged.
_UNACKNOWLEDGED = 10.0
#: Seconds that a refused caller is told to wait.
_RETRY_AFTER = 10
_FORM = "application/x-www-form-urlencoded"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """One model on one port. Use it from one event loop: `start`, then `stop`."""

    def __init__(self, model: Model, settings: Settings | None = None) -> None:
        """Nothing listens yet.

        Raises:
            ValueError: more sessions than the model was loaded for, or a model that cannot hear.
        """
        self.settings = settings = settings or Settings()
        self._model = model
        if not model._info["has_mimi"] or not model._info["has_lm"]:
            raise ValueError(f"{model._source} cannot hear and answer; expected a codec and an LM")
        slots = model.max_sessions if settings.sessions is None else settings.sessions
        if slots > model.max_sessions:
            raise ValueError(
                f"sessions is {slots}, the model was loaded for {model.max_sessions}; "
                "expected no more"
            )
        self._admission = Admission(slots, settings.queue)
        self._guard = Guard(settings)
        self.metrics = Metrics()
        self.metrics.open.set_function(lambda: self._admission.busy)
        self.metrics.waiting.set_function(lambda: self._admission.waiting)
        self._files = pages.files()
        self._calls: set[Call] = set()
        self._numbers = 0
        self._stopping = False

    # ---- start and end -------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Where it listens, such as "http://127.0.0.1:8998"."""
        host = self.settings.host
        host = f"[{host}]" if ":" in host else host
        return f"http{'s' if self.settings.tls else ''}://{host}:{self.port}"

    @property
    def port(self) -> int:
        """The port in use."""
        return self._listener.port

    async def start(self) -> None:
        """Steps the model once, so that the first caller does not wait for it, and listens.

        Raises:
            OSError: the address is in use or not this machine's, or a file of `tls` is unusable.
        """
        settings = self.settings
        context = None if settings.tls is None else _tls(*settings.tls)
        await asyncio.to_thread(self._warm_up)
        app = web.Application(middlewares=[self._checked], client_max_size=1 << 16)
        app.router.add_get("/", self._index)
        app.router.add_get("/page/{name:.+}", self._file)
        app.router.add_get("/api/chat", self._chat)
        app.router.add_get("/ws/pcm", self._pcm)
        app.router.add_get("/v1/live/sessions", self._live)
        app.router.add_get("/v1/realtime", self._realtime)
        app.router.add_get("/twilio/media", self._telephone)
        app.router.add_route("*", "/twilio/answer", self._answer_telephone)
        app.router.add_get("/api/info", self._info)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._is_ready)
        app.router.add_get("/metrics", self._metrics_text)
        # neither an access log nor one of damaged requests: they would show the tokens in URLs
        quiet = logging.getLogger("moshi_c.server.http")
        quiet.setLevel(logging.CRITICAL + 1)
        self._runner = web.AppRunner(app, access_log=None, logger=quiet)
        await self._runner.setup()
        handler = self._runner.server
        assert handler is not None
        self._listener = Listener(
            handler,
            most=settings.connections,
            per_address=_CONNECTIONS_PER_CALL * settings.per_address,
            first_seconds=_FIRST_REQUEST,
            tls=context,
            refused=lambda label: self.metrics.refused.labels(label).inc(),
        )
        try:
            await self._listener.listen(settings.host, settings.port)
        except OSError as error:
            await self._runner.cleanup()
            in_use = error.errno == errno.EADDRINUSE
            reason = "it is in use; give another port" if in_use else error.strerror
            raise OSError(
                error.errno, f"{settings.host}:{settings.port} cannot be listened on: {reason}"
            ) from error
        log.info("listening on %s, %d sessions", self.url, self._admission.slots)

    def _warm_up(self) -> None:
        with Session(self._model, seed=0) as session:
            for _ in range(2):
                session.step(np.zeros(self._model.frame_size, np.float32))

    async def stop(self, drain_seconds: float | None = None) -> None:
        """Takes no more calls, lets those that run go on for a while, then ends them."""
        self._stopping = True
        self._listener.close()
        ending = Ending(WSCloseCode.SERVICE_RESTART, "shutdown", "the server is stopping")
        for call in list(self._calls):
            if call.waiting:
                call.end(ending)
        left = self.settings.drain_seconds if drain_seconds is None else drain_seconds
        if self._calls and left:
            log.info("stopping: %d calls may go on for %g s", len(self._calls), left)
        await self._all_over(left)
        for call in list(self._calls):
            call.end(ending)
        await self._all_over(5.0)
        await self._runner.cleanup()
        log.info("stopped")

    async def _all_over(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._drain_until = loop.time() + seconds
        while self._calls and loop.time() < self._drain_until:
            await asyncio.sleep(0.02)

    async def run(self) -> signal.Signals:
        """From `start` to SIGTERM, which drains, or SIGINT (Ctrl-C), which does not; returns it."""
        loop = asyncio.get_running_loop()
        asked: asyncio.Queue[signal.Signals] = asyncio.Queue()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, asked.put_nowait, number)
        try:
            await self.start()
            # What is there by now stays: a garbage collection in a call need not look through it,
            # which would take longer than a step.
            gc.collect()
            gc.freeze()
            number = await asked.get()
            stopping = loop.create_task(self.stop(0.0 if number == signal.SIGINT else None))
            while not stopping.done():  # a second one does not wait for the calls
                again = loop.create_task(asked.get())
                await asyncio.wait([stopping, again], return_when=asyncio.FIRST_COMPLETED)
                self._drain_until = loop.time()
                again.cancel()
            await stopping
            return number
        finally:
            gc.unfreeze()
            for number in signals:
                loop.remove_signal_handler(number)

    # ---- requests ------------------------------------------------------------------------------

    @web.middleware
    async def _checked(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self._listener.spoke(request.protocol)
        try:
            self._guard.check_page(request)
            response = await handler(request)
        except Refused as refused:
            response = self._refuse(refused)
        except web.HTTPException as error:
            response = self._refuse(_aiohttps_own(request, error))
        except ConnectionError:
            raise
        except Exception:
            log.exception("%s: an error of the server's own", request.path)
            response = _sentence(500, "internal", "an error of the server's own")
        if not response.prepared:
            response.headers.update(pages.HEADERS)
            response.force_close()  # the time for a request is counted from its connection
        return response

    def _refuse(self, refused: Refused) -> web.Response:
        self.metrics.refused.labels(refused.label).inc()
        response = _sentence(refused.status, refused.label, str(refused))
        response.headers.update(refused.headers)
        if refused.status in (429, 503):
            response.headers["Retry-After"] = str(_RETRY_AFTER)
        return response

    # ---- calls ---------------------------------------------------------------------------------

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        query = request.query
        # LiveKit's client sends a voice, and cannot be told to ask for more. PersonaPlex's page
        # sends one, too, but plays what comes: browsers say which page they are on.
        pausing = "voice_prompt" in query and "Origin" not in request.headers
        dtx = self.settings.dtx or pausing or query.get("dtx") == "1"
        rate, events = self._model.sample_rate, query.get("events") == "1"
        return await self._call(request, lambda: ChatWire(dtx=dtx, rate=rate, events=events))

    async def _pcm(self, request: web.Request) -> web.StreamResponse:
        def wire() -> Wire:
            query = request.query
            form = query.get("format", "f32")
            if form not in FORMATS:
                raise ValueError(f"format is {form[:40]!r}; expected f32 or s16")
            live = query.get("live", "1")
            if live not in ("0", "1"):
                raise ValueError(f"live is {live[:40]!r}; expected 0 or 1")
            rate = read_rate(
                query.get("rate", str(self._model.sample_rate)), self._model.frame_rate
            )
            return PcmWire(
                format=form, rate=rate, model_rate=self._model.sample_rate, live=live == "1"
            )

        return await self._call(request, wire)

    async def _live(self, request: web.Request) -> web.StreamResponse:
        return await self._call(request, lambda: LiveWire(self._model, self.settings.max_seconds))

    async def _realtime(self, request: web.Request) -> web.StreamResponse:
        return await self._call(request, lambda: RealtimeWire(self._model))

    async def _telephone(self, request: web.Request) -> web.StreamResponse:
        self._check_twilio(request, "ws")
        return await self._call(
            request, lambda: TwilioWire(rate=self._model.sample_rate), signed=True
        )

    async def _answer_telephone(self, request: web.Request) -> web.StreamResponse:
        fields: Any = {}
        if request.method == "POST" and request.content_type == _FORM:
            try:
                fields = await asyncio.wait_for(request.post(), _FIRST_REQUEST)
            except asyncio.TimeoutError:
                raise Refused(408, "slow", "the form did not come in time") from None
            except (ValueError, LookupError, web.RequestPayloadError):
                raise Refused(400, "form", "the body is no form in UTF-8") from None
        elif request.method not in ("GET", "POST"):
            raise _wrong_method(request, ("GET", "POST"))
        url = self._check_twilio(request, "http", [(k, str(v)) for k, v in fields.items()])
        # the line would be silent to them
        full = self._stopping or self._admission.busy >= self._admission.slots
        page = busy() if full else connect_to(url.replace("http", "ws", 1) + "/twilio/media")
        return web.Response(text=page, content_type="text/xml")

    def _check_twilio(
        self, request: web.Request, scheme: str, fields: Iterable[tuple[str, str]] = ()
    ) -> str:
        """The URL of this server that others see, for a request that Twilio has signed."""
        secret, url = self.settings.twilio_token, self.settings.public_url
        if secret is None or url is None:
            raise Refused(
                404, "twilio", "no telephone calls: there is no --twilio-token and --public-url"
            )
        url = url.rstrip("/")
        given = request.headers.get("X-Twilio-Signature", "")
        signed = url.replace("http", scheme, 1) + request.raw_path
        check_signature(given, secret, signed, fields)
        return url

    async def _call(
        self, request: web.Request, make_wire: Callable[[], Wire], *, signed: bool = False
    ) -> web.StreamResponse:
        """Everything between a request and the end of its call; a signed one needs no token."""
        if not signed:
            self._guard.check_token(request)
        address = request.remote or "unknown"
        try:
            sampling = read_sampling(request.query, self._model)
            wire = make_wire()
        except ValueError as error:
            raise Refused(400, "options", str(error)) from error
        upgrade = web.WebSocketResponse(
            timeout=1.0,
            # who is not read does not see pongs either
            heartbeat=_HEARTBEAT if wire.live else None,
            compress=False,
            autoping=False,  # the call answers, at the pace of other messages
            max_msg_size=self.settings.message_bytes,
        )
        if self._stopping:
            raise Refused(503, "stopping", "the server is stopping")
        self._guard.enter(address)
        try:
            place = self._admission.enter()
            if place is None:
                raise Refused(
                    503,
                    "full",
                    f"all {self._admission.slots} sessions and {self._admission.queue} places in "
                    "the line are taken",
                )
            try:
                # last, so that a page may ask by plain HTTP why its WebSocket was refused
                if not upgrade.can_prepare(request):
                    raise Refused(426, "upgrade", f"{request.path} is a WebSocket")
                await upgrade.prepare(request)
                self._numbers += 1
                self.metrics.connect.labels(wire.name).inc()
                call = Call(
                    self._numbers,
                    self._model,
                    self.settings,
                    self.metrics,
                    place,
                    wire,
                    sampling,
                    address,
                    lambda: any(other.live for other in self._calls),
                )
                self._calls.add(call)
                try:
                    await call.run(upgrade, _tuned(request))
                finally:
                    self._calls.discard(call)
            finally:
                place.leave()
        finally:
            self._guard.leave(address)
        return upgrade

    # ---- pages ---------------------------------------------------------------------------------

    async def _index(self, request: web.Request) -> web.StreamResponse:
        return self._page("index.html")

    async def _file(self, request: web.Request) -> web.StreamResponse:
        return self._page(request.match_info["name"])

    def _page(self, name: str) -> web.StreamResponse:
        path = self._files.get(name)
        if path is None:
            raise web.HTTPNotFound()
        return web.FileResponse(path, headers={"Content-Type": pages.content_type(path)})

    async def _info(self, request: web.Request) -> web.StreamResponse:
        model, admission = self._model, self._admission
        info = model._info
        return web.json_response(
            {
                "version": __version__,
                "model": Path(model._source).name,
                "family": model.family,
                "sample_rate": model.sample_rate,
                "frame_rate": model.frame_rate,
                "frame_size": model.frame_size,
                "sessions": admission.slots,
                "busy": admission.busy,
                "waiting": admission.waiting,
                "queue": admission.queue,
                "token": self.settings.token is not None,
                "dtx": self.settings.dtx,
                "formats": [*FORMATS],
                "defaults": {
                    "text_temperature": info["text_temperature"],
                    "text_topk": info["text_top_k"],
                    "audio_temperature": info["audio_temperature"],
                    "audio_topk": info["audio_top_k"],
                },
                "max_seconds": self.settings.max_seconds,
                "idle_seconds": self.settings.idle_seconds,
            }
        )

    async def _health(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"alive": True})

    async def _is_ready(self, request: web.Request) -> web.StreamResponse:
        ready = not (self._stopping or self._model.closed or self._admission.full)
        facts = {
            "ready": ready,
            "sessions": self._admission.slots,
            "busy": self._admission.busy,
            "waiting": self._admission.waiting,
        }
        return web.json_response(facts, status=200 if ready else 503)

    async def _metrics_text(self, request: web.Request) -> web.StreamResponse:
        self._guard.check_token(request)
        return web.Response(
            body=self.metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"}
        )


def _sentence(status: int, label: str, reason: str) -> web.Response:
    return web.json_response({"error": label, "reason": reason}, status=status)


def _aiohttps_own(request: web.Request, error: web.HTTPException) -> Refused:
    """What aiohttp refuses by itself, in the words of our own refusals."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        return _wrong_method(request, error.allowed_methods)
    if isinstance(error, web.HTTPNotFound):
        return Refused(404, "path", f"there is no {request.path[:100]!r}")
    return Refused(error.status, "http", f"{error.reason}: {request.path[:100]!r}")


def _wrong_method(request: web.Request, expected: Iterable[str]) -> Refused:
    names = sorted(expected)
    return Refused(
        405,
        "method",
        f"the method is {request.method[:20]}; expected {' or '.join(names)}",
        {"Allow": ", ".join(names)},
    )


def _tuned(request: web.Request) -> asyncio.Transport:
    """The transport, with bounds on what the system holds for a caller who does not read."""
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the connection was lost")
    connection = transport.get_extra_info("socket")
    with contextlib.suppress(OSError, AttributeError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        connection.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * _UNACKNOWLEDGED)
        )
    return transport


def _tls(certificate: str, key: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise OSError(
            f"{certificate} and {key} are not a certificate and its key ({error})"
        ) from error
    return context


def serve(model: Model, settings: Settings | None = None, **options: Any) -> None:
    """Serves a model until SIGTERM, or Ctrl-C, which is raised as ever when the calls have ended.

    Args:
        model: what `load` gave, with `max_sessions` for as many callers.
        settings, options: a Settings, or those of its fields that differ from the default.

    Raises:
        OSError: the address cannot be listened on, or `tls` is unusable.
        ValueError: an option out of range, or a model that cannot hear.
    """
    server = Server(model, replace(settings or Settings(), **options))
    if asyncio.run(server.run()) == signal.SIGINT:
        raise KeyboardInterrupt
