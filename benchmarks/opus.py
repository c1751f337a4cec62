"""Opus in Ogg, a frame of 80 ms at a time: ours and sphn, which upstream's server uses.

Both sides write the same minute of sound and read the same two streams, in turn. Before the clock
runs, both read the same samples out of both streams, and what was written sounds like what went in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import common  # it finds the tests' modules

# isort: split
import numpy as np
import sound
import sphn

import moshi_c

FRAME = 1920


def write(append: Callable[[Any], bytes], frames: Any) -> list[bytes]:
    return [append(frame) for frame in frames]


def check(pcm: Any, streams: dict[str, list[bytes]]) -> dict[str, Any]:
    """How the streams sound, and how large they are; the process ends when readers disagree."""
    result: dict[str, Any] = {}
    # What each encoder's delay puts in front; sphn's header says another number.
    for (name, data), delay in zip(streams.items(), (60, 156), strict=True):
        ours, theirs = moshi_c.OggOpusReader(), sphn.OpusStreamReader(24000)
        heard = np.concatenate([ours.append(one) for one in data])
        other = np.concatenate([theirs.append_bytes(one) for one in data])
        if len(heard) != len(pcm) or np.abs(heard - other).max() > 1e-6:
            raise SystemExit(f"the readers differ on what {name} wrote")
        alike = float(np.corrcoef(heard[delay:], pcm[:-delay])[0, 1])
        result[name] = {
            "correlation": round(alike, 4),
            "kbit_s": round(sum(map(len, data)) * 8 / (len(pcm) / 24000) / 1000, 1),
        }
    if result["ours"]["correlation"] < 0.95:
        raise SystemExit(f"what ours wrote does not sound like what went in: {result}")
    return result


def main() -> None:
    parser = common.arguments(__doc__, "opus")
    options = parser.parse_args()
    pcm = sound.minute()
    frames = pcm.reshape(-1, FRAME)

    def ours_to() -> Callable[[Any], bytes]:
        return moshi_c.OggOpusWriter().append

    def theirs_to() -> Callable[[Any], bytes]:
        return sphn.OpusStreamWriter(24000).append_pcm

    streams = {"ours": write(ours_to(), frames), "sphn": write(theirs_to(), frames)}
    result: dict[str, Any] = {"streams": check(pcm, streams)}

    writers = {"ours": ours_to(), "sphn": theirs_to()}
    result["encode"] = common.summary(
        common.interleave(
            {
                name: lambda index, append=append: append(frames[index % len(frames)])
                for name, append in writers.items()
            },
            options.blocks,
            len(frames),
            warm_up=0,
        )
    )
    for made, data in streams.items():
        readers = {
            "ours": moshi_c.OggOpusReader().append,
            "sphn": sphn.OpusStreamReader(24000).append_bytes,
        }
        result[f"decode_{made}"] = common.summary(
            common.interleave(
                {
                    name: lambda index, append=append, data=data: append(data[index % len(data)])
                    for name, append in readers.items()
                },
                options.blocks,
                len(data),
                warm_up=0,
            )
        )
    both = result["encode"]["ours"]["p50_ms"] + result["decode_ours"]["ours"]["p50_ms"]
    result["encode_and_decode_p50_ms"] = round(both, 3)
    common.report("opus", options.out, result)


if __name__ == "__main__":
    main()
