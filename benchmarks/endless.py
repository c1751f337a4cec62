"""A call of half an hour with the package's model, faster than real time: does it answer as well in
its last minute as in its first, and does its memory stay?

One user talks through the whole call, in voices that were never trained on, and asks something
every few seconds: trained exchanges, answered greedily. The same call is held with the context as a
ring, as upstream's, and with one that is refreshed. Counted are exact answers by the minute, and
resident memory once a minute.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import common
import numpy as np
import soak

import moshi_c

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "train_tiny"))

import eval_lm
from corpus import Exchange, split
from espeak import Espeak

FRAME = 1920
MINUTE = 750  # frames


def questions(minutes: int, seed: int) -> list[tuple[np.ndarray, Exchange]]:
    """What the user says until the next question, and what is to be answered meanwhile."""
    users, generator = eval_lm.Users(Espeak(), seed), random.Random(seed)
    order = generator.sample(split().trained, len(split().trained))
    said: list[tuple[np.ndarray, Exchange]] = []
    frames = 0
    while frames < minutes * MINUTE:
        exchange = order[len(said) % len(order)]
        pcm, _, _ = users.ask(exchange.question)
        said.append((pcm, exchange))
        frames += len(pcm) // FRAME
    return said


def call(said: list[tuple[np.ndarray, Exchange]], policy: str) -> dict[str, Any]:
    right: dict[int, list[bool]] = {}
    memory: list[float] = []
    events = {"context_80": 0, "refresh_begin": 0, "refresh_end": 0}
    frames = 0
    with (
        moshi_c.load(max_sessions=1, threads=2) as model,
        moshi_c.Session(
            model,
            seed=5,
            text_temperature=0.0,
            audio_temperature=0.0,
            context_policy=policy,  # type: ignore[arg-type]
        ) as session,
    ):
        for pcm, exchange in said:
            minute = frames // MINUTE
            text = ""
            for frame in pcm.reshape(-1, FRAME):
                out = session.step(frame)
                text += out.text
                if out.event:
                    events[out.event] += 1
            right.setdefault(minute, []).append(text.strip() == exchange.answer)
            frames += len(pcm) // FRAME
            if frames // MINUTE > minute:
                memory.append(soak.resident_mb())
    minutes = [float(np.mean(right[minute])) for minute in sorted(right)]
    every = [exact for row in right.values() for exact in row]
    third = max(1, len(minutes) // 3)
    return {
        "asked": len(every),
        "right": round(float(np.mean(every)), 4),
        "right_in_first_minute": round(minutes[0], 3),
        "right_in_last_minute": round(minutes[-1], 3),
        "right_in_first_third": round(float(np.mean(minutes[:third])), 4),
        "right_in_last_third": round(float(np.mean(minutes[-third:])), 4),
        "right_by_minute": [round(value, 3) for value in minutes],
        "events": events,
        "resident_mb": [round(value, 1) for value in memory],
    }


def main() -> None:
    parser = common.arguments(__doc__, "endless")
    parser.add_argument("--minutes", type=int, default=30)
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args()
    said = questions(options.minutes, options.seed)
    result = {"minutes": options.minutes, "seed": options.seed}
    for policy in ("refresh", "ring"):
        result[policy] = call(said, policy)
        print(policy, result[policy], flush=True)
    common.report("endless", options.out, result)


if __name__ == "__main__":
    main()
