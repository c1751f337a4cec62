"""The page in the browser: files of the package, and the headers that keep it to itself."""

from __future__ import annotations

import mimetypes
from pathlib import Path

FOLDER = Path(__file__).with_name("page")

#: Nothing from elsewhere: no scripts, styles, pictures or connections.
HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "worker-src 'self'",
            "style-src 'self'",
            "img-src 'self' data:",
            "media-src 'self' blob:",
            "connect-src 'self'",
            "manifest-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}

_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".webmanifest": "application/json"}


def files() -> dict[str, Path]:
    """Every file by its path below `/page/`; a request can name no other."""
    found = sorted(path for path in FOLDER.rglob("*") if path.is_file())
    return {path.relative_to(FOLDER).as_posix(): path for path in found}


def content_type(path: Path) -> str:
    """Of a file of the page."""
    return _TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "text/plain"
