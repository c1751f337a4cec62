"""Whether pip finds versions of everything for moshi_c beside what its users have already.

For each set of extras: pip resolves the package as for a new environment, together with current
transformers and NumPy, and nothing is installed. Prints the versions that it settles on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("server,pipecat", "server,livekit")
BESIDE = ("transformers>=5", "numpy>=2.3")
SHOWN = (
    "pipecat-ai",
    "livekit-agents",
    "transformers",
    "numpy",
    "aiohttp",
    "huggingface-hub",
)


def resolve(extras: str) -> dict[str, str]:
    """Package -> version.

    Raises:
        SystemExit: there are no such versions; pip has said which ones conflict.
    """
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    command += ["--quiet", "--disable-pip-version-check", "--no-build-isolation", "--report", "-"]
    done = subprocess.run(
        [*command, f".[{extras}]", *BESIDE], cwd=ROOT, stdout=subprocess.PIPE, check=False
    )
    if done.returncode:
        raise SystemExit(f"moshi_c[{extras}] does not resolve beside {', '.join(BESIDE)}")
    found = [each["metadata"] for each in json.loads(done.stdout)["install"]]
    return {each["name"].lower().replace("_", "-"): each["version"] for each in found}


def main() -> None:
    for extras in EXTRAS:
        versions = resolve(extras)
        shown = [f"{name} {versions[name]}" for name in SHOWN if name in versions]
        print(f"moshi_c[{extras}]: {len(versions)} packages, {', '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
