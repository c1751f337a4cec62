"""`moshi-c serve` in a process of its own, for as long as a test needs it."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

#: Seconds for a server to end; it takes a fraction of one.
PATIENCE_S = 60.0


class Server:
    """`moshi-c serve` on a port of this machine."""

    def __init__(self, *options: str, port: int = 0) -> None:
        command = [sys.executable, "-m", "moshi_c", "serve", "--port", str(port), *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"listening on (http://[^\s/]+:(\d+))", line):
                self.url, self.port = f"{found[1]}/", int(found[2])
                return
        raise RuntimeError(f"the server ended with {self.process.wait()}")

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        self.process.communicate(timeout=PATIENCE_S)


@contextlib.contextmanager
def serving(*options: str, port: int = 0) -> Iterator[Server]:
    server = Server(*options, port=port)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.end(signal.SIGKILL)
