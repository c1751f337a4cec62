"""Who may connect: token, web page, host name, number of connections; how fast they may send."""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Mapping
from urllib.parse import urlsplit

from aiohttp import web

from .listener import neighbourhood
from .settings import Settings, is_loopback


class Refused(Exception):
    """A request that is refused before its upgrade.

    status: of the answer. label: one word, for the metrics and clients. reason: a sentence for
    people. headers: of the answer.
    """

    def __init__(
        self, status: int, label: str, reason: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(reason)
        self.status, self.label, self.headers = status, label, headers or {}


class Guard:
    """The checks of one server; each raises Refused. What a caller sends as a token is never kept
    or logged."""

    def __init__(self, settings: Settings) -> None:
        self._token = None if settings.token is None else settings.token.encode()
        known = [*settings.origins, *([settings.public_url] if settings.public_url else [])]
        self._origins = {_authority(origin) for origin in known}
        # A page of another name that leads to this machine (DNS rebinding) has the name as its host
        self._own_names_only = self._token is None and is_loopback(settings.host)
        self._per_address = settings.per_address
        self._open: Counter[str] = Counter()

    def check_page(self, request: web.Request) -> None:
        """For every request."""
        # request.host of some aiohttp looks the machine's own name up when there is none
        host = _authority(f"//{request.headers.get('Host', '')}")
        if self._own_names_only and not is_loopback(_name(host)) and host not in self._origins:
            raise Refused(403, "host", f"this server does not answer to the name {_name(host)!r}")
        origin = request.headers.get("Origin")
        if origin is not None and (
            not _name(_authority(origin))  # "null", as pages say that hide where they are from
            or _authority(origin) not in {host, *self._origins}
        ):
            raise Refused(403, "origin", "pages of another host may not connect here")

    def check_token(self, request: web.Request) -> None:
        """For what costs something or tells something."""
        if self._token is None:
            return
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer":
            given = request.headers.get("api-key") or request.query.get("token", "")
        if not hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._token):
            bearer = {"WWW-Authenticate": "Bearer"}
            raise Refused(401, "token", "a token is needed, and this is not it", bearer)

    def enter(self, address: str) -> None:
        """One more call from this address."""
        address = neighbourhood(address)
        if self._per_address and self._open[address] >= self._per_address:
            raise Refused(
                429, "address", f"{self._per_address} calls from one address are the most at once"
            )
        self._open[address] += 1

    def leave(self, address: str) -> None:
        """One fewer."""
        address = neighbourhood(address)
        self._open[address] -= 1
        if self._open[address] <= 0:
            del self._open[address]


def _authority(url: str) -> tuple[str, int | None]:
    """Host and port of a URL, as far as they can be told."""
    try:
        parts = urlsplit(url)
        port = parts.port
        if (parts.scheme, port) in (("http", 80), ("https", 443)):
            port = None
        return (parts.hostname or "").lower(), port
    except ValueError:
        return "", None


def _name(authority: tuple[str, int | None]) -> str:
    return authority[0]


class Allowance:
    """So much a second, and as much at once: a bucket that fills with time."""

    def __init__(self, per_second: float) -> None:
        self._rate = per_second
        self._left = per_second
        self._time: float | None = None

    def wait(self, now: float, amount: float) -> float:
        """Takes an amount; returns the seconds to wait before the next."""
        if self._time is not None:
            self._left = min(self._rate, self._left + (now - self._time) * self._rate)
        self._time = now
        self._left -= amount
        return max(0.0, -self._left / self._rate)
