"""Which kernels the time of a frame goes to: gpu_profile.py FOLDER RESULTS.

Nsight Compute (ncu) watches some frames of one session in bf16 with its ring full, kernel by
kernel: how often, how long, how many bytes the card's memory gave. It runs kernels one by one, so
that their sum is more than a frame takes, where they overlap. Clocks stay as they are.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIPPED, WATCHED = 8000, 900  # launches: past the first frames; about two frames
TIME, BYTES = "gpu__time_duration.sum", "dram__bytes_read.sum"
# Behind a name, as is "void" before it; "(format)2" in the middle is an argument of a template.
PARAMETERS = re.compile(r"^void |\((?!\w+\)\d).*")


def number(text: str) -> float:
    return float(text.replace(",", ""))


def kernels(text: str) -> dict[str, list[tuple[float, float]]]:
    """Seconds and bytes of each launch, by the kernel's name without its parameters."""
    begin = text.find('"ID"')
    launches: dict[str, dict[str, float]] = defaultdict(dict)
    names: dict[str, str] = {}
    for row in csv.DictReader(text[begin:].splitlines()) if begin >= 0 else []:
        if row.get("Metric Name") in (TIME, BYTES):
            launches[row["ID"]][row["Metric Name"]] = number(row["Metric Value"])
            names[row["ID"]] = PARAMETERS.sub("", row["Kernel Name"])
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for launch, values in launches.items():
        found[names[launch]].append((1e-9 * values.get(TIME, 0), values.get(BYTES, 0)))
    return found


def main() -> None:
    folder, out = sys.argv[1], Path(sys.argv[2])
    program = os.environ.get("GPU", str(ROOT / "build/gpu/gpu"))
    command = ["ncu", "--csv", "--print-units", "base", "--clock-control", "none"]
    command += ["--graph-profiling", "node", "--metrics", f"{TIME},{BYTES}"]
    command += ["--launch-skip", str(SKIPPED), "--launch-count", str(WATCHED)]
    done = subprocess.run(
        [*command, program, folder, "follow", "frame", "1"],
        input="\n", capture_output=True, text=True, timeout=420,
    )  # fmt: skip
    found = kernels(done.stdout)
    if not found:
        said = [line for line in (done.stdout + done.stderr).splitlines() if "==ERROR==" in line]
        sys.exit(f"ncu saw no kernel: {said[0] if said else f'status {done.returncode}'}")
    total = sum(seconds for launches in found.values() for seconds, _ in launches)
    with out.open("a") as file:
        for name, launches in sorted(found.items(), key=lambda item: -sum(t for t, _ in item[1])):
            seconds, read = sum(t for t, _ in launches), sum(b for _, b in launches)
            line = {
                "name": "kernel", "of": name, "launches": len(launches),
                "share": round(seconds / total, 4),
                "mean_us": round(1e6 * seconds / len(launches), 2),
                "read_gb_s": round(1e-9 * read / seconds, 1) if seconds else 0,
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")
            print(
                f"{name:50.50} {line['launches']:5} x {line['mean_us']:8.2f} us "
                f"{line['share']:6.1%} {line['read_gb_s']:8.1f} GB/s"
            )


if __name__ == "__main__":
    main()
