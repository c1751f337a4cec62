"""Products of one row of activations and a matrix, by weight format, and attention over a full
ring: GB/s of weights, keys and values beside the read rate of the same moment, one thread and all.

The C harness of the kernels does it (tests/c/test_kernels.c, which also checks them): weights of
4096 x 4096 from memory that no cache holds, 15 times, each after a probe of the read rate. `share`
is the median rate over the median of the probes, `best` the best over the best.
"""

from __future__ import annotations

import os
import re
import subprocess
from typing import Any

import common

HARNESS = "build/release/test_kernels"
LINE = re.compile(
    r"(?P<name>\S.*?) +(?P<ms>[\d.]+) ms \(best [\d.]+\) +(?P<rate>[\d.]+) GB/s, best +"
    r"(?P<best_rate>[\d.]+); read +(?P<read>[\d.]+), best +(?P<best_read>[\d.]+)"
)
WORDS = ("1 row", "attend")


def measure(threads: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for word in WORDS:
        done = subprocess.run(
            [HARNESS, "bench", str(threads), word],
            cwd=common.ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        for line in done.stdout.splitlines():
            if found := LINE.match(line):
                name = found["name"]
                rate, best, read, best_read = (
                    float(found[key]) for key in ("rate", "best_rate", "read", "best_read")
                )
                result[name] = {
                    "ms": float(found["ms"]),
                    "gb_s": rate,
                    "read_gb_s": read,
                    "share": round(rate / read, 3),
                    "best": round(best / best_read, 3),
                }
    if not result:
        raise SystemExit(f"{HARNESS} bench printed nothing that is understood")
    return result


def main() -> None:
    options = common.arguments(__doc__, "kernels").parse_args()
    subprocess.run(["make", "--no-print-directory", HARNESS], cwd=common.ROOT, check=True)
    cores = len(os.sched_getaffinity(0))
    result = {f"threads_{n}": measure(n) for n in sorted({1, cores})}
    common.report("kernels", options.out, result)


if __name__ == "__main__":
    main()
