"""The notebook runs, cell by cell, and shows what it says."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moshi_c

pytestmark = pytest.mark.python

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NOTEBOOK = EXAMPLES / "first_conversation.ipynb"


def code_cells() -> list[dict[str, Any]]:
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def ran() -> list[Any]:
    """The code cells with their outputs, from a fresh kernel."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, 4)
    where = {"metadata": {"path": str(EXAMPLES)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(cells: list[Any], part: str, kind: str) -> list[str]:
    """What the one cell whose source holds `part` put out: streams by name, data by MIME type."""
    (cell,) = (cell for cell in cells if part in cell.source)
    found = []
    for output in cell.outputs:
        if output.get("name") == kind:
            found.append(output["text"])
        elif kind in output.get("data", {}):
            found.append(output["data"][kind])
    return found


@pytest.mark.slow
def test_every_cell_runs_and_has_nothing_to_warn_of(ran: list[Any]) -> None:
    assert len(ran) >= 10
    for number, cell in enumerate(ran, 1):
        assert cell.execution_count == number
        kinds = [output.get("name", output["output_type"]) for output in cell.outputs]
        assert kinds and "stderr" not in kinds and "error" not in kinds, cell.source


@pytest.mark.slow
def test_the_question_and_the_answer_can_be_heard(ran: list[Any]) -> None:
    for part, count in (("def spoken", 1), ("answer =", 1), ("mimi.decode", 4)):
        players = outputs(ran, part, "text/html")
        assert len(players) == count
        for html in players:
            data = re.search(r"data:audio/wav;base64,([^\"]+)", html)
            assert data is not None
            samples = np.frombuffer(base64.b64decode(data[1])[44:], "<i2")
            assert len(samples) > 4 * 24000 and samples.std() > 100
    (recording,) = outputs(ran, "recording = session.run", "text/html")
    assert "data:audio/mpeg;base64," in recording and "<svg" in recording


@pytest.mark.slow
def test_the_words_that_come_frame_by_frame_are_those_of_the_recording(ran: list[Any]) -> None:
    live = "".join(outputs(ran, "session.step(pcm)", "stdout"))
    pieces = re.findall(r"^\d+\.\d\d s (.*)$", live, re.MULTILINE)
    said = "".join(pieces).strip()
    assert len(said.split()) >= 2
    whole = "".join(outputs(ran, "print(recording.text)", "stdout"))
    assert whole.split("\n")[0].strip() == said
    assert len(re.findall(r"^\d+\.\d\d to \d+\.\d\d s: \S+$", whole, re.MULTILINE)) == len(
        said.split()
    )
    (html,) = outputs(ran, "recording = session.run", "text/html")
    assert f">{said}<" in html
    assert len(outputs(ran, "display(frame)", "text/html")) == 8


@pytest.mark.slow
def test_the_pictures_are_not_blank(ran: list[Any]) -> None:
    from PIL import Image

    for part in ("recording.plot()", "recording.plot(start"):
        (data,) = outputs(ran, part, "image/png")
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert min(picture.size) > 600
        assert len(np.unique(np.asarray(picture.convert("RGBA")).view(np.uint32))) > 1000


@pytest.mark.slow
def test_what_is_changed_changes_the_conversation(ran: list[Any]) -> None:
    drawn = "".join(outputs(ran, "for temperature", "stdout")).splitlines()
    said = [line.split(": ", 1)[1] for line in drawn]
    assert len(said) == 6
    assert said[0] == said[1], "temperature 0 does not draw"
    assert len(set(said)) > 1
    assert "the sky is green" in "".join(outputs(ran, "other.say", "text/html"))
    assert "data:audio" in "".join(outputs(ran, "more = session.run", "text/html"))
    assert "real_time_factor" in "".join(outputs(ran, "session.stats", "text/plain"))


def test_without_espeak_the_question_beside_the_notebook_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.chdir(EXAMPLES)
    names: dict[str, Any] = {}
    for cell in code_cells()[:2]:
        exec("".join(cell["source"]), names)
    assert "what colour is the sky?" in capsys.readouterr().out
    question = names["question"]
    assert question.dtype == np.float32 and len(question) % 1920 == 0
    loud = np.flatnonzero(np.abs(question) > 0.01) / 24000
    assert 0.5 <= loud[0] < loud[-1] < 3.0
    with names["model"] as model, moshi_c.Session(model, seed=7) as session:
        assert session.run(question).text.strip()


def test_what_is_committed_is_small_and_has_not_run() -> None:
    for cell in code_cells():
        assert not cell["outputs"] and cell["execution_count"] is None
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", NOTEBOOK.read_text("utf-8"))
    assert pictures == ["first_conversation.png"]
    data = (EXAMPLES / pictures[0]).read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) <= 200_000
    assert (EXAMPLES / "question.ogg").stat().st_size < 30_000
