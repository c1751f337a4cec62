"""`uv pip install ...` from the registries that pip is told of: uv itself reads no pip.conf.

Arguments are uv's; without `--python` it installs beside the interpreter that runs this.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

#: What pip calls a setting -> what uv reads, and between its values.
SETTINGS = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "no-index": ("UV_NO_INDEX", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
}


def uv_settings(listed: str) -> dict[str, str]:
    """What `pip config list` prints, where uv has it too, as uv's environment."""
    found: dict[str, str] = {}
    for section in ("global", "install", ":env:"):  # a later one counts
        for line in listed.splitlines():
            name, _, value = line.partition("=")
            if known := SETTINGS.get(name.removeprefix(f"{section}.")):
                found[known[0]] = known[1].join(str(ast.literal_eval(value)).split())
    return found


def registries() -> dict[str, str]:
    """The settings of pip, from its files and environment, as uv's environment."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    return uv_settings(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    # The best version of all registries, as pip takes it.
    environment = {"UV_INDEX_STRATEGY": "unsafe-best-match", **registries(), **os.environ}
    uv = str(Path(sys.executable).with_name("uv"))
    python = [] if "--python" in sys.argv else ["--python", sys.executable]
    os.execve(uv, [uv, "pip", "install", "--quiet", *python, *sys.argv[1:]], environment)


if __name__ == "__main__":
    main()
