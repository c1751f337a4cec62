"""same_conversation.py PROGRAM COMMAND...: one greedy conversation, held by two builds.

PROGRAM is examples/session.c built for this machine, and runs its generic kernels. COMMAND runs
the same example built for another one, for instance an emulator and its program. Text tokens and
codes have to be equal, each and all, and the sound within the bound `machines_sound` of
tests/tolerances.py. Where the arithmetic first differs is told from both traces.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from moshi_c.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "moshi_c" / "data" / "moshi-tiny"
RATE = 24000

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

from hello import spoken  # noqa: E402


def greedy_model(folder: Path) -> Path:
    """The packaged model, with a config that asks for the likeliest token everywhere."""
    shutil.copytree(MODEL, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["lm_gen_config"].update(temp=0, temp_text=0)
    path.write_text(json.dumps(config))
    return folder


def converse(
    command: list[str], model: Path, question: Path, name: str, **environment: str
) -> tuple[np.ndarray, list[list[str]]]:
    """What the model says, and the lines of the trace."""
    out, trace = question.with_name(f"{name}.f32"), question.with_name(f"{name}.trace")
    done = subprocess.run(
        [*command, str(model), str(question), str(out)],
        env={**os.environ, "MOSHI_C_TRACE": str(trace), **environment},
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}, expected 0")
    lines = [line.split(" ") for line in trace.read_text().splitlines()]
    return np.fromfile(out, "<f4"), lines


def tokens(lines: list[list[str]], name: str) -> list[int]:
    """What was drawn: a trace line is number, stage, operation, name, rows, width, min, max, ..."""
    return [int(line[6]) for line in lines if line[2:4] == ["sample", name]]


def compare(
    ours: tuple[np.ndarray, list[list[str]]], theirs: tuple[np.ndarray, list[list[str]]]
) -> None:
    from tolerances import bound

    (sound, trace), (their_sound, their_trace) = ours, theirs
    text, codes = tokens(trace, "text_sample"), tokens(trace, "depth.sample")
    said = Tokenizer(MODEL / "tokenizer_tiny.model").decode(text).strip()
    if not said or np.abs(sound).max() < 0.01:
        raise SystemExit(f"the conversation proves nothing: the model said {said!r}")
    for what, name, mine in (("text token", "text_sample", text), ("code", "depth.sample", codes)):
        other = tokens(their_trace, name)
        if mine != other:
            same = [a == b for a, b in zip(mine, other, strict=False)]
            at = same.index(False) if False in same else len(same)
            raise SystemExit(
                f"{what} {at} differs: found {other[at : at + 1]} of {len(other)}, expected"
                f" {mine[at : at + 1]} of {len(mine)}"
            )
    if sound.shape != their_sound.shape:
        raise SystemExit(f"found {their_sound.size} samples, expected {sound.size}")
    apart = float(np.abs(sound - their_sound).max())
    if not apart <= bound("machines_sound"):
        raise SystemExit(f"the sound is {apart:.2g} apart, allowed {bound('machines_sound'):.2g}")

    print(f"{len(text)} frames: {said!r}; {len(text)} text tokens and {len(codes)} codes are equal")
    differing = [a for a, b in zip(trace, their_trace, strict=True) if a != b]
    print(
        f"sound: at most {apart:.2g} apart; {len(differing)} of {len(trace)} operations differ in"
        " some bit" + (f", first {' '.join(differing[0][2:4])}" if differing else "")
    )


def main() -> None:
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = greedy_model(folder / "model")
        question = folder / "question.f32"
        voice = spoken("what colour is the sky?", "en-us+m3", RATE)
        np.pad(voice, (RATE // 2, 5 * RATE)).astype("<f4").tofile(question)
        compare(
            converse([sys.argv[1]], model, question, "ours", MOSHI_C_ISA="generic"),
            converse(sys.argv[2:], model, question, "theirs"),
        )


if __name__ == "__main__":
    main()
