"""A hub on this machine: it serves folders as repositories the way huggingface_hub asks for them,
and fails as it is told to."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves `folder`/org/name as the repository org/name.

    broken: names of files -> after how many bytes the connection breaks, each once.
    refused: the status and error code of every answer, if any.
    lies: names of files that arrive with one byte changed.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.broken: dict[str, int] = {}
        self.refused: tuple[int, str] | None = None
        self.lies: set[str] = set()
        self.ranges: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None:
        """A client that goes away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _find(self) -> tuple[str, bytes] | None:
        """The file asked for, after the headers; None when there is nothing to send."""
        repo, _, rest = self.path.lstrip("/").partition("/resolve/")
        name = rest.partition("/")[2]
        file = self.server.folder / repo / name
        if self.server.refused is not None:
            status, code = self.server.refused
            self._answer(status, {"X-Error-Code": code, "Content-Length": "0"})
            return None
        if not file.is_file():
            self._answer(404, {"X-Error-Code": "EntryNotFound", "Content-Length": "0"})
            return None
        data = file.read_bytes()
        start = 0
        if asked := self.headers.get("Range"):
            self.server.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").partition("-")[0])
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Content-Length": str(len(data) - start),
            "Accept-Ranges": "bytes",
        }
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._answer(206 if start else 200, headers)
        if name in self.server.lies:
            data = data[:-1] + bytes([data[-1] ^ 1])
        return name, data[start:]

    def do_HEAD(self) -> None:
        self._find()

    def do_GET(self) -> None:
        found = self._find()
        if found is None:
            return
        name, data = found
        self.wfile.write(data[: self.server.broken.pop(name, len(data))])
        self.close_connection = True


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """A hub for the duration of a test."""
    with Hub(folder) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
