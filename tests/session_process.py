"""Holds one conversation with `moshi_c` alone: FOLDER IN.npy OUT.npz. Run as a fresh process."""

from __future__ import annotations

import sys

import numpy as np

import moshi_c

FRAME = 1920


def main(folder: str, source: str, target: str) -> None:
    """Steps the sound frame by frame and saves everything that came back."""
    pcm = np.load(source)
    text, codes, user, sound = [], [], [], []
    with (
        moshi_c.load(folder, device="cpu", progress=False) as model,
        moshi_c.Session(model, seed=1, text_temperature=0, audio_temperature=0) as session,
    ):
        for chunk in pcm.reshape(-1, FRAME):
            frame = session.step(chunk)
            text.append(frame.text_token)
            codes.append(np.full(8, -1) if frame.codes is None else frame.codes)
            user.append(frame.user_codes)
            sound.append(frame.pcm)
    if {"torch", "moshi"} & set(sys.modules):
        raise RuntimeError("moshi_c brought upstream with it")
    np.savez(
        target,
        text=np.array(text),
        codes=np.stack(codes),
        user=np.stack(user),
        sound=np.concatenate(sound),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
