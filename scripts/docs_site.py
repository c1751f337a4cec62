"""Hooks of mkdocs: what the site takes from the repository, so that nothing is written twice.

README.md, CONTRIBUTING.md, CHANGELOG.md and the small model's card become pages, with their links
pointing into the site. In pages of docs/ these stand for what the build finds out:

    {{ compare: codec_1_threads.frame.ours.p50_ms | .1f }}   a number of benchmarks/results
    {{ run: examples/batch.py }}                             what an example prints
    {{ help: run }}                                          the help of a command
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

#: Files of the repository that are pages here.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "moshi_c/data/moshi-tiny/README.md": "model-card.md",
}
#: Where other links into the repository lead.
ELSEWHERE = {
    "benchmarks/results": "performance.md",
    "examples": "recipes.md",
    "examples/first_conversation.ipynb": "notebooks.md",
    "examples/live_call.ipynb": "notebooks.md",
}
#: Sections of README.md that have a page of their own here.
LEFT_OUT = ("Speed", "More")
SHOWN = {".png", ".ogg", ".svg"}

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_OUTSIDE = re.compile(r"(?<=\])\(\.\./([^)\s]+)\)")
_MARK = re.compile(r"\{\{ (\w+): ([^}]+?) \}\}")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made of files outside docs/, and what they show."""
    assets: set[str] = set()
    for file in files.documentation_pages():
        assets.update(_OUTSIDE.findall(file.content_string))
    for source, page in PAGES.items():
        text = "".join(_page(source, assets))
        files.append(File.generated(config, page, content=text))
    for path in sorted(assets):
        files.append(File.generated(config, f"repository/{path}", abs_src_path=str(ROOT / path)))
    return files


def _page(source: str, assets: set[str]) -> Iterator[str]:
    """The lines of a file, with its links pointing into the site."""
    folder = Path(source).parent

    def link(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path = os.path.normpath(folder / target)
        if not (ROOT / path).exists():
            raise PluginError(f"{source} links to {target}, which is not there")
        if path in PAGES or path in ELSEWHERE:
            return f"{picture}[{words}]({PAGES.get(path) or ELSEWHERE[path]})"
        if path.startswith("docs/") and path.endswith(".md"):
            return f"{picture}[{words}]({path.removeprefix('docs/')})"
        if Path(path).suffix in SHOWN:
            assets.add(path)
            return f"{picture}[{words}](repository/{path})"
        return f"{words} (`{path}` in the repository)" if words != path else f"`{path}`"

    text = (ROOT / source).read_text("utf-8")
    if text.startswith("---\n"):  # the front matter of a model card
        text = text.split("---\n", 2)[2]
    shown = True
    for line in re.split(r"(?<=\n)(?=## )", _LINK.sub(link, text)):
        shown = not (
            source == "README.md" and line.startswith(tuple(f"## {n}\n" for n in LEFT_OUT))
        )
        if shown:
            yield line


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts in what the marks stand for, and shows files from outside docs/."""
    if page.file.src_uri in PAGES.values():
        return markdown
    makers = {"run": _printed, "help": _help}

    def made(match: re.Match[str]) -> str:
        what, argument = match.groups()
        try:
            return makers[what](argument) if what in makers else _number(what, argument)
        except (KeyError, OSError, TypeError, ValueError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", "") or error
            raise PluginError(f"{page.file.src_uri}: {match[0]}: {reason!r}") from error

    return _OUTSIDE.sub(r"(repository/\1)", _MARK.sub(made, markdown))


def _number(result: str, argument: str) -> str:
    """A number of a result, `key.key | format`; a key of a list is an index."""
    keys, _, form = argument.partition(" | ")
    value: Any = json.loads((RESULTS / f"{result}.json").read_text("utf-8"))
    for key in keys.split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return format(value, form)


def _printed(argument: str) -> str:
    """What an example prints, run in an empty folder."""
    script, *options = argument.split()
    with tempfile.TemporaryDirectory() as folder:
        text = _output([sys.executable, str(ROOT / script), *options], folder)
    return "```text\n" + text.strip("\n") + "\n```"


def _help(command: str) -> str:
    """The help of a command of moshi-c."""
    text = _output([sys.executable, "-m", "moshi_c", command, "--help"], ROOT)
    return f"```text\n{text.strip()}\n```"


def _output(command: list[str], folder: str | Path) -> str:
    environment = {**os.environ, "COLUMNS": "90", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Puts pictures into the page itself, where they take the colours of its letters."""

    def inline(match: re.Match[str]) -> str:
        path = Path(page.file.abs_src_path or "").parent / match[1]
        return path.read_text("utf-8") if path.is_file() else match[0]

    return re.sub(r'<img [^>]*src="([\w-]+\.svg)"[^>]*>', inline, html)


def on_post_build(config: Any, **_: Any) -> None:
    """Refuses a site that fetches anything from elsewhere when it is read."""
    fetched = r'<(?:script|img|audio|source|iframe|link)\b[^>]*\b(?:src|href)="(?:https?:)?//[^"]*"'
    for path in Path(config.site_dir).rglob("*.html"):
        if match := re.search(fetched, path.read_text("utf-8")):
            raise PluginError(f"{path.name} fetches {match[0]}")
