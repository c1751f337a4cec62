"""Removes each barrier and each wait for copies of the CUDA kernels in turn: a test must then fail.

Usage: mutate_barriers.py [FILE:LINE ...]. Needs what `make cuda-host` builds. A barrier whose
removal no test sees is either not needed, or not tested; both are defects, and end this with
status 1. First the tests must pass with all barriers in place.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build" / "test"
PLACE = ROOT / "build" / "mutant"
# As in the Makefile: some orders on a smaller card.
ORDERS = {"ascending": {}, "descending": {"SHIM_SHARED_KIB": "99"}, "3": {"SHIM_PROCESSORS": "4"}}
COMPILE = ["g++", "-x", "c++", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
COMPILE += ["-O1", "-w", "-c"]
WAITS = r"__syncthreads|copies_wait<[^>]*>|copies_show|group_wait"
BARRIER = re.compile(rf"(?:{WAITS})\(\);|(?<=    )meet\(p, \+\+meetings\);")


def barriers() -> list[tuple[Path, int]]:
    kernels = [path for path in (ROOT / "cuda").glob("*.h") if path.name != "host_shim.h"]
    sources = sorted([*(ROOT / "cuda").glob("*.cu"), *kernels])
    return [
        (path, number)
        for path in sources
        for number, line in enumerate(path.read_text().splitlines())
        if BARRIER.search(line)
    ]


def included(source: Path) -> set[str]:
    """The names of the headers of its folder that a source includes, and those that they do."""
    found: set[str] = set()
    for name in re.findall(r'#include "(\w+\.h)"', source.read_text()):
        if (header := source.parent / name).exists():
            found |= {name, *included(header)}
    return found


def build(path: Path, number: int | None) -> Path:
    """The library without that barrier; None: with all, but that file compiled anew."""
    shutil.rmtree(PLACE, ignore_errors=True)
    folder = PLACE / "cuda"
    folder.mkdir(parents=True)
    (PLACE / "csrc").symlink_to(ROOT / "csrc")
    for source in (ROOT / "cuda").iterdir():
        (folder / source.name).write_text(source.read_text())
    if number is not None:
        lines = path.read_text().splitlines()
        lines[number] = BARRIER.sub(";", lines[number])
        (folder / path.name).write_text("\n".join(lines) + "\n")
    objects = []
    for source in sorted([*folder.glob("*.cu"), folder / "host_shim.cpp"]):
        built = BUILT / "cuda" / f"{source.name}.o"
        if path.name in {source.name, *included(source)}:
            built = PLACE / f"{source.name}.o"
            subprocess.run([*COMPILE, source, "-o", built], check=True)
        objects.append(built)
    library = PLACE / "libmoshi_cuda.so"
    subprocess.run(["g++", "-shared", *objects, "-o", library], check=True)
    return library


def first_failure(library: Path) -> str | None:
    """The first test that fails in any order, or None."""
    for order, card in ORDERS.items():
        settings = {"MOSHI_C_CUDA_LIBRARY": str(library), "SHIM_ORDER": order, **card}
        process = subprocess.Popen(
            ["stdbuf", "-oL", BUILT / "test_kernels", "cuda"],
            env=os.environ | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("FAIL"):
                process.kill()
                process.wait()
                return f"{order}: {line[5:].strip()}"
        if process.wait() != 0:
            return f"{order}: status {process.returncode}"
    return None


def main() -> int:
    survivors = 0
    if failure := first_failure(build(barriers()[0][0], None)):
        raise SystemExit(f"with every barrier in place a test fails: {failure}")
    for path, number in barriers():
        name = f"{path.name}:{number + 1}"
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        failure = first_failure(build(path, number))
        survivors += failure is None
        print(f"{name:16} {failure or 'NOT SEEN'}", flush=True)
    print(f"{survivors} barriers can go without a test failing")
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main())
