"""Everything there is to check, one stage after the other; ends at the first that fails.

Stages are targets of the Makefile. Seconds, outcome and commit of each go to
benchmarks/results/full.json, which is committed before an issue counts as resolved. With names of
stages only those run, and the file keeps what it says of the others.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import common  # noqa: E402

OPTIONS = {"test": ["LONG=--long"]}
STAGES = (
    "check",
    "test",
    "docs",
    "resolve",
    "integrations",
    "asan",
    "tsan",
    "fuzz",
    "aarch64",
    "cuda-host",
    "cuda",
    "soak",
    "bench",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", default=STAGES, help="default: all of them")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "full.json")
    options = parser.parse_args()

    commit, began = common.commit(), time.monotonic()
    found: dict[str, dict[str, object]] = {}
    for stage in options.stages:
        print(f"==== make {stage}", flush=True)
        start = time.monotonic()
        command = ["make", stage, *OPTIONS.get(stage, [])]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        found[stage] = {
            "outcome": "failed" if status else "passed",
            "commit": commit,
            "seconds": round(time.monotonic() - start),
        }
        if status:
            break
    failed = [stage for stage, one in found.items() if one["outcome"] == "failed"]
    # Read only now: another run may have added stages meanwhile.
    if options.stages != STAGES and options.out.exists():
        found = json.loads(options.out.read_text())["stages"] | found
    seconds = round(time.monotonic() - began)
    common.report(
        "full",
        options.out,
        {
            "commit": commit,
            "stages": {stage: found[stage] for stage in STAGES if stage in found},
            "not_run": [stage for stage in STAGES if stage not in found],
            "seconds": sum(int(str(one["seconds"])) for one in found.values()),
        },
    )
    if failed:
        raise SystemExit(f"make full: {failed[0]} failed after {seconds} s")


if __name__ == "__main__":
    main()
