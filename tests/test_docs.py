"""The documents' code runs as printed, and what they point to is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fake_hub
import pytest
import sound
import soundfile

import moshi_c

pytestmark = pytest.mark.python

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    if "```python" in path.read_text("utf-8")
)


def blocks_of(path: Path) -> list[str]:
    """The Python of a page; what is included from a file has tests of its own."""
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [block for block in blocks if not block.startswith("--8<--")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_python_of_a_page_runs_as_printed(page: Path, mimi_full: Path, tmp_path: Path) -> None:
    # What the pages name: a question, a folder, a codec, and a hub with the published model's name.
    tiny = moshi_c.hub.packaged_model()
    (tmp_path / "demo").mkdir()
    soundfile.write(tmp_path / "demo" / "question.wav", sound.speech("how are you"), 24000)
    shutil.copytree(tiny, tmp_path / "path" / "to" / "folder")
    (codec,) = mimi_full.glob("*.safetensors")
    (tmp_path / "path" / "to" / "mimi.safetensors").symlink_to(codec)
    shutil.copytree(tiny, tmp_path / "hub" / "kyutai" / "moshiko-pytorch-bf16")
    script = tmp_path / "page.py"
    script.write_text("import moshi_c\n" + "\n".join(blocks_of(page)), "utf-8")
    with fake_hub.serve(tmp_path / "hub") as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
        }
        done = subprocess.run(
            [sys.executable, str(script)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stderr


def test_every_example_is_in_the_recipes() -> None:
    recipes = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    for path in (ROOT / "examples").glob("*.py"):
        assert f"examples/{path.name}" in recipes, f"docs/recipes.md does not show {path.name}"


def test_every_command_is_in_the_reference() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moshi_c", "--help"], capture_output=True, text=True, check=True
    )
    commands = re.findall(r"^    (\w+) ", done.stdout, re.MULTILINE)
    assert "run" in commands
    reference = (ROOT / "docs" / "cli.md").read_text("utf-8")
    assert sorted(re.findall(r"\{\{ help: (\w+) \}\}", reference)) == sorted(commands)


def test_every_mark_is_one_that_the_site_fills_in() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        for mark in re.findall(r"\{\{.*?\}\}", page.read_text("utf-8")):
            assert re.fullmatch(r"\{\{ \w+: [^}]+? \}\}", mark), f"{page.name} has {mark}"


def test_every_variable_is_in_the_reference() -> None:
    reference = (ROOT / "docs" / "cli.md").read_text("utf-8")
    read = {ROOT / "setup.py"}
    for folder, kind in (("csrc", "*.c"), ("cuda", "*.cu"), ("moshi_c", "*.py")):
        read.update((ROOT / folder).rglob(kind))
    names = {
        name for path in read for name in re.findall(r'"(MOSHI_C_\w+)"', path.read_text("utf-8"))
    }
    assert "MOSHI_C_THREADS" in names
    for name in names:
        assert f"`{name}" in reference, f"docs/cli.md does not name {name}"


def test_links_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
            if not re.match(r"[a-z]+:", target) and target != "model-card.md":
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
