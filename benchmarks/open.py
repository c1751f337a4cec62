"""Opening a 7B-shaped folder: seconds, and private memory beside the codec's.

The language model is a sparse file with the published tensors of the 7B and holes for data, the
codec is at its real size. Each opening happens in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import numpy as np


def main() -> None:
    parser = common.arguments(__doc__, "open")
    options = parser.parse_args()
    import checkpoints
    import test_open_large

    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        codec = checkpoints.make_mimi(folder / "mimi", "full") / checkpoints.MIMI_NAME
        lm = folder / "lm"
        lm.mkdir()
        parameters = test_open_large.write_sparse(
            lm / "model.safetensors", test_open_large.published_tensors()
        )
        for _ in range(options.blocks):
            done = subprocess.run(
                [sys.executable, "-c", test_open_large.MEASURE, str(lm), str(codec)],
                capture_output=True,
                text=True,
                check=True,
            )
            found.append(json.loads(done.stdout))
    seconds = [one["seconds"] for one in found]
    common.report(
        "open",
        options.out,
        {
            "parameters": parameters,
            "openings": len(found),
            "seconds": {
                "median": round(float(np.median(seconds)), 3),
                "greatest": round(max(seconds), 3),
            },
            "private_mb_of_the_codec": round(found[0]["codec_mb"], 1),
            "private_mb_beside_the_codec": round(
                max(one["model_mb"] - one["codec_mb"] for one in found), 1
            ),
        },
    )


if __name__ == "__main__":
    main()
