"""What a server is told: its settings, and the options that a caller puts into the URL."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from ..audio import check_rate
from ..errors import AudioError
from ..model import Model


@dataclass(frozen=True, slots=True)
class Settings:
    """host, port: where to listen; port 0 takes a free one.
    seed: of callers who ask for none; None draws one for each.
    sessions: callers who talk at once; None for as many as the model was loaded for.
    queue: callers who may wait for a slot; those after them are refused at once.
    token: what callers must know; None lets everyone in who reaches the port.
    tls: certificate and key, two PEM files.
    insecure: allows a host or a public_url that others can reach without a token.
    origins: web pages of other hosts that may connect, such as "https://example.org".
    public_url: where others reach this server, through a proxy or tunnel too; Twilio signs it.
    twilio_token: the auth token of the Twilio account whose telephone calls are taken, on
        `/twilio/media`; None takes none.
    dtx: sends nothing while the model is silent, on `/api/chat`, to every caller.
    max_seconds: a call ends after this; 0 is never.
    idle_seconds: a call ends after this without any sound from the caller; 0 is never.
    slow_seconds: a caller who has not read for this long is hung up on.
    drain_seconds: after SIGTERM, how long calls may go on.
    per_address: calls from one address at once, and four connections for each of them; 0 is no
        bound, for a server behind a proxy, whose address all callers have. Of IPv6 the first 64
        bits count.
    connections: connections in all, TLS handshakes among them.
    message_bytes: the largest message taken.
    messages_per_second: a caller who sends more is read more slowly.
    silence_after: a live frame later than this many seconds is replaced by silence.
    backlog_seconds: sound waiting on the way in or out before the oldest is dropped.
    keepalive_seconds: `/api/chat` sends a ping when nothing else went out for so long.
    """

    host: str = "127.0.0.1"
    port: int = 8998
    seed: int | None = None
    sessions: int | None = None
    queue: int = 8
    token: str | None = None
    tls: tuple[str, str] | None = None
    insecure: bool = False
    origins: tuple[str, ...] = ()
    public_url: str | None = None
    twilio_token: str | None = None
    dtx: bool = False
    max_seconds: float = 3600.0
    idle_seconds: float = 60.0
    slow_seconds: float = 10.0
    drain_seconds: float = 10.0
    per_address: int = 16
    connections: int = 512
    message_bytes: int = 1 << 20
    messages_per_second: int = 500
    silence_after: float = 0.2
    backlog_seconds: float = 2.0
    keepalive_seconds: float = 3.0

    def __post_init__(self) -> None:
        for name, least in (("queue", 0), ("per_address", 0), ("connections", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {least} or more")
        if self.sessions is not None and self.sessions < 1:
            raise ValueError(f"sessions is {self.sessions}; expected 1 or more")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port is {self.port}; expected 0 to 65535")
        for origin in self.origins:
            if not re.fullmatch(r"https?://[^/?#\s]+/?", origin):
                raise ValueError(
                    f"the origin {origin!r} is no page's; expected one like https://example.org"
                )
        if self.token is not None and len(self.token) < 8:
            raise ValueError(f"the token has {len(self.token)} characters; expected 8 or more")
        if self.public_url is not None and not _is_url(self.public_url):
            raise ValueError(
                f"public_url is {self.public_url[:80]!r}; expected one such as https://example.org"
            )
        if self.twilio_token is not None and (not self.twilio_token or self.public_url is None):
            raise ValueError(
                "telephone calls by Twilio need the account's auth token, and the public URL over "
                "which Twilio signs: give --twilio-token T and --public-url URL"
            )
        public = urlsplit(self.public_url or "").hostname
        for name in (self.host, public or "localhost"):
            if not is_loopback(name) and self.token is None and not self.insecure:
                raise ValueError(
                    f"{name} can be reached by others, and there is no token: give --token T, "
                    "or --insecure to let everyone in"
                )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_url(text: str) -> bool:
    """Whether it leads to a server, and asks for nothing of it."""
    try:
        parts = urlsplit(text)
        named = text.startswith(("http://", "https://")) and bool(parts.hostname)
        return named and not (parts.query or parts.fragment) and (parts.port or 1) > 0
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a caller wants the model to draw; None is the checkpoint's."""

    seed: int | None = None
    text_temperature: float | None = None
    text_top_k: int | None = None
    audio_temperature: float | None = None
    audio_top_k: int | None = None


def read_sampling(query: Mapping[str, str], model: Model) -> Sampling:
    """From a query string, by the names of the published servers; other names are theirs, and
    ignored.

    Raises:
        ValueError: a value that is no number, or out of range.
    """
    seed = query.get("seed") or query.get("text_seed") or query.get("audio_seed")
    seed = None if seed == "-1" else seed  # PersonaPlex's word for any
    return Sampling(
        seed=None if seed is None else int(read_number("seed", seed, 0, 2**64 - 1, int)),
        text_temperature=_temperature(query, "text_temperature"),
        text_top_k=_top_k(query, "text_topk", int(model._info["text_card"])),
        audio_temperature=_temperature(query, "audio_temperature"),
        audio_top_k=_top_k(query, "audio_topk", int(model._info["card"])),
    )


def _temperature(query: Mapping[str, str], name: str) -> float | None:
    text = query.get(name)
    return None if not text else read_number(name, text, 0, 100, float)


def _top_k(query: Mapping[str, str], name: str, card: int) -> int | None:
    text = query.get(name)
    # a page's default may be more than a small model has
    return None if not text else min(int(read_number(name, text, 0, 2**31, int)), card)


def read_number(
    name: str, text: str, least: float, most: float, kind: type[int] | type[float]
) -> float:
    """The number that an option's text says.

    Raises:
        ValueError: it says none, or one out of range.
    """
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"{name} is {text[:40]!r}; expected a number") from None
    if not least <= value <= most:
        raise ValueError(f"{name} is {text[:40]}; expected {least} to {most}")
    return value


def read_rate(text: str, frame_rate: float) -> int:
    """A sampling rate, Hz, with a whole number of samples in a frame.

    Raises:
        ValueError: it is none.
    """
    try:
        rate = check_rate(int(text), "rate")
    except (AudioError, ValueError) as error:
        raise ValueError(f"rate is {text[:40]!r}; expected 1000 to 192000 Hz") from error
    if rate > 192_000 or (rate / frame_rate) % 1:
        raise ValueError(f"rate is {rate}; expected a multiple of 25 up to 192000 Hz")
    return rate
