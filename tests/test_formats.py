"""The narrow formats of the language model's matrices: fp8, int8, q8, q4."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import sound
import torch
import upstream
from checkpoints import LM_NAME, SHAPES, Tensors, pack
from played import Played, divergence, play, play_with
from safetensors.torch import load_file, save_file
from tolerances import bound

import moshi_c

if TYPE_CHECKING:
    from conftest import Checkpoints
    from upstream import Codes, Floats

FORMATS = ["fp8", "int8", "q8", "q4"]
SHAPE = SHAPES["moshi"]
STEPS = 130  # the ring of this shape is 100


def streams(steps: int) -> tuple[Codes, tuple[Codes, Codes]]:
    """What the user says, and what the model is made to say."""
    rng = np.random.default_rng(3)
    user = upstream.user_codes(steps, SHAPE.user_q, SHAPE.card, 2)
    text = rng.integers(4, SHAPE.text_card, steps)
    return user, (text, rng.integers(0, SHAPE.card, (steps, SHAPE.dep_q)))


def forced(folder: Path, steps: int = STEPS, **load: str) -> Played:
    user, said = streams(steps)
    return play(folder, user, SHAPE.dep_q, forced=said, load={"kv_dtype": "f32", **load})


def worst(ours: Played, theirs: Played) -> tuple[float, float]:
    """The largest divergence and the least agreement of all streams."""
    text = divergence(ours.text_logits[:, None], theirs.text_logits[:, None])
    audio = divergence(ours.audio_logits, theirs.audio_logits)
    return max(text[0].max(), audio[0].max()), min(text[1].min(), audio[1].min())


@pytest.fixture(scope="module")
def followed(made: Checkpoints) -> dict[str, tuple[float, float]]:
    """How closely each format follows float32 on a random model."""
    folder = made.lm("moshi")
    exact = forced(folder, dtype="f32")
    return {dtype: worst(forced(folder, dtype=dtype), exact) for dtype in FORMATS}


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_random_model_follows_its_float32_run_past_a_ring_wrap(
    followed: dict[str, tuple[float, float]], dtype: str
) -> None:
    kl, same = followed[dtype]
    assert kl <= bound(f"kl_random_{dtype}")
    assert same >= bound(f"top1_random_{dtype}")


def test_fewer_bits_follow_less_closely(followed: dict[str, tuple[float, float]]) -> None:
    """They are really what is computed with: none equals float32, and 4 bits lose most."""
    fp8, int8, q8, q4 = (followed[dtype][0] for dtype in FORMATS)
    assert 0 < q8 < int8 < q4 / 10
    assert int8 < fp8 < q4


def test_int8_keys_and_values_follow_float32_past_a_ring_wrap(made: Checkpoints) -> None:
    folder = made.lm("moshi")
    kl, same = worst(forced(folder, kv_dtype="int8"), forced(folder))
    assert 0 < kl <= bound("kl_random_kv_int8")
    assert same >= bound("top1_random_kv_int8")


@pytest.fixture(scope="module")
def talk() -> tuple[Codes, tuple[Codes, Codes], Played]:
    """The package's model in a conversation longer than its memory, and its float32 logits."""
    pcm = sound.speech("hello, how are you? what colour is the sky? what is two plus three?")
    with moshi_c.load(dtype="f32", max_sessions=1) as model:
        frames, dep_q = model.config["context"] + 10, model.config["dep_q"]
        pcm = np.resize(np.concatenate([pcm, sound.silence(3)]), (frames, model.frame_size))
        with moshi_c.Session(model, seed=7) as session:
            out = [session.step(frame, decode=False) for frame in pcm]
        user = np.stack([frame.user_codes for frame in out])
        said = np.stack([[frame.text_token, *frame.codes] for frame in out[1:]])
        said = np.concatenate([said[:1], said])
        tokens = said[:, 0], said[:, 1:]
        return user, tokens, play_with(model, user, dep_q, forced=tokens)


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_small_model_follows_its_float32_run_past_a_ring_wrap(
    talk: tuple[Codes, tuple[Codes, Codes], Played], dtype: str
) -> None:
    user, said, theirs = talk
    with moshi_c.load(dtype=dtype, max_sessions=1) as model:
        assert model.dtype == dtype
        ours = play_with(model, user, model.config["dep_q"], forced=said)
    kl, same = worst(ours, theirs)
    assert kl <= bound(f"kl_tiny_{dtype}")
    assert same >= bound(f"top1_tiny_{dtype}")


def test_int8_keys_and_values_of_the_small_model_follow_float32(
    talk: tuple[Codes, tuple[Codes, Codes], Played],
) -> None:
    user, said, theirs = talk
    with moshi_c.load(dtype="f32", kv_dtype="int8", max_sessions=1) as model:
        kl, same = worst(play_with(model, user, model.config["dep_q"], forced=said), theirs)
    assert 0 < kl <= bound("kl_tiny_kv_int8")
    assert same >= bound("top1_tiny_kv_int8")


def test_int8_keys_and_values_take_a_byte_each_and_their_scales() -> None:
    used = {}
    for kv_dtype in ("bf16", "int8"):
        with (
            moshi_c.load(kv_dtype=kv_dtype, max_sessions=1) as model,  # type: ignore[arg-type]
            moshi_c.Session(model, seed=1) as session,
        ):
            session.step_codes(np.zeros(8, np.int32), decode=False)
            used[kv_dtype] = model.memory.used
    heads, width, page = 4, 64, 64  # of the package's model, which has 4 layers
    assert used["bf16"] == 4 * 2 * heads * page * 2 * width
    assert used["int8"] == 4 * 2 * heads * page * (width + 4)


def test_snapshots_and_forks_keep_int8_keys_and_values(made: Checkpoints) -> None:
    with moshi_c.load(made.lm("moshi"), kv_dtype="int8", progress=False) as model:
        user, _ = streams(140)

        def go_on(session: moshi_c.Session) -> list[list[bytes]]:
            out = []
            for codes in user[110:]:
                session.step_codes(codes.astype(np.int32), decode=False)
                out.append([logits.tobytes() for logits in session.logits])
            return out

        with moshi_c.Session(model, seed=1, keep_logits=True) as session:
            for codes in user[:110]:
                session.step_codes(codes.astype(np.int32), decode=False)
            data = session.snapshot()
            with session.fork() as fork, moshi_c.Session.from_snapshot(model, data) as restored:
                assert go_on(session) == go_on(fork) == go_on(restored)


# ---- the published int8 layout -----------------------------------------------------------------


def is_matrix(name: str, value: torch.Tensor) -> bool:
    return value.dim() == 2 and "emb." not in name and "conditioner" not in name


def as_published(state: Tensors) -> tuple[Tensors, Tensors]:
    """Every linear layer as upstream's exporter stores it, int8 with 127 times its scale; and the
    floats that it stands for."""
    stored, meant = {}, {}
    for name, value in state.items():
        stored[name] = meant[name] = value
        if is_matrix(name, value):
            half = value.half().float()
            most = half.abs().amax(1)
            stored[name] = torch.round(127 * half / most[:, None]).to(torch.int8)
            stored[name + "_scb"] = most
            meant[name] = stored[name].float() * (most / 127)[:, None]
    return stored, meant


@pytest.fixture(scope="module")
def published(made: Checkpoints) -> tuple[Path, Path]:
    """Folders of the int8 file and of the floats that it stands for."""
    source = made.lm("moshi", packed=False)
    stored, meant = as_published(load_file(source / LM_NAME))
    folders = []
    for name, state in (("stored", stored), ("meant", meant)):
        folder = source.with_name(f"{source.name}-{name}")
        if not folder.exists():
            shutil.copytree(source, folder)
            save_file(state, folder / LM_NAME)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"quantize": True}))
        folders.append(folder)
    return folders[0], folders[1]


def logits(played: Played) -> list[Floats]:
    return [played.text_logits, played.audio_logits]


def test_a_published_int8_file_is_read_as_int8(published: tuple[Path, Path]) -> None:
    stored, meant = published
    with moshi_c.load(stored, progress=False) as model:
        assert model.dtype == "int8"
    kl, same = worst(forced(stored, 40), forced(meant, 40))
    assert kl <= bound("kl_random_int8")
    assert same >= bound("top1_random_int8")


def test_a_published_int8_file_read_as_float32_is_what_it_stands_for(
    published: tuple[Path, Path],
) -> None:
    stored, meant = published
    for ours, theirs in zip(
        logits(forced(stored, 10, dtype="f32")), logits(forced(meant, 10)), strict=True
    ):
        assert np.array_equal(ours, theirs)


def test_packed_and_split_int8_files_are_the_same_model(
    published: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "packed"
    shutil.copytree(published[0], folder)
    state = load_file(folder / LM_NAME)
    packed = pack({name: value for name, value in state.items() if not name.endswith("_scb")})
    scales = {name: value for name, value in state.items() if name.endswith("_scb")}
    for name in list(packed):
        base = name.removesuffix(".in_proj_weight").removesuffix(".out_proj.weight")
        if base == name or packed[name].dtype != torch.int8:
            continue
        part = "in_projs" if "in_proj" in name else "out_projs"
        sets = [key for key in scales if key.startswith(f"{base}.{part}.")]
        sets.sort(key=lambda key: int(key.split(".")[-2]))
        packed[f"{name}_scb"] = torch.cat([scales.pop(key) for key in sets])
    save_file(packed | scales, folder / LM_NAME)
    for ours, theirs in zip(
        logits(forced(folder, 5)), logits(forced(published[0], 5)), strict=True
    ):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("text_linear.weight_scb"), "text_linear.weight_scb is missing"),
        (
            lambda s: s.update({"text_linear.weight_scb": torch.ones(7)}),
            "text_linear.weight_scb has shape",
        ),
        (
            lambda s: s.update({"text_emb.weight": s["text_emb.weight"].to(torch.int8)}),
            "text_emb.weight is stored as I8",
        ),
    ],
)
def test_an_int8_file_that_is_not_whole_is_an_error(
    published: tuple[Path, Path], tmp_path: Path, change: object, words: str
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(published[0], folder)
    state = load_file(folder / LM_NAME)
    change(state)  # type: ignore[operator]
    save_file(state, folder / LM_NAME)
    with pytest.raises(moshi_c.CheckpointError, match=words):
        moshi_c.load(folder, progress=False)


# ---- published fp8 layouts ---------------------------------------------------------------------

#: The name behind the matrix's and the shape of its scales, as compressed-tensors, vLLM and others
#: write them; "plain" are numbers without a scale, for all tensors, embeddings and norms too.
FP8_LAYOUTS = {
    "channels": ("_scale", lambda rows: (rows, 1)),
    "rows": ("_scale", lambda rows: (rows,)),
    "tensor": ("_scale", lambda rows: ()),
    "inverse": ("_scale_inv", lambda rows: (1,)),
    "plain": (None, None),
}
FP8 = torch.float8_e4m3fn


def as_fp8(state: Tensors, layout: str) -> tuple[Tensors, Tensors]:
    """A file in that layout, and the floats that it stands for."""
    ending, shape_of = FP8_LAYOUTS[layout]
    stored, meant = {}, {}
    for name, value in state.items():
        stored[name] = meant[name] = value
        if shape_of is None:
            stored[name] = value.to(FP8)
            meant[name] = stored[name].float()
        elif is_matrix(name, value):
            shape = shape_of(len(value))
            most = value.float().abs().amax(1) if len(value) in shape else value.float().abs().max()
            scale = (most / 448).reshape(shape)
            factor = scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(())
            stored[name] = (value.float() / factor).to(FP8)
            stored[name + ending] = scale
            meant[name] = stored[name].float() * factor
    return stored, meant


def with_fp8(state: Tensors, word: str) -> tuple[Tensors, Tensors]:
    """What has the word in its name as fp8 with one scale, and the floats that it stands for."""
    stored, meant = dict(state), dict(state)
    for name, value in state.items():
        if word in name:
            scale = value.float().abs().max() / 448
            stored[name], stored[f"{name}_scale"] = (
                (value.float() / scale).to(FP8),
                scale.reshape(1),
            )
            meant[name] = stored[name].float() * scale
    return stored, meant


def folder_of(source: Path, target: Path, state: Tensors) -> Path:
    if not target.exists():
        shutil.copytree(source, target)
    save_file(state, target / LM_NAME)
    return target


@pytest.fixture(scope="module", params=FP8_LAYOUTS)
def published_fp8(
    made: Checkpoints, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, Path]:
    """Folders of the fp8 file and of the floats that it stands for."""
    source, target = made.lm("moshi", packed=False), tmp_path_factory.mktemp("fp8")
    stored, meant = as_fp8(load_file(source / LM_NAME), request.param)
    return (
        folder_of(source, target / "stored", stored),
        folder_of(source, target / "meant", meant),
    )


def test_a_published_fp8_file_is_the_model_that_it_stands_for(
    published_fp8: tuple[Path, Path],
) -> None:
    """Read as it is; as float32 and by way of it bit for bit."""
    stored, meant = published_fp8
    with moshi_c.load(stored, progress=False) as model:
        assert model.dtype == "fp8"
    exact = forced(meant, 5, dtype="f32")
    for dtype in ("auto", "fp8"):
        for ours, theirs in zip(logits(forced(stored, 5, dtype=dtype)), logits(exact), strict=True):
            assert np.abs(ours - theirs).max() <= 2e-4 * np.abs(theirs).max()
    for dtype in ("f32", "q4"):
        for ours, theirs in zip(
            logits(forced(stored, 5, dtype=dtype)),
            logits(forced(meant, 5, dtype=dtype)),
            strict=True,
        ):
            assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", ["auto", "f32", "bf16", "q4"])
def test_fp8_vectors_are_read_with_their_scale(
    made: Checkpoints, tmp_path: Path, dtype: str
) -> None:
    source = made.lm("moshi", packed=False)
    states = with_fp8(load_file(source / LM_NAME), "norm")
    ours, theirs = (
        logits(forced(folder_of(source, tmp_path / str(i), state), 5, dtype=dtype))
        for i, state in enumerate(states)
    )
    for our, their in zip(ours, theirs, strict=True):
        assert np.array_equal(our, their)


@pytest.mark.parametrize("value", [None, "good"])
def test_fp8_conditions_are_read_with_their_scale(
    made: Checkpoints, tmp_path: Path, value: str | None
) -> None:
    source, shape = made.lm("hibiki"), SHAPES["hibiki"]
    states = with_fp8(load_file(source / LM_NAME), "conditioner")
    assert len(states[0]) == len(states[1]) + 3
    user = upstream.user_codes(5, shape.user_q, shape.card, 2)
    conditions = {"description": value} if value else {}
    ours, theirs = (
        play(folder_of(source, tmp_path / str(i), state), user, shape.dep_q, conditions=conditions)
        for i, state in enumerate(states)
    )
    assert np.array_equal(ours.text_logits, theirs.text_logits)
    assert np.array_equal(ours.audio_logits, theirs.audio_logits)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: s.update({"text_linear.weight_scale": torch.ones(7)}),
            r"text_linear\.weight_scale has shape \[7\], expected \[",
        ),
        (  # of blocks, which are not read
            lambda s: s.update({"text_linear.weight_scale": torch.ones(2, 3)}),
            "text_linear.weight_scale has shape",
        ),
        (
            lambda s: s.update({"text_linear.weight_scale": torch.ones(1, dtype=torch.int8)}),
            "text_linear.weight_scale is stored as I8",
        ),
        (
            lambda s: s["text_linear.weight_scale"].__setitem__((3, 0), torch.inf),
            r"text_linear\.weight_scale has inf at element 3 and 1 such values, expected finite",
        ),
        (
            lambda s: s.update({"out_norm.alpha_scale": torch.ones(1)}),
            "out_norm.alpha_scale is not part of the model",
        ),
        (  # a vector is one row
            lambda s: s.update(
                {
                    "out_norm.alpha": s["out_norm.alpha"].to(FP8),
                    "out_norm.alpha_scale": torch.ones(2),
                }
            ),
            r"out_norm\.alpha_scale has shape \[2\], expected \[1\]",
        ),
        (
            lambda s: s["linears.3.weight"].view(torch.uint8).__setitem__((5, 7), 0x7F),
            r"linears\.3\.weight has nan at element .* and 1 such values, expected finite",
        ),
        (
            lambda s: s["linears.3.weight"].view(torch.uint8).__setitem__((0, 1), 0xFF),
            r"linears\.3\.weight has -?nan at element 1 and 1 such values, expected finite",
        ),
    ],
)
def test_an_fp8_file_with_other_scales_or_nan_is_an_error(
    made: Checkpoints, tmp_path: Path, change: object, words: str
) -> None:
    source = made.lm("moshi", packed=False)
    state, _ = as_fp8(load_file(source / LM_NAME), "channels")
    change(state)  # type: ignore[operator]
    folder = folder_of(source, tmp_path / "broken", state)
    with pytest.raises(moshi_c.CheckpointError, match=words):
        moshi_c.load(folder, progress=False)


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_weight_that_is_not_finite_is_an_error_that_names_its_tensor(
    made: Checkpoints, tmp_path: Path, dtype: str
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(made.lm("moshi", packed=False), folder)
    state = load_file(folder / LM_NAME)
    state["linears.3.weight"][5, 7] = float("nan")
    save_file(state, folder / LM_NAME)
    with pytest.raises(moshi_c.CheckpointError, match=r"linears\.3\.weight: a weight is not"):
        moshi_c.load(folder, dtype=dtype, progress=False)  # type: ignore[arg-type]


# ---- what the model says of itself, and bits ---------------------------------------------------


@pytest.mark.parametrize("dtype", FORMATS)
def test_dtype_and_memory_tell_what_is_held(made: Checkpoints, dtype: str) -> None:
    folder = made.lm("moshi", packed=False)
    state = load_file(folder / LM_NAME)
    with moshi_c.load(folder, dtype="f32", progress=False) as model:
        plain = model.memory.weights
    with moshi_c.load(folder, dtype=dtype, progress=False) as model:  # type: ignore[arg-type]
        assert model.dtype == dtype
        block = model.memory.weights
    saved = 0
    for name, value in state.items():
        if is_matrix(name, value):
            rows, columns = value.shape
            panels, tiles = -(-rows // 16), -(-columns // 64)
            narrow = {
                "fp8": -(-4 * rows // 64) * 64 + rows * columns,
                "int8": panels * (64 + 1024 * tiles),
                "q8": panels * 1088 * tiles,
                "q4": panels * 576 * tiles,
            }
            saved += 4 * value.numel() - narrow[dtype]
    assert plain - block == saved


@pytest.mark.parametrize("dtype", FORMATS)
def test_neighbours_change_no_bit(made: Checkpoints, dtype: str) -> None:
    rng = np.random.default_rng(1)
    folder = made.lm("moshi")
    with moshi_c.load(folder, dtype=dtype, progress=False) as model:  # type: ignore[arg-type]
        pcm = rng.normal(0, 0.1, (8, 5, model.frame_size)).astype(np.float32)

        def session() -> moshi_c.Session:
            return moshi_c.Session(model, seed=1, keep_logits=True)

        alone, many = session(), [session() for _ in range(5)]
        for frames in pcm:
            alone.step(frames[2])
            moshi_c.step_many(many, list(frames))
            for ours, theirs in zip(many[2].logits, alone.logits, strict=True):
                assert np.array_equal(ours, theirs)
