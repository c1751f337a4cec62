"""Chromium without a window, driven over its own debugging pipe: no driver is needed.

What goes through the pipe are JSON objects that end with a zero byte, to the browser on
descriptor 3 and from it on 4; https://chromedevtools.github.io/devtools-protocol/ has the methods.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--remote-debugging-pipe",
    # A name that leads here and that no browser takes for this machine.
    "--host-resolver-rules=MAP moshi.test 127.0.0.1",
)

#: For what should come at once on an idle machine, and has to come on a busy one.
PATIENCE_S = 60.0


class Browser:
    """A browser with a profile of its own; its microphone plays `microphone`, a WAV file, once."""

    def __init__(self, folder: Path, microphone: Path) -> None:
        program = shutil.which("chromium")
        if program is None:
            raise RuntimeError("chromium is not installed; the tests of the page need it")
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        flags = [
            *FLAGS,
            f"--user-data-dir={folder / 'profile'}",
            f"--use-file-for-fake-audio-capture={microphone}%noloop",
        ]
        # The browser wants its ends as 3 and 4, whatever they are here.
        script = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "browser", program, *flags],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer = b""
        self._last_id = 0
        self.downloads = folder / "downloads"
        self.downloads.mkdir()
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The result of a method; events that come meanwhile are kept in `events`."""
        self._last_id += 1
        number = self._last_id
        message = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        data = memoryview(json.dumps(message).encode() + b"\0")
        while data:
            data = data[os.write(self._out, data) :]
        deadline = time.monotonic() + PATIENCE_S
        while True:
            answer = self._read(deadline, method)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result
            if "method" in answer:
                self.events.append(answer)

    def wait_event(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first event that is wanted, of those that came and those to come."""
        deadline = time.monotonic() + PATIENCE_S
        seen = 0
        while True:
            for event in self.events[seen:]:
                if wanted(event):
                    return event
            seen = len(self.events)
            answer = self._read(deadline, "an event")
            if "method" in answer:
                self.events.append(answer)

    def _read(self, deadline: float, what: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._in, 1 << 16) if ready else b""
            if not data:
                why = "has ended" if ready else f"gave no answer in {PATIENCE_S:.0f} s"
                raise RuntimeError(f"chromium {why}: {what}")
            self._buffer += data
        first, self._buffer = self._buffer.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(first)
        return answer

    def open(self, url: str, storage: dict[str, str] | None = None) -> Page:
        """A new page with a storage of its own, which holds this when the page is loaded first."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        self.call(
            "Browser.setDownloadBehavior",
            behavior="allow",
            browserContextId=context,
            downloadPath=str(self.downloads),
            eventsEnabled=True,
        )
        self.call(
            "Browser.grantPermissions", permissions=["audioCapture"], browserContextId=context
        )
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)
        session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = Page(self, session["sessionId"], target["targetId"], context)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.look(1200, 800)
        for key, value in (storage or {}).items():
            script = f"localStorage[{json.dumps(key)}] ??= {json.dumps(value)};"
            page.call("Page.addScriptToEvaluateOnNewDocument", source=script)
        page.go(url)
        return page

    def close(self) -> None:
        with contextlib.suppress(RuntimeError, OSError):
            self.call("Browser.close")
        try:
            self._process.wait(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._in)
        os.close(self._out)


class Page:
    """One page; what it logged and fetched is in the browser's events."""

    def __init__(self, browser: Browser, session: str, target: str, context: str) -> None:
        self.browser, self.session, self.target, self.context = browser, session, target, context

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def go(self, url: str) -> None:
        self.browser.events = [e for e in self.browser.events if e.get("sessionId") != self.session]
        self.call("Page.navigate", url=url)
        self.browser.wait_event(
            lambda event: (
                event.get("sessionId") == self.session and event["method"] == "Page.loadEventFired"
            )
        )

    def look(self, width: int, height: int, *, dark: bool = False, scale: float = 1) -> None:
        """The size of the window, and the colours that the user prefers."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def evaluate(self, script: str) -> Any:
        """The value of an expression or of the promise that it is."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise RuntimeError(details.get("exception", details).get("description", details))
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        found: str = self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")
        return found

    def wait(self, condition: str, what: str, seconds: float = PATIENCE_S) -> Any:
        """The expression's value as soon as it is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(condition)):
            if time.monotonic() > deadline:
                state = self.evaluate("document.body.innerText")
                raise AssertionError(f"{what}: not within {seconds} s; the page says: {state}")
            time.sleep(0.05)
        return value

    def click(self, selector: str) -> None:
        """A press where the element lies, as a hand would do it."""
        x, y = self.evaluate(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """A key of the keyboard: a letter, "Enter", "Tab" or " "."""
        text = {"Enter": "\r", "Tab": ""}.get(key, key)
        code = {"Enter": 13, "Tab": 9}.get(key) or ord(key.upper())
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                windowsVirtualKeyCode=code,
                **({"text": text} if text and kind == "keyDown" else {}),
            )

    def picture(self) -> bytes:
        """What is seen, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def complaints(self) -> list[str]:
        """What the console shows; the page itself writes nothing there."""
        self.evaluate("0")  # so that what was logged has arrived
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            details = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                thrown = details["exceptionDetails"]
                found.append(thrown.get("exception", thrown).get("description", str(thrown)))
            elif event["method"] == "Log.entryAdded":
                entry = details["entry"]
                if entry["level"] in ("error", "warning"):
                    found.append(f"{entry['text']} {entry.get('url', '')}")
            elif event["method"] == "Runtime.consoleAPICalled":
                found.append(f"{details['type']}: {[p.get('value') for p in details['args']]}")
        return found

    def requested(self) -> list[str]:
        """Every address that the page asked for, WebSockets too."""
        self.evaluate("0")
        urls = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            if event["method"] == "Network.requestWillBeSent":
                urls.append(event["params"]["request"]["url"])
            elif event["method"] == "Network.webSocketCreated":
                urls.append(event["params"]["url"])
        return urls

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)
        self.browser.call("Target.disposeBrowserContext", browserContextId=self.context)
