"""Checkpoints converted once: `moshi-c quantize`, and how a folder of panels opens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import damage
import numpy as np
import pytest
import test_open_large
import torch
import upstream
from checkpoints import LM_NAME, SHAPES
from played import Played, play
from safetensors.torch import load_file, save_file
from test_formats import FP8_LAYOUTS, as_fp8, as_published, with_fp8

import moshi_c
from moshi_c import CheckpointError, convert
from moshi_c.cli import main

if TYPE_CHECKING:
    from conftest import Checkpoints

FORMATS = ["q8", "q4", "int8"]  # of panels
METADATA = "__metadata__"


def converted(source: Path | None, target: Path, dtype: str) -> Path:
    return convert.quantize(source, target, dtype, progress=False)  # type: ignore[arg-type]


def played(folder: Path, shape: str, **load: Any) -> Played:
    sizes = SHAPES[shape]
    user = upstream.user_codes(6, sizes.user_q, sizes.card, 2)
    return play(folder, user, sizes.dep_q, load=load)


def assert_same_bits(ours: Played, theirs: Played) -> None:
    assert np.array_equal(ours.out, theirs.out)
    assert np.array_equal(ours.text_logits, theirs.text_logits)
    assert np.array_equal(ours.audio_logits, theirs.audio_logits)


# ---- what is written ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FORMATS, "fp8", "bf16"])
@pytest.mark.parametrize(
    ("shape", "packed"), [("rows", True), ("rows", False), ("hibiki", True), ("stt", False)]
)
def test_a_converted_folder_gives_the_bits_of_converting_while_loading(
    made: Checkpoints, tmp_path: Path, shape: str, packed: bool, dtype: str
) -> None:
    source = made.lm(shape, packed=packed)
    folder = converted(source, tmp_path / "converted", dtype)
    assert_same_bits(played(folder, shape), played(source, shape, dtype=dtype))


@pytest.mark.parametrize("dtype", [*FORMATS, "fp8", "bf16"])
@pytest.mark.parametrize("stored", ["int8", *FP8_LAYOUTS])
def test_published_narrow_files_convert_too(
    made: Checkpoints, tmp_path: Path, stored: str, dtype: str
) -> None:
    source = tmp_path / "published"
    shutil.copytree(made.lm("rows", packed=False), source)
    state = load_file(source / LM_NAME)
    narrow = as_published(state)[0] if stored == "int8" else as_fp8(state, stored)[0]
    save_file(narrow, source / LM_NAME)
    if stored != "int8" and dtype == "fp8":
        with pytest.raises(CheckpointError, match="holds fp8 weights already"):
            converted(source, tmp_path / "converted", dtype)
        return
    folder = converted(source, tmp_path / "converted", dtype)
    assert_same_bits(played(folder, "rows"), played(source, "rows", dtype=dtype))


@pytest.mark.parametrize("dtype", [*FORMATS, "fp8", "bf16"])
def test_fp8_vectors_convert_as_they_are_read(
    made: Checkpoints, tmp_path: Path, dtype: str
) -> None:
    source = tmp_path / "published"
    shutil.copytree(made.lm("rows", packed=False), source)
    save_file(with_fp8(load_file(source / LM_NAME), "norm")[0], source / LM_NAME)
    folder = converted(source, tmp_path / "converted", dtype)
    assert_same_bits(played(folder, "rows"), played(source, "rows", dtype=dtype))


def test_shards_become_one_file(made: Checkpoints, tmp_path: Path) -> None:
    source = made.lm("rows", sharded=True)
    folder = converted(source, tmp_path / "converted", "q4")
    assert_same_bits(played(folder, "rows"), played(source, "rows", dtype="q4"))


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_file_names_its_format_and_panels_stay_in_it(tmp_path: Path, dtype: str) -> None:
    folder = converted(None, tmp_path / "tiny", dtype)
    header, _ = damage._split((folder / LM_NAME).read_bytes())
    assert header[METADATA]["moshi_c.format"] == dtype
    panels = [entry for name, entry in header.items() if entry.get("dtype") == "U8"]
    assert len(panels) > 50
    with moshi_c.load(folder, progress=False) as model, moshi_c.load(dtype=dtype) as made:  # type: ignore[arg-type]
        assert model.dtype == dtype
        for what in ("parameters", "weight_bytes"):
            assert model._info[what] == made._info[what]
        stored = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in panels)
        assert model._info["mapped_bytes"] == made._info["mapped_bytes"] + stored


@pytest.mark.parametrize("packed", [True, False])
def test_fp8_is_written_as_others_read_it(made: Checkpoints, tmp_path: Path, packed: bool) -> None:
    """Each matrix as F8_E4M3 and [rows,1] scales; their products are near what was given."""
    source = made.lm("rows", packed=packed)
    folder = converted(source, tmp_path / "converted", "fp8")
    given, written = load_file(source / LM_NAME), load_file(folder / LM_NAME)
    narrow = [name for name, value in written.items() if value.dtype == torch.float8_e4m3fn]
    assert len(narrow) > 10
    assert set(written) == set(given) | {f"{name}_scale" for name in narrow}
    for name, value in given.items():
        if name not in narrow:
            assert torch.equal(written[name], value)
            continue
        scale, value = written[f"{name}_scale"], value.float()
        assert scale.dtype == torch.float32 and scale.shape == (len(value), 1)
        most = value.abs().amax(1, keepdim=True)
        assert torch.allclose(scale, most / 448)
        wide = written[name].float() * scale
        assert ((wide - value).abs() <= torch.maximum(value.abs() / 15, most / 448 / 500)).all()


def test_a_tensor_with_an_odd_name_is_kept(made: Checkpoints, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(made.lm("rows"), source)
    name = 'condition_provider."\\ \t\n\u00e9.weight'
    extra = torch.arange(3.0)
    save_file(load_file(source / LM_NAME) | {name: extra}, source / LM_NAME)
    folder = converted(source, tmp_path / "converted", "q4")
    assert torch.equal(load_file(folder / LM_NAME)[name], extra)
    moshi_c.load(folder, progress=False).close()


def test_upstreams_reader_opens_the_file(tmp_path: Path) -> None:
    state = load_file(converted(None, tmp_path / "tiny", "q4") / LM_NAME)
    assert state["text_linear.weight"].dtype == torch.uint8
    assert state["text_emb.weight"].dtype == torch.bfloat16


# ---- folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "to\\k.model", "tök.model"])
def test_copied_files_get_names_that_the_folder_can_hold(tmp_path: Path, name: str) -> None:
    source, apart = tmp_path / "source", tmp_path / "apart"
    shutil.copytree(moshi_c.hub.packaged_model(), source)
    apart.mkdir()
    (source / "tokenizer_tiny.model").rename(apart / name)
    (source / "codec").mkdir()
    (source / "mimi_config.json").rename(source / "codec" / "config.json")
    config = json.loads((source / "config.json").read_text())
    config["mimi_config_name"] = "codec/config.json"
    (source / "config.json").write_text(json.dumps(config))
    folder = convert.quantize(source, tmp_path / "made", tokenizer=apart / name, progress=False)
    with moshi_c.load(folder, progress=False) as model:
        assert model.tokenizer is not None and model.tokenizer.vocab_size == 400
        with moshi_c.Session(model, seed=1) as session:
            session.step(np.zeros(1920, np.float32))


def test_targets_and_options_are_checked_before_the_source(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is there already"):
        converted(Path("org/none"), tmp_path, "q4")
    for target in ("~nobody-of-that-name/x", "a" * 300 + "/x"):
        with pytest.raises(CheckpointError, match="there is no folder"):
            converted(Path("org/none"), Path(target), "q4")
    for threads in (0, 1.5, 10**10):
        with pytest.raises(ValueError, match="expected a whole number of 1 or more"):
            convert.quantize(None, tmp_path / "new", threads=threads)  # type: ignore[arg-type]


def test_nothing_is_overwritten(made: Checkpoints, tmp_path: Path) -> None:
    target = tmp_path / "there"
    for make in (target.mkdir, lambda: target.write_text("mine")):
        make()
        with pytest.raises(CheckpointError, match="is there already"):
            converted(made.lm("rows"), target, "q4")
        target.rmdir() if target.is_dir() else target.unlink()
    (tmp_path / "there.unfinished").mkdir()
    with pytest.raises(CheckpointError, match=r"there\.unfinished is there already"):
        converted(made.lm("rows"), target, "q4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.unfinished"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_unfinished_folder_is_removed(
    made: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    def fail(file: Any) -> None:
        assert Path(file.name).parent.name == "new.unfinished"
        raise error

    monkeypatch.setattr(convert, "_keep", fail)
    with pytest.raises((KeyboardInterrupt, CheckpointError)) as caught:
        converted(made.lm("rows"), tmp_path / "new", "q4")
    if caught.type is CheckpointError:
        assert str(caught.value).endswith("new cannot be written: No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_no_block_holds_is_named_and_leaves_nothing(
    made: Checkpoints, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(made.lm("rows", packed=False), source)
    state = load_file(source / LM_NAME)
    state["linears.1.weight"][3, 2] = float("nan")
    save_file(state, source / LM_NAME)
    with pytest.raises(CheckpointError, match=r"linears\.1\.weight: a weight is not finite"):
        converted(source, tmp_path / "new", "q8")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_is_converted_already_is_told(made: Checkpoints, tmp_path: Path) -> None:
    folder = converted(made.lm("rows"), tmp_path / "q8", "q8")
    with pytest.raises(CheckpointError, match="holds q8 weights already"):
        converted(folder, tmp_path / "q4", "q4")
    with pytest.raises(CheckpointError, match="holds bf16 weights already"):
        converted(None, tmp_path / "bf16", "bf16")
    with pytest.raises(CheckpointError, match="can't be read as q4, expected dtype auto or q8"):
        moshi_c.load(folder, dtype="q4", progress=False)
    with pytest.raises(ValueError, match="dtype is 'f32'; expected one of q8, q4, int8, fp8, bf16"):
        converted(folder, tmp_path / "f32", "f32")


def test_the_command_writes_a_folder_that_talks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "tiny-q8")
    source = str(moshi_c.hub.packaged_model())
    assert main(["quantize", source, target, "--dtype", "q8"]) == 0
    assert capsys.readouterr().err.startswith(f"{target}: ")
    assert main(["info", target]) == 0
    assert "q8" in capsys.readouterr().out
    assert main(["quantize", source, target]) == 1
    assert capsys.readouterr().err.startswith(f"moshi-c: {target} is there already")


def test_a_source_that_cannot_be_read_is_not_called_a_target(tmp_path: Path) -> None:
    for gone in (tmp_path / "gone", tmp_path):
        with pytest.raises(CheckpointError, match=f"{gone.name} could not be read: "):
            list(convert._blocks(gone))


# ---- damaged files -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def q8(made: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(made.lm("rows"), tmp_path_factory.mktemp("converted") / "q8", "q8")


def changed(source: Path, target: Path, change: Callable[[dict[str, Any], bytearray], Any]) -> Path:
    """A copy whose header and data went through `change`."""
    shutil.copytree(source, target)
    header, data = damage._split((source / LM_NAME).read_bytes())
    tensors = bytearray(data)
    change(header, tensors)
    (target / LM_NAME).write_bytes(damage._join(json.dumps(header).encode(), bytes(tensors)))
    return target


def start_of(header: dict[str, Any], name: str) -> int:
    return int(header[name]["data_offsets"][0])


def half_a_panel(header: dict[str, Any], data: bytearray) -> None:
    shape = header["text_linear.weight"]["shape"]
    header["text_linear.weight"]["shape"] = [*shape[:2], shape[2] // 2, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h, d: h[METADATA].update({"moshi_c.format": "q5"}), 'format is "q5", expected'),
        (lambda h, d: h[METADATA].update({"moshi_c.format": "bf16"}), 'format is "bf16", expected'),
        (lambda h, d: h[METADATA].update({"moshi_c.format": "q4"}), "has shape .* by the config"),
        (lambda h, d: h[METADATA].update({"moshi_c.layout": "2"}), 'layout is "2", expected 1'),
        (lambda h, d: h[METADATA].pop("moshi_c.layout"), 'layout is "", expected 1'),
        (lambda h, d: h.pop(METADATA), "has shape .* by the config"),
        (half_a_panel, r"text_linear\.weight has shape .* by the config"),
        (lambda h, d: h["text_linear.weight"].update(dtype="I8"), "has shape .* by the config"),
    ],
)
def test_a_file_that_does_not_hold_what_it_says_is_an_error(
    q8: Path, tmp_path: Path, change: Callable[[dict[str, Any], bytearray], Any], words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        moshi_c.load(changed(q8, tmp_path / "broken", change), progress=False)


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_check_of_weights_reads_the_scales(
    made: Checkpoints, tmp_path: Path, dtype: str
) -> None:
    def poison(header: dict[str, Any], data: bytearray) -> None:
        at = start_of(header, "text_linear.weight")
        data[at + 60 : at + 64] = b"\0\0\x80\x7f" if dtype == "int8" else b"\0\x7c\0\x7c"

    folder = converted(made.lm("rows"), tmp_path / "whole", dtype)
    moshi_c.load(folder, check_weights=True, progress=False).close()
    with pytest.raises(CheckpointError, match=r"text_linear\.weight has a scale that is not fin"):
        moshi_c.load(
            changed(folder, tmp_path / "broken", poison), check_weights=True, progress=False
        )


def test_the_check_of_weights_finds_a_code_without_opposite(q8: Path, tmp_path: Path) -> None:
    def overflow(header: dict[str, Any], data: bytearray) -> None:
        data[start_of(header, "text_linear.weight") + 64 + 5] = 0

    folder = changed(q8, tmp_path / "broken", overflow)
    with pytest.raises(CheckpointError, match=r"text_linear\.weight has the code -128"):
        moshi_c.load(folder, check_weights=True, progress=False)


@pytest.mark.parametrize("shift", [1, 2, 4, 32])
def test_panels_at_any_byte_are_the_same_model(q8: Path, tmp_path: Path, shift: int) -> None:
    folder = tmp_path / "shifted"
    shutil.copytree(q8, folder)
    header, data = damage._split((q8 / LM_NAME).read_bytes())
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64 + shift)
    (folder / LM_NAME).write_bytes(damage._join(text, data))
    with moshi_c.load(folder, progress=False) as model, moshi_c.load(q8) as aligned:
        assert model._info["mapped_bytes"] < aligned._info["mapped_bytes"]
    assert_same_bits(played(folder, "rows"), played(q8, "rows"))


# ---- 7B ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_a_7b_folder_of_panels_opens_at_once_and_stays_in_the_map(
    tmp_path: Path, mimi_full: Path
) -> None:
    test_open_large.write_sparse_panels(tmp_path / LM_NAME, "q4")
    found = subprocess.run(
        [sys.executable, "-c", test_open_large.MEASURE, tmp_path, mimi_full / "mimi.safetensors"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    measured = json.loads(found.stdout)
    assert measured["parameters"] > 7_687_729_152
    assert measured["model_mb"] - measured["codec_mb"] < 300, measured
    assert measured["cpu_seconds"] < 10, measured
