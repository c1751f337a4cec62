"""Plays the same conversations with `moshi_c` as `upstream` does with upstream's classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from upstream import Codes, Floats, LmRun

import moshi_c


@dataclass
class Played:
    """What a session did. Index 0 is the step; named as in `upstream.LmRun`."""

    out: Codes
    text_logits: Floats
    audio_logits: Floats
    heads: Floats | None


def frame_row(frame: Any, dep_q: int) -> Codes:
    """Text and codes of a frame in upstream's order; -1 for a frame without output."""
    if frame.text_token < 0:
        assert frame.text_token == -1 and frame.codes is None
        return np.full(1 + dep_q, -1)
    if not dep_q:
        assert frame.codes is None
        return np.array([frame.text_token])
    codes = np.asarray(frame.codes)
    assert codes.shape == (dep_q,) and codes.dtype == np.int32
    return np.array([frame.text_token, *codes])


def play_with(
    model: Any,
    user_codes: Codes,
    dep_q: int,
    *,
    forced: tuple[Codes, Codes] | None = None,
    forced_text: dict[int, Sequence[int]] | None = None,
    **options: Any,
) -> Played:
    """One greedy session over the user's codes [T, K].

    forced: text [T] and audio [T, dep_q] that every step stores instead of its own choice.
    forced_text: before step k, hand the session these tokens to say.
    """
    out, text_logits, audio_logits, heads = [], [], [], []
    settings = {"seed": 1, "text_temperature": 0, "audio_temperature": 0, "keep_logits": True}
    with moshi_c.Session(model, **(settings | options)) as session:
        for index, codes in enumerate(user_codes):
            if forced_text and index in forced_text:
                session.force_text(list(forced_text[index]))
            if forced is not None:
                text, audio = forced
                said = np.ascontiguousarray(audio[index], np.int32) if dep_q else None
                session._force_next(int(text[index]), said)
            frame = session.step_codes(np.ascontiguousarray(codes, np.int32), decode=False)
            out.append(frame_row(frame, dep_q))
            text_row, audio_rows = session.logits
            text_logits.append(np.array(text_row, copy=True))
            if dep_q:
                audio_logits.append(np.array(audio_rows, copy=True))
            if frame.heads is not None:
                heads.append(np.array(frame.heads, copy=True))
    return Played(
        np.stack(out),
        np.stack(text_logits),
        np.stack(audio_logits) if dep_q else np.zeros((len(out), 0, 0), np.float32),
        np.stack(heads) if heads else None,
    )


def play(
    folder: Path, user_codes: Codes, dep_q: int, *, load: dict[str, Any] | None = None, **more: Any
) -> Played:
    """Opens the folder and plays one session; `load` goes to `moshi_c.load`."""
    settings = {"device": "cpu", "progress": False}
    with moshi_c.load(str(folder), **(settings | (load or {}))) as model:
        return play_with(model, user_codes, dep_q, **more)


def distance(ours: Floats, theirs: Floats) -> float:
    """Largest difference over the reference's standard deviation."""
    if not theirs.size:
        return 0.0
    assert ours.shape == theirs.shape
    if not np.isfinite(ours).all():
        return float("inf")
    return float(np.abs(ours.astype(np.float64) - theirs).max() / theirs.std())


def logits_distance(ours: Played, theirs: LmRun) -> float:
    """The larger of the distances of text and audio logits."""
    text = distance(ours.text_logits, theirs.text_logits)
    return max(text, distance(ours.audio_logits, theirs.audio_logits))


def spread(ours: Floats, theirs: Floats) -> float:
    """Root mean square difference over the reference's standard deviation."""
    difference = np.asarray(ours, np.float64) - theirs
    return float(np.sqrt((difference**2).mean()) / theirs.std())


def assert_same_tokens(ours: Codes, theirs: Codes) -> None:
    """Token for token; names the first that differs."""
    assert ours.shape == theirs.shape
    wrong = np.argwhere(ours != theirs)
    if len(wrong):
        step, stream = wrong[0]
        raise AssertionError(
            f"{len(wrong)} tokens differ, first at step {step} in stream {stream} (0 is text): "
            f"ours {ours[step].tolist()}, upstream's {theirs[step].tolist()}"
        )


def divergence(ours: Floats, theirs: Floats) -> tuple[Floats, Floats]:
    """Per stream, over the steps of logits [T, K, card]: the mean Kullback-Leibler divergence of
    our distribution from theirs in nats, and the share of steps with the same most likely token."""

    def log_softmax(logits: Floats) -> Floats:
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        result: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        return result

    p, q = log_softmax(theirs), log_softmax(ours)
    kl: Floats = (np.exp(p) * (p - q)).sum(-1).mean(0)
    same: Floats = (ours.argmax(-1) == theirs.argmax(-1)).mean(0)
    return kl, same
