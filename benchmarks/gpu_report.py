"""What the stages of benchmarks/gpu.sh measured, beside the targets: gpu_report.py FOLDER.

Reads FOLDER/results.jsonl, whose lines are there from the moment a thing was measured, prints a
table, and writes all of it to FOLDER/gpu.json. Of lines of the same name the last one counts. The
standard library alone is needed.

gpu_report.py FOLDER begin adds a line with machine, date and commit, which comes first;
gpu_report.py FOLDER stage NAME SECONDS TROUBLE one about a stage; no TROUBLE: "".
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Line = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A bound of a key in the line of that name; least: from below. besides: what the floor has
    beside the bytes over the read rate (codec, exposed waits), in ms."""

    id: str
    name: str
    key: str
    bound: float
    stretch: float | None = None
    least: bool = False
    besides: float = 0


# Lines of every variant are listed.
TARGETS = [
    Target("G1", "frame bf16+bf16", "p50_ms", 4.8, 4.5, besides=0.5),
    Target("G1", "upstream frame", "ratio", 3, least=True),
    Target("G2", "frame int8+int8", "p50_ms", 2.9, 2.6, besides=0.5),
    Target("G3", "frame q4+int8", "p50_ms", 2.3, 2.0, besides=0.5),
    Target("G4", "depth bf16+bf16", "p50_ms", 0.6, 0.45, besides=0.2),
    Target("G4", "depth int8+int8", "p50_ms", 0.45, 0.35, besides=0.2),
    Target("G4", "upstream depth", "ratio", 4, least=True),
    *(
        Target("G5", f"product {shape}", key, bound, stretch, least=True)
        for shape in ("12288 x 4096", "4096 x 4096", "22528 x 4096", "4096 x 11264", "32000 x 4096")
        for key, bound, stretch in (("share", 0.92, 0.95), ("ratio", 1.15, None))
    ),
    Target("G6", "codec 1", "p50_ms", 0.35, 0.25),
    Target("G6", "codec 64", "p50_ms", 1.8, 1.3),
    Target("G6", "upstream codec 1", "ratio", 5, least=True),
    Target("G6", "upstream codec 64", "ratio", 5, least=True),
    Target("G7", "64 sessions bf16+bf16", "p50_ms", 33.5, 31, besides=1.2),
    Target("G7", "128 sessions int8+int8", "p50_ms", 33.5, 31, besides=1.2),
    Target("G7", "upstream 64 sessions", "ratio", 1.5, least=True),
    Target("G8", "streams bf16+bf16", "streams", 1000, least=True),
    Target("G8", "streams int8+int8", "streams", 1000, 2000, least=True),
    Target("G9", "prefill", "p50_ms", 25, 16),
    Target("G9", "prefill", "ratio", 50, least=True),
    Target("G10", "64 sessions bf16+bf16, paced", "late", 0),
    Target("G10", "64 sessions bf16+bf16, beginning", "late", 0),
    Target("G10", "64 sessions bf16+bf16, paced", "p99_over_p50", 1.3),
    Target("G10", "64 sessions bf16+bf16, paced", "over_back_to_back", 1.15),
]


def command(*words: str) -> str:
    """What it prints, or "" where it can't be run."""
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def machine() -> Line:
    fields = "name,driver_version,memory.total,compute_cap,clocks.sm,clocks.mem"
    return {
        "card": command("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"),
        "compiler": command("nvcc", "--version").rpartition("\n")[2],
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
    }


def commit() -> str:
    """COMMIT names it where the sources came without their history."""
    found = command("git", "rev-parse", "--short=10", "HEAD")
    changed = command(
        "git", "status", "--porcelain", "-uno", "--", ".", ":(exclude)benchmarks/results"
    )
    return os.environ.get("COMMIT") or (found + "-dirty" * bool(changed)) or "unknown"


def call() -> Line:
    """Where and of what the lines that follow are."""
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    facts = {"machine": machine(), "date": date, "commit": commit(), "dry": "GPU_DRY" in os.environ}
    return {"name": "call"} | facts


def read(path: Path) -> list[Line]:
    """A line that was cut off by the end of its program is left out."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def append(path: Path, line: Line) -> None:
    """After a line that was cut off, too."""
    cut = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * cut + json.dumps(line) + "\n")


def add_ratios(lines: list[Line]) -> None:
    """Of paced sessions: p99 over p50, and p50 over that of the same steps back to back. Of given
    frames: the share of what the card multiplies in a large product."""
    rates = [line["tflops"] for line in lines if line["name"] == "matrices" and "tflops" in line]
    unpaced = {line["name"]: line for line in lines if line.get("variant") == ""}
    for line in lines:
        if line["name"] == "prefill" and rates:
            line["share_of_matrices"] = round(line["tflops"] / max(rates), 4)
        if not line["name"].endswith(", paced") or "p50_ms" not in line:
            continue
        line["p99_over_p50"] = round(line["p99_ms"] / line["p50_ms"], 4)
        if before := unpaced.get(line["name"].removesuffix(", paced")):
            line["over_back_to_back"] = round(line["p50_ms"] / before["p50_ms"], 4)


def row(target: Target, line: Line | None) -> Line:
    """One of the table: what was found, of which floor, and whether it is enough."""
    value = line.get(target.key) if line else None
    found: Line = {"id": target.id, "name": target.name, "key": target.key}
    found |= {"bound": target.bound, "least": target.least, "found": value}
    found |= {"variant": line.get("variant", "") if line else ""}
    if value is None:
        return found
    found["passed"] = value >= target.bound if target.least else value <= target.bound
    found["verified"] = line.get("verified", True)
    if target.stretch is not None:
        found["stretch"] = value >= target.stretch if target.least else value <= target.stretch
    if line and "bytes_ms" in line and target.key == "p50_ms":
        found["floor_ms"] = round(line["bytes_ms"] + target.besides, 4)
        found["share_of_floor"] = round(found["floor_ms"] / value, 4)
    return found


def rows(lines: list[Line]) -> list[Line]:
    found = []
    for target in TARGETS:
        same = [line for line in lines if line["name"] == target.name]
        last = {line.get("variant", ""): line for line in same}
        found += [row(target, line) for line in last.values()] or [row(target, None)]
    return found


def printed(found: Line) -> str:
    """The share is the floor's of what was measured."""
    name = f"{found['name']}{' with ' if found['variant'] else ''}{found['variant']}"
    text = f"{found['id']:4} {name:56.56} {found['key']:17} "
    bound = f"{'>=' if found['least'] else '<='} {found['bound']:g}"
    share = f"{found['share_of_floor']:6.1%}" if "share_of_floor" in found else ""
    word = "reached" if found["passed"] else "missed"
    word += ", stretch too" if found.get("stretch") else ""
    word += "" if found["verified"] else ", but not the CPU's results"
    return f"{text}{found['found']:10.3f}  {bound:9} {share:>7} {word}"


def main(words: list[str]) -> None:
    folder = Path(words[0])
    path = folder / "results.jsonl"
    if words[1:] == ["begin"]:
        append(path, call())
        return
    if words[1:2] == ["stage"]:
        name, seconds, trouble = words[2:5]
        append(path, {"name": "stage", "of": name, "seconds": int(seconds), "trouble": trouble})
        return
    lines = read(path)
    add_ratios(lines)
    table = rows(lines)
    last = [line for line in lines if line["name"] == "call"][-1]
    rates = [line["read_gb_s"] for line in lines if line["name"] == "memory"]
    for found in table:
        if found["found"] is not None:
            print(printed(found))
    if missing := [found for found in table if found["found"] is None]:
        names = dict.fromkeys(f"{found['id']} {found['name']}" for found in missing)
        print("not measured:", ", ".join(names))
    if rates:
        print(f"the card's memory was read at {min(rates):.0f} to {max(rates):.0f} GB/s")
    for line in lines:
        if line["name"] == "stage":
            words = [f"{line['seconds']} s"] + [line["trouble"]] * bool(line["trouble"])
            print(f"{line['of']}: {', '.join(words)}")
    if last["dry"]:
        print("a dry run: none of these times means anything")
    facts = {key: value for key, value in last.items() if key != "name"}
    whole = facts | {"targets": table, "lines": lines}
    (folder / "gpu.json").write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
