"""The server behind `moshi-c serve`: one model, many callers, a page in the browser.

    import moshi_c
    from moshi_c.server import serve

    with moshi_c.load(max_sessions=8) as model:
        serve(model, port=8998)              # until Ctrl-C or SIGTERM

Needs `pip install 'moshi_c[server]'`. asyncio only moves bytes here; frames are stepped by the
engine's own thread, which takes all callers that have a frame ready in one step.
"""

from .app import Server, serve
from .logs import logging_to_stderr
from .settings import Settings

__all__ = ["Server", "Settings", "logging_to_stderr", "serve"]
