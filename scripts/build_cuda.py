"""Compiles libmoshi_cuda.so with nvcc, and fails where registers of kernels spill, or products of
warpgroups wait for each other: the library is there then too, for a compiler that is not ours.

Usage: build_cuda.py OUT [--architectures "80 90a"] [--work FOLDER]. For the last architecture
named, PTX is kept too, which later cards compile for themselves. "native" is the cards of this
machine; for compute capability 9.0 that is 90a, whose code has warpgroups. A table of registers and
spills of every kernel stays in FOLDER/registers.txt.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "cuda").glob("*.cu"))
ALL = "80 86 89 90a 100 120"
# Without -fmad: sums are fused where the sources say so, and have the same bits everywhere.
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
FLAGS += ["-Xptxas", "-v", "-Xfatbin=-compress-all"]

FUNCTION = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


def native() -> str:
    """The architectures of this machine's cards, as the driver's tool tells them, or ""."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    found = {"90a" if line == "9.0" else line.replace(".", "") for line in told.split()}
    return " ".join(sorted(found))


def targets(architectures: str) -> list[str]:
    if architectures == "native":
        architectures = native()
    if not architectures:
        return ["-arch=native"]
    names = architectures.split()
    flags = ["-DMOSHI_CUDA_WARPGROUPS"] if "90a" in names else []
    flags += [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    return [*flags, f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}"]


def compile_one(flags: list[str], source: Path, target: Path) -> str:
    command = ["nvcc", *FLAGS, *flags, "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def kernels(log: str) -> list[tuple[str, str, int, int]]:
    """(kernel, architecture, registers, bytes spilt) of what the assembler said."""
    found, spilt = [], 0
    name = architecture = ""
    for line in log.splitlines():
        if match := FUNCTION.search(line):
            name, architecture = match.groups()
        elif match := SPILL.search(line):
            spilt = int(match[2]) + int(match[3])
        elif (match := REGISTERS.search(line)) and name:
            found.append((name, architecture, int(match[1]), spilt))
            name = ""
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--architectures", default=ALL)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "cuda")
    arguments = parser.parse_args()
    flags = targets(arguments.architectures)
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    objects = [arguments.work / f"{source.name}.o" for source in SOURCES]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        logs = list(pool.map(partial(compile_one, flags), SOURCES, objects))
    rows = [row for log in logs for row in kernels(log)]
    table = "".join(
        f"{a:8} {r:4} registers {s:5} bytes spilt  {k}\n" for k, a, r, s in sorted(rows)
    )
    (arguments.work / "registers.txt").write_text(table)
    link = ["nvcc", "-shared", "-cudart", "static", *flags]
    subprocess.run([*link, *map(str, objects), "-o", str(arguments.out)], check=True)
    if slow := [line for log in logs for line in log.splitlines() if "C7510" in line]:
        print("\n".join(slow))  # warpgroups whose products wait for each other
        return 1
    if spills := [row for row in rows if row[3]]:
        print("".join(f"{k} for {a} spills {s} bytes\n" for k, a, _, s in spills), end="")
        return 1
    size = arguments.out.stat().st_size / 1e6
    print(f"{arguments.out.name}: {len(rows)} kernels, none spills, {size:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
