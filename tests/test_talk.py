"""moshi_c.notebook: a call whose sound comes and goes as messages of a widget in a real kernel."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sound
import traitlets
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import start_new_kernel

import moshi_c
from moshi_c.notebook import WAITING_PIECES, Talk, talk

pytestmark = pytest.mark.python

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "live_call.ipynb"
VIEW = "application/vnd.jupyter.widget-view+json"


def question(text: str, rate: int = 24000) -> sound.Sound:
    """Asked as a page would send it: with silence around, at the page's rate."""
    pcm = np.pad(0.5 * sound.speech(text, "en-us+m3", 150), (12000, 96000))
    return moshi_c.audio.resample(pcm.astype(np.float32), 24000, rate)


def pieces_of(pcm: sound.Sound, rate: int) -> Iterator[bytes]:
    size = rate * 80 // 1000
    for start in range(0, len(pcm), size):
        yield (32767 * pcm[start : start + size]).astype("<i2").tobytes()


class Page:
    """What a browser does: it sends messages to the widget's comm and reads those that come."""

    def __init__(self, client: BlockingKernelClient) -> None:
        self.client = client
        self.comm = ""
        self.state: dict[str, Any] = {}
        self.came: list[tuple[dict[str, Any], bytes]] = []

    def run(self, code: str) -> str:
        """Runs a cell; what it printed."""
        printed: list[str] = []

        def output(message: dict[str, Any]) -> None:
            content = message["content"]
            if message["msg_type"] == "stream":
                printed.append(content["text"])
            elif message["msg_type"] == "error":
                raise AssertionError("\n".join(content["traceback"]))
            elif VIEW in content.get("data", {}):
                self.comm = content["data"][VIEW]["model_id"]
            else:
                self._take(message)

        self.client.execute_interactive(code, output_hook=output, timeout=120)
        return "".join(printed)

    def send(self, content: dict[str, Any], buffers: list[bytes] | None = None) -> None:
        data = {"comm_id": self.comm, "data": {"method": "custom", "content": content}}
        session = self.client.session
        message = session.msg("comm_msg", data)
        session.send(self.client.shell_channel.socket, message, buffers=buffers or [])

    def until(self, done: Any) -> None:
        """Reads what comes until `done()`."""
        deadline = time.monotonic() + 300
        while not done():
            assert time.monotonic() < deadline, self.came
            self._take(self.client.get_iopub_msg(timeout=300))

    def _take(self, message: dict[str, Any]) -> None:
        content = message["content"]
        if message["msg_type"] != "comm_msg" or content["comm_id"] != self.comm:
            return
        data = content["data"]
        if data["method"] == "custom":
            self.came.append((data["content"], b"".join(map(bytes, message["buffers"]))))
        elif data["method"] == "update":
            self.state.update(data["state"])

    @property
    def text(self) -> str:
        return "".join(message.get("text", "") for message, _ in self.came).strip()


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        page = Page(client)
        page.run(
            "import moshi_c\nfrom moshi_c.notebook import talk\ncall = talk(seed=7)\ndisplay(call)"
        )
        assert page.comm
        yield page
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("rate", [24000, 48000, 44100])
def test_a_question_by_message_is_answered_by_message(page: Page, rate: int) -> None:
    page.came.clear()
    page.send({"type": "start", "rate": rate})
    page.until(lambda: page.state.get("live") is True)
    pieces = list(pieces_of(question("what colour is the sky", rate), rate))
    for number, piece in enumerate(pieces):
        page.send({"type": "sound"}, [piece])
        # as a page does that is in time with the sound
        page.until(lambda sent=number: len(page.came) >= sent - 5)
    page.send({"type": "stop"})
    page.until(lambda: page.state["live"] is False)
    assert page.text == "the sky is blue"
    assert {message["type"] for message, _ in page.came} == {"frame"}
    assert len(pieces) - 2 <= len(page.came) <= len(pieces)
    voice = np.frombuffer(b"".join(data for _, data in page.came), "<i2") / 32768
    assert len(voice) == 1920 * len(page.came) and np.abs(voice).max() > 0.05
    user, model = ([message[side] for message, _ in page.came] for side in ("user", "model"))
    assert max(user[:25]) > -30 > max(user[40:]) and max(model[:12]) < -45 < max(model[25:])
    # The kernel knows the same, while it is free for other cells.
    printed = page.run("print(call.recording.text, len(call.recording.pcm), call.dropped)")
    assert printed.split() == ["the", "sky", "is", "blue", str(len(voice)), "0"]


def test_a_cell_can_put_words_into_the_call(page: Page) -> None:
    page.came.clear()
    page.run("call.start(); call.say('the sky is green')")
    for piece in pieces_of(sound.silence(3), 24000):
        page.send({"type": "sound"}, [piece])
    page.until(lambda: "green" in page.text)
    assert page.run("print(call.stop().text)").strip() == "the sky is green" == page.text


def test_what_is_wrong_is_told_in_the_widget(page: Page) -> None:
    for message, words in (
        ({"type": "start", "rate": 7}, "rate is 7"),
        ({"type": "start"}, "rate"),
        ({"type": "sound"}, "index"),
        ([], "indices"),
    ):
        page.came.clear()
        page.send(message)  # type: ignore[arg-type]
        page.until(lambda: page.came)
        assert page.came[0][0]["type"] == "error" and words in page.came[0][0]["message"]
    assert page.state["live"] is False


def test_a_word_that_it_cannot_say_does_not_end_the_call() -> None:
    with moshi_c.load() as model:
        call = Told(model, seed=7)
        call.start()
        call.say("日")
        call.hear(question("how are you"))
        assert call.stop().text.strip() == "i am fine thank you"
        assert ["日" in error for error in call.errors] == [True]


class Told(Talk):
    """Without a page: keeps what would be sent."""

    @property
    def errors(self) -> list[str]:
        return self.__dict__.setdefault("told", [])

    def send(self, content: Any, buffers: Any = None) -> None:
        if content["type"] == "error":
            self.errors.append(content["message"])


def test_a_call_is_what_a_session_says_frame_by_frame() -> None:
    pcm = question("what is your name")
    with moshi_c.load() as model:
        call = talk(model, seed=3)
        call.start()
        assert call.live
        with pytest.raises(moshi_c.SessionError, match="this call is on"):
            call.start()
        for start in range(0, len(pcm), 1000):
            call.hear(pcm[start : start + 1000])
        recording = call.stop()
        assert not call.live and recording.text.strip() == "my name is moshi"
        with moshi_c.Session(model, seed=3) as session:
            frames = session.push(pcm)
        np.testing.assert_array_equal(recording.pcm, np.concatenate([f.pcm for f in frames]))
        np.testing.assert_array_equal(recording.user_pcm, pcm[: len(frames) * 1920])
        for refused in (lambda: call.hear(pcm), lambda: call.say("hello")):
            with pytest.raises(moshi_c.SessionError, match="no call is on"):
                refused()


class Held(Told):
    """Its thread waits in each frame until it may go on."""

    def __init__(self, model: moshi_c.Model) -> None:
        super().__init__(model, seed=7)
        self.stepped, self.go_on = threading.Event(), threading.Event()

    def _show(self, frame: moshi_c.Frame, heard: sound.Sound) -> None:
        self.stepped.set()
        assert self.go_on.wait(300)
        super()._show(frame, heard)


def test_sound_that_waits_is_bounded() -> None:
    with moshi_c.load() as model:
        call = Held(model)
        piece = bytes(3840)
        call._receive(call, {"type": "start", "rate": 24000}, [])
        call._receive(call, {"type": "sound"}, [piece])
        assert call.stepped.wait(300)
        for _ in range(WAITING_PIECES + 10):
            call._receive(call, {"type": "sound"}, [piece])
        assert call.dropped == 10
        call.go_on.set()
        assert call.stop().duration == (1 + WAITING_PIECES) * 0.08


def test_a_model_stays_open_while_it_is_called() -> None:
    model = moshi_c.load()
    call = Told(model, seed=7)
    call.start()
    with pytest.raises(moshi_c.SessionError, match="1 open session"):
        model.close()
    call.stop()
    model.close()
    with pytest.raises(moshi_c.SessionError, match="closed"):
        call.start()
    assert not call.live and not call.errors


def test_options_are_checked_before_there_is_a_call() -> None:
    with pytest.raises(TypeError, match="sed"):
        talk(sed=7)
    with pytest.raises(moshi_c.AudioError, match="sample_rate"):
        talk(sample_rate=8000)
    with pytest.raises(moshi_c.SessionError, match="no call"):
        _ = talk().recording


def test_the_page_s_side_speaks_of_the_same_messages() -> None:
    script = (Path(moshi_c.__file__).parent / "data" / "talk.js").read_text("utf-8")
    assert set(re.findall(r'send\(\{ type: "(\w+)"', script)) == {"start", "sound", "stop"}
    assert set(re.findall(r'model\.get\("(\w+)"\)', script)) == {"live"}
    assert set(re.findall(r"message\.(\w+)", script)) == {
        *("type", "message", "text", "user", "model", "rate")
    }
    assert not re.search(r"https?://|import ", script), "nothing is fetched"
    assert isinstance(Talk.live, traitlets.Bool)


# ---- the notebook ------------------------------------------------------------------------------


def test_the_notebook_of_a_live_call_runs() -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, 4)
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    shown = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    for outputs in shown:
        assert outputs and all(output.get("name", "stdout") == "stdout" for output in outputs)
    assert VIEW in shown[0][-1]["data"]
    for outputs, words in ((shown[1], "the sky is blue"), (shown[3], "the sky is green")):
        page = outputs[-1]["data"]["text/html"]
        assert "data:audio/mpeg;base64," in page and f">{words}<" in page
    printed = shown[2][0]["text"].splitlines()
    assert [line.split()[-1] for line in printed] == ["the", "sky", "is", "blue"]


def test_the_committed_notebook_has_not_run_and_its_picture_is_there() -> None:
    text = NOTEBOOK.read_text("utf-8")
    for cell in json.loads(text)["cells"]:
        assert cell["cell_type"] == "markdown" or not cell["outputs"]
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    data = (NOTEBOOK.parent / picture).read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) < 100_000
