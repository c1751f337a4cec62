"""The language model says what upstream's says.

Upstream runs live on the CPU on the same random checkpoints. Proven here, for every family: greedy
streams token for token past a wrap of the key-value ring; logits of every step, text and audio,
within float32 rounding; the published widths, two layers deep; delays, initial tokens and frames
without output; forced text; guidance in its three forms; conditions; bf16 files; all file layouts.
A last test swaps rows of every matrix to show that the comparison would notice.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
import upstream
from checkpoints import SHAPES, Shape
from conftest import Checkpoints
from played import (
    assert_same_tokens,
    distance,
    logits_distance,
    play,
    play_with,
    spread,
)
from safetensors.torch import load_file
from tolerances import bound
from upstream import Codes, LmRun

import moshi_c

pytestmark = [pytest.mark.parity, pytest.mark.timeout(900)]

FAMILIES = ("moshi", "hibiki", "stt", "depth16", "delays", "ff4")
WIDE = ("wide7b", "wide2b")
STEPS = 300


def conditions_for(shape: Shape, value: int = -1) -> dict[str, str | None]:
    """One of the possible values for each condition of a shape."""
    tables: Mapping[str, Any] = shape.lm.get("conditioners", {})
    return {name: table["lut"]["possible_values"][value] for name, table in tables.items()}


def options_for(shape: Shape) -> dict[str, Any]:
    """What a plain session of this shape has to be given."""
    conditions = conditions_for(shape)
    return {"conditions": conditions} if conditions else {}


@dataclass(frozen=True)
class Reference:
    """Upstream's conversation and what was said to it."""

    user: Codes
    run: LmRun


def clear_greedy(
    folder: Path, shape: Shape, steps: int, *, lm: Any = None, **options: Any
) -> Reference:
    """A greedy run of upstream's in which no choice is too close to call."""
    lm = lm or upstream.load_lm(folder)
    for seed in range(1, 9):
        user = upstream.user_codes(steps, shape.user_q, shape.card, seed)
        if shape.model_type == "hibiki":
            user[steps // 2] = shape.card  # the mark that ends Hibiki's input
        with upstream.one_thread():
            run = upstream.lm_greedy(lm, user, **options)
        if run.margin > bound("greedy_margin"):
            return Reference(user, run)
    raise AssertionError("every conversation has a choice too close to call")


@pytest.fixture(scope="module")
def greedy(made: Checkpoints) -> dict[str, Reference]:
    """Upstream's long greedy conversations, one a family."""
    return {
        name: clear_greedy(made.lm(name), SHAPES[name], STEPS, **options_for(SHAPES[name]))
        for name in FAMILIES
    }


# ---- whole conversations -----------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_reference_is_worth_comparing_with(greedy: dict[str, Reference], name: str) -> None:
    run, shape = greedy[name].run, SHAPES[name]
    streams = [run.text, *run.audio.T]
    assert min(len(set(stream.tolist())) for stream in streams) >= bound("distinct_tokens")
    assert shape.lm["context"] < STEPS / 2
    assert run.silent == shape.max_delay


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_streams_equal_upstreams_token_for_token_past_a_ring_wrap(
    made: Checkpoints, greedy: dict[str, Reference], name: str
) -> None:
    shape, reference = SHAPES[name], greedy[name]
    ours = play(made.lm(name), reference.user, shape.dep_q, **options_for(shape))
    assert_same_tokens(ours.out, reference.run.out)
    assert logits_distance(ours, reference.run) <= bound("logits_f32")


@pytest.mark.parametrize("name", FAMILIES)
def test_teacher_forced_logits_equal_upstreams(made: Checkpoints, name: str) -> None:
    """Forced tokens are random, so that the model hears what it would never say itself."""
    shape, folder = SHAPES[name], made.lm(name)
    user, text, audio = random_tokens(shape, 40, 5)
    with upstream.one_thread():
        theirs = upstream.lm_teacher_forced(
            upstream.load_lm(folder), user, text, audio, **options_for(shape)
        )
    ours = play(folder, user, shape.dep_q, forced=(text, audio), **options_for(shape))
    assert_same_tokens(ours.out, theirs.out)
    assert logits_distance(ours, theirs) <= bound("logits_f32")


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDE)
def test_published_widths_equal_upstream(made: Checkpoints, name: str) -> None:
    """Two layers of the 7B and of the 2B; the file is bf16, both sides compute in float32."""
    shape = SHAPES[name]
    folder = made.lm(name, dtype=torch.bfloat16)
    user = upstream.user_codes(20, shape.user_q, shape.card, 1)
    lm = upstream.load_lm(folder)
    theirs = upstream.lm_greedy(lm, user, **options_for(shape))
    del lm
    gc.collect()
    assert theirs.margin > bound("greedy_margin")
    ours = play(
        folder,
        user,
        shape.dep_q,
        load={"dtype": "f32", "max_sessions": 1, "context": 64},
        forced=(theirs.text, theirs.audio),
        **options_for(shape),
    )
    assert logits_distance(ours, theirs) <= bound("logits_f32")
    # What it would have said by itself, given the same past, is what upstream said.
    assert_same_tokens(ours.out, theirs.out)
    assert (ours.text_logits.argmax(-1) == theirs.text).all()
    assert (ours.audio_logits.argmax(-1) == theirs.audio).all()


def test_extra_heads_equal_upstreams(made: Checkpoints, greedy: dict[str, Reference]) -> None:
    ours = play(made.lm("stt"), greedy["stt"].user, 0)
    assert ours.heads is not None
    assert ours.heads.shape == greedy["stt"].run.heads.shape
    assert np.abs(ours.heads - greedy["stt"].run.heads).max() <= bound("heads_f32")


# ---- delays, initial tokens, silence -----------------------------------------------------------


@pytest.mark.parametrize("name", ["moshi", "hibiki", "stt", "delays"])
def test_nothing_comes_out_before_the_longest_delay_has_passed(
    made: Checkpoints, name: str
) -> None:
    shape = SHAPES[name]
    user = upstream.user_codes(shape.max_delay + 3, shape.user_q, shape.card, 3)
    ours = play(made.lm(name), user, shape.dep_q, **options_for(shape))
    assert (ours.out[: shape.max_delay] == -1).all()
    assert (ours.out[shape.max_delay :] >= 0).all()


@pytest.mark.parametrize("name", ["moshi", "stt", "delays"])
def test_the_users_first_frame_is_never_heard(made: Checkpoints, name: str) -> None:
    shape, folder = SHAPES[name], made.lm(name)
    user = upstream.user_codes(12, shape.user_q, shape.card, 3)
    other_first, other_second = user.copy(), user.copy()
    other_first[0] = (user[0] + 1) % shape.card
    other_second[1] = (user[1] + 1) % shape.card
    with moshi_c.load(str(folder), device="cpu") as model:
        plain = play_with(model, user, shape.dep_q)
        first = play_with(model, other_first, shape.dep_q)
        second = play_with(model, other_second, shape.dep_q)
    assert (plain.text_logits == first.text_logits).all()
    assert (plain.audio_logits == first.audio_logits).all()
    assert distance(second.text_logits, plain.text_logits) > bound("swap_is_felt")


def test_the_first_step_reads_initial_tokens_only(made: Checkpoints, tmp_path: Path) -> None:
    """Other initial rows change the first logits; every other row may change and does not."""
    shape, folder = SHAPES["delays"], made.lm("delays")
    user = upstream.user_codes(1, shape.user_q, shape.card, 3)
    plain = play(folder, user, shape.dep_q)

    def change(state: checkpoints.Tensors, initial: bool) -> None:
        for name in [name for name in state if name.startswith(("emb.", "text_emb."))]:
            rows = slice(-1, None) if initial else slice(0, -1)
            state[name][rows] *= 0.5

    moved = checkpoints.mutate(folder, tmp_path / "initial", lambda state: change(state, True))
    kept = checkpoints.mutate(folder, tmp_path / "others", lambda state: change(state, False))
    assert (play(kept, user, shape.dep_q).text_logits == plain.text_logits).all()
    other = play(moved, user, shape.dep_q)
    assert distance(other.text_logits, plain.text_logits) > bound("swap_is_felt")


# ---- forced text -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["moshi", "delays", "stt", "hibiki"])
def test_forced_text_equals_upstreams_text_hook(made: Checkpoints, name: str) -> None:
    """Two runs of forced words, the second handed over in two parts; 2 is Hibiki's ignored EOS."""
    shape, folder = SHAPES[name], made.lm(name)
    given = {7: [11, 2, 2, 150, 3, 0], 30: [9, 8], 31: [77, 76, 75]}
    hook = {7 + index: token for index, token in enumerate(given[7])}
    hook |= {30 + index: token for index, token in enumerate(given[30] + given[31])}
    lm = upstream.load_lm(folder)
    reference = clear_greedy(folder, shape, 60, lm=lm, forced_text=hook, **options_for(shape))
    assert all(reference.run.text[step] == token for step, token in hook.items())
    ours = play(folder, reference.user, shape.dep_q, forced_text=given, **options_for(shape))
    assert_same_tokens(ours.out, reference.run.out)
    assert logits_distance(ours, reference.run) <= bound("logits_f32")
    if name == "hibiki":  # that upstream does read the padding row for it
        file = load_file(folder / checkpoints.LM_NAME)
        assert not torch.equal(file["text_emb.weight"][2], file["text_emb.weight"][3])
        assert torch.equal(lm.text_emb.weight[2], lm.text_emb.weight[3])


# ---- guidance and conditions -------------------------------------------------------------------

GUIDANCE: dict[str, tuple[str, dict[str, Any]]] = {
    "null_condition": ("hibiki", {"cfg_coef": 3.0}),
    "null_condition_below_one": ("hibiki", {"cfg_coef": 0.5}),
    "masked_until": ("moshi", {"cfg_coef": 2.0, "cfg_masked_until": 20}),
    "masked_until_one": ("delays", {"cfg_coef": 2.0, "cfg_masked_until": 1}),
    "no_text": ("moshi", {"cfg_coef": 2.5, "cfg_is_no_text": True}),
    "all_at_once": ("hibiki", {"cfg_coef": 2.0, "cfg_masked_until": 9, "cfg_is_no_text": True}),
}


@pytest.mark.parametrize("variant", GUIDANCE)
def test_guidance_equals_upstreams(made: Checkpoints, variant: str) -> None:
    name, options = GUIDANCE[variant]
    shape, folder = SHAPES[name], made.lm(name)
    if name == "hibiki":
        options = options | {
            "conditions": {"description": "very_good"},
            "null_conditions": {"description": "very_bad"},
        }
    lm = upstream.load_lm(folder)
    reference = clear_greedy(folder, shape, 110, lm=lm, **options)
    plain = upstream.lm_greedy(lm, reference.user[:30], **options_for(shape))
    assert (plain.audio != reference.run.audio[:30]).any()
    ours = play(folder, reference.user, shape.dep_q, **options)
    assert_same_tokens(ours.out, reference.run.out)
    assert logits_distance(ours, reference.run) <= bound("logits_f32")


CONDITIONS: list[tuple[str, dict[str, str | None]]] = [
    ("hibiki", {"description": "very_bad"}),
    ("hibiki", {"description": "neutral"}),
    ("hibiki", {"description": None}),
    ("rows", {"description": "good", "pace": "slow"}),
    ("rows", {"description": "good", "pace": None}),
    ("rows", {"description": None, "pace": "fast"}),
]


@pytest.mark.parametrize(("name", "conditions"), CONDITIONS)
def test_conditions_equal_upstreams(
    made: Checkpoints, name: str, conditions: dict[str, str | None]
) -> None:
    shape, folder = SHAPES[name], made.lm(name)
    lm = upstream.load_lm(folder)
    reference = clear_greedy(folder, shape, 40, lm=lm, conditions=conditions)
    if conditions != conditions_for(shape):
        other = upstream.lm_greedy(lm, reference.user[:1], conditions=conditions_for(shape))
        assert (other.text_logits[0] != reference.run.text_logits[0]).any()
    ours = play(folder, reference.user, shape.dep_q, conditions=conditions)
    assert_same_tokens(ours.out, reference.run.out)
    assert logits_distance(ours, reference.run) <= bound("logits_f32")


# ---- options of load, files --------------------------------------------------------------------


def test_context_given_to_load_is_the_context_upstream_would_have(made: Checkpoints) -> None:
    shape, folder = SHAPES["moshi"], made.lm("moshi")
    reference = clear_greedy(folder, shape, 60, lm=upstream.load_lm(folder, context=37))
    ours = play(folder, reference.user, shape.dep_q, load={"context": 37})
    assert_same_tokens(ours.out, reference.run.out)
    assert logits_distance(ours, reference.run) <= bound("logits_f32")


def test_packed_split_and_sharded_files_are_the_same_model(made: Checkpoints) -> None:
    """The published packed names, upstream's in-memory names, and an index over two files."""
    shape = SHAPES["depth16"]
    user = upstream.user_codes(12, shape.user_q, shape.card, 2)
    with upstream.one_thread():
        theirs = upstream.lm_greedy(upstream.load_lm(made.lm("depth16", packed=False)), user)
    folders = [
        made.lm("depth16"),
        made.lm("depth16", packed=False),
        made.lm("depth16", sharded=True),
        made.lm("depth16", packed=False, sharded=True),
    ]
    runs = [play(folder, user, shape.dep_q) for folder in folders]
    assert logits_distance(runs[0], theirs) <= bound("logits_f32")
    for run in runs[1:]:
        assert (run.text_logits == runs[0].text_logits).all()
        assert (run.audio_logits == runs[0].audio_logits).all()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("moshi", torch.bfloat16),
        ("depth16", torch.bfloat16),
        ("stt", torch.bfloat16),
        ("moshi", torch.float16),
    ],
    ids=str,
)
def test_16_bit_file_with_f32_keys_equals_upstreams_float32_run_on_its_weights(
    made: Checkpoints, name: str, dtype: torch.dtype
) -> None:
    shape, folder = SHAPES[name], made.lm(name, dtype=dtype)
    reference = clear_greedy(folder, shape, 130)
    ours = play(folder, reference.user, shape.dep_q, load={"kv_dtype": "f32"})
    assert_same_tokens(ours.out, reference.run.out)
    assert logits_distance(ours, reference.run) <= bound("logits_f32")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moshi", "depth16", "stt"])
@pytest.mark.parametrize("load", [{}, {"kv_dtype": "bf16"}, {"dtype": "bf16"}], ids=str)
def test_bf16_is_no_further_from_float32_than_upstreams_own_bf16(
    made: Checkpoints, name: str, load: dict[str, str]
) -> None:
    shape, folder = SHAPES[name], made.lm(name, dtype=torch.bfloat16)
    exact, rough = bf16_references(folder, shape)
    user, forced = bf16_tokens(shape)
    ours = play(folder, user, shape.dep_q, load=load, forced=forced)
    text = spread(ours.text_logits, exact.text_logits)
    assert text <= bound("bf16_no_worse") * spread(rough.text_logits, exact.text_logits)
    if shape.dep_q:
        audio = spread(ours.audio_logits, exact.audio_logits)
        assert audio <= bound("bf16_no_worse") * spread(rough.audio_logits, exact.audio_logits)


def bf16_tokens(shape: Shape) -> tuple[Codes, tuple[Codes, Codes]]:
    """What is said in the comparison of bf16 runs."""
    user, text, audio = random_tokens(shape, 60, 6)
    return user, (text, audio)


_bf16_runs: dict[Path, tuple[LmRun, LmRun]] = {}


def bf16_references(folder: Path, shape: Shape) -> tuple[LmRun, LmRun]:
    """Upstream in float32 and in bf16, both on the same bf16 weights."""
    if folder not in _bf16_runs:
        user, (text, audio) = bf16_tokens(shape)
        with upstream.one_thread():
            exact, rough = (
                upstream.lm_teacher_forced(upstream.load_lm(folder, dtype), user, text, audio)
                for dtype in (torch.float32, torch.bfloat16)
            )
        _bf16_runs[folder] = exact, rough
    return _bf16_runs[folder]


# ---- every matrix ------------------------------------------------------------------------------


def random_tokens(shape: Shape, steps: int, seed: int) -> tuple[Codes, Codes, Codes]:
    """User codes, text and audio that use every id of every table in turn."""
    rng = np.random.default_rng(seed)

    def stream(card: int) -> Codes:
        turns = [rng.permutation(card) for _ in range(-(-steps // card))]
        tokens: Codes = np.concatenate(turns)[:steps]
        return tokens

    user = np.stack([stream(shape.card) for _ in range(shape.user_q)], 1)
    spoken = [stream(shape.card) for _ in range(shape.dep_q)]
    audio = np.stack(spoken, 1) if spoken else np.zeros((steps, 0), np.int64)
    return user, stream(shape.text_card), audio


@pytest.mark.slow
def test_swapping_two_rows_of_any_matrix_moves_the_logits(
    made: Checkpoints, tmp_path: Path
) -> None:
    """Each tensor of a model that has every kind of them, at two pairs of rows.

    The tokens use every row of every table, so any two rows would do. Pairs are near each other
    and far apart, the latter across the blocks of packed attention weights.
    """
    shape, folder = SHAPES["rows"], made.lm("rows")
    options = {"conditions": {"description": "good", "pace": "fast"}}
    user, text, audio = random_tokens(shape, 56, 8)
    with upstream.one_thread():
        lm = upstream.load_lm(folder)
        theirs = upstream.lm_teacher_forced(lm, user, text, audio, **options)

    def moved(where: Path) -> float:
        ours = play(where, user, shape.dep_q, forced=(text, audio), **options)
        assert ours.heads is not None
        heard = theirs.out[:, 0] >= 0
        heads = np.abs(ours.heads - theirs.heads)[heard].max() / bound("heads_f32")
        return max(logits_distance(ours, theirs), float(heads) * bound("logits_f32"))

    assert moved(folder) <= bound("logits_f32")

    tables = {"description": 3, "pace": 1}  # the rows in use
    unnoticed = []
    state = load_file(folder / checkpoints.LM_NAME)
    assert len(state) > 50
    for index, (name, value) in enumerate(sorted(state.items())):
        if name.endswith("learnt_padding"):
            continue  # read only without a value; `test_conditions_equal_upstreams` reads it
        rows = checkpoints.rows_of(value)
        rng = np.random.default_rng(index)
        first = int(rng.integers(0, rows - 1))
        pairs = [(first, first + 1), (first % (rows // 2), rows - 1 - first % (rows // 4 + 1))]
        if name.endswith(".embed.weight"):
            used = tables[name.split(".")[2]]
            pairs = [(used, 0)]
        for pair in pairs:
            where = checkpoints.mutate(
                folder,
                tmp_path / f"{index}-{pair[0]}-{pair[1]}",
                lambda state, name=name, pair=pair: checkpoints.swap_rows(state, name, *pair),
            )
            if moved(where) < bound("swap_is_felt"):
                unnoticed.append((name, pair))
    assert unnoticed == []


def test_every_kind_of_tensor_is_in_the_model_whose_rows_are_swapped() -> None:
    """Nothing that a family stores is missing in `rows`, up to numbers in names."""

    def kinds(name: str) -> set[str]:
        skeleton = checkpoints.lm_state(SHAPES[name], 0)
        return {".".join(p for p in key.split(".") if not p.isdigit()) for key in skeleton}

    small = [name for name in SHAPES if name not in WIDE]
    everything = set(itertools.chain.from_iterable(kinds(name) for name in small))
    assert everything == kinds("rows")
