"""Sampled tokens have upstream's distribution.

The distribution is computed from upstream's own logits; that upstream's `sample_token` draws from
it is tested first. Then many seeds draw in `moshi_c`, and a chi-square test compares text, the
first code, and the pair of first and second code, which also shows that draws of one frame are
independent of each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import upstream
from checkpoints import SHAPES
from conftest import Checkpoints
from moshi.utils.sampling import sample_token
from numpy.typing import NDArray
from scipy.stats import chisquare
from tolerances import bound
from upstream import Codes, Floats

import moshi_c

pytestmark = [pytest.mark.parity, pytest.mark.slow]

DRAWS = 20_000
SHAPE = SHAPES["draws"]
SETTINGS = [(0.7, 8), (1.0, 25), (1.4, 0)]  # temperature and top-k; 0 is the whole vocabulary

Shares = NDArray[np.float64]


@dataclass(frozen=True)
class FirstStep:
    """Upstream's logits of the first step of a conversation."""

    folder: Path
    user: Codes  # [1, K]
    text: Floats  # [text_card]
    said: int  # the text token after which the codes below are
    first: Floats  # [card], of the first code
    second: Floats  # [card, card], of the second code after each first one


@pytest.fixture(scope="module")
def first_step(made: Checkpoints) -> FirstStep:
    folder = made.lm("draws")
    lm = upstream.load_lm(folder)
    user = upstream.user_codes(1, SHAPE.user_q, SHAPE.card, 0)
    said = 17
    runs = [
        upstream.lm_teacher_forced(lm, user, np.array([said]), np.array([[code, 0]]))
        for code in range(SHAPE.card)
    ]
    second = np.stack([run.audio_logits[0, 1] for run in runs])
    return FirstStep(folder, user, runs[0].text_logits[0], said, runs[0].audio_logits[0, 0], second)


def shares(logits: Floats, temperature: float, top_k: int) -> Shares:
    """The share of each token: softmax, then the most probable k, then to a sum of one."""
    scaled = logits.astype(np.float64) / temperature
    found = np.exp(scaled - scaled.max())
    if 0 < top_k < len(found):
        found[np.argsort(found)[:-top_k]] = 0
    normal: Shares = found / found.sum()
    return normal


def chance(counts: NDArray[np.int64], expected: Shares) -> float:
    """The probability of counts at least as far from the expected shares."""
    assert counts[expected == 0].sum() == 0, "a token outside the top k was drawn"
    wanted = expected * counts.sum()
    rare = wanted < 8
    observed, wanted = (np.append(values[~rare], values[rare].sum()) for values in (counts, wanted))
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    return float(chisquare(observed, wanted).pvalue)


@pytest.mark.parametrize(("temperature", "top_k"), SETTINGS)
def test_upstream_draws_from_the_shares_that_are_compared_with(
    first_step: FirstStep, temperature: float, top_k: int
) -> None:
    torch.manual_seed(5)
    logits = torch.from_numpy(first_step.text).expand(DRAWS * 5, -1)
    drawn = sample_token(logits, True, temperature, top_k).numpy()
    counts = np.bincount(drawn, minlength=SHAPE.text_card)
    assert chance(counts, shares(first_step.text, temperature, top_k)) > bound("chance")


def draw(first_step: FirstStep, temperature: float, top_k: int, say: int | None) -> Codes:
    """Text and codes of the first frame under many seeds: [DRAWS, 3]."""
    settings = {
        "text_temperature": temperature,
        "audio_temperature": temperature,
        "text_top_k": top_k,
        "audio_top_k": top_k,
    }
    user = np.ascontiguousarray(first_step.user[0], np.int32)
    drawn = np.empty((DRAWS, 3), np.int64)
    with (
        moshi_c.load(str(first_step.folder), device="cpu", progress=False) as model,
        moshi_c.Session(model, seed=0, **settings) as session,
    ):
        for seed in range(DRAWS):
            session.reset(seed=seed)
            if say is not None:
                session.force_text([say])
            frame = session.step_codes(user, decode=False)
            drawn[seed] = frame.text_token, *frame.codes
    return drawn


@pytest.mark.parametrize(("temperature", "top_k"), SETTINGS)
def test_text_is_drawn_from_upstreams_distribution(
    first_step: FirstStep, temperature: float, top_k: int
) -> None:
    drawn = draw(first_step, temperature, top_k, None)
    counts = np.bincount(drawn[:, 0], minlength=SHAPE.text_card)
    assert chance(counts, shares(first_step.text, temperature, top_k)) > bound("chance")


@pytest.mark.parametrize(("temperature", "top_k"), SETTINGS)
def test_codes_are_drawn_from_upstreams_distribution_independently(
    first_step: FirstStep, temperature: float, top_k: int
) -> None:
    drawn = draw(first_step, temperature, top_k, first_step.said)
    assert (drawn[:, 0] == first_step.said).all()
    first = shares(first_step.first, temperature, top_k)
    assert chance(np.bincount(drawn[:, 1], minlength=SHAPE.card), first) > bound("chance")
    pairs = np.zeros((SHAPE.card, SHAPE.card), np.int64)
    np.add.at(pairs, (drawn[:, 1], drawn[:, 2]), 1)
    second = np.stack([shares(row, temperature, top_k) for row in first_step.second])
    assert chance(pairs.ravel(), (first[:, None] * second).ravel()) > bound("chance")


def test_temperature_zero_takes_the_largest_logit(first_step: FirstStep) -> None:
    user = np.ascontiguousarray(first_step.user[0], np.int32)
    with (
        moshi_c.load(str(first_step.folder), device="cpu", progress=False) as model,
        moshi_c.Session(model, seed=3, text_temperature=0, audio_temperature=0) as session,
    ):
        frame = session.step_codes(user, decode=False)
    assert frame.text_token == first_step.text.argmax()
