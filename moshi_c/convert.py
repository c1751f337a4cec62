"""Checkpoints in another weight format: what the language model's matrices would be made into while
loading, made once and kept in a folder that opens at once."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Literal, get_args

from . import _core, hub
from .errors import CheckpointError
from .model import _check_count, _check_option
from .progress import Bar

#: Formats to convert to.
Target = Literal["q8", "q4", "int8", "fp8", "bf16"]

#: Names of copied files whose own cannot be used.
_COPIES = {
    "mimi_name": "mimi-copy.safetensors",
    "mimi_config_name": "mimi-copy.json",
    "tokenizer_name": "tokenizer-copy.model",
}


def quantize(
    source: hub.PathLike | None,
    target: hub.PathLike,
    dtype: Target = "q4",
    *,
    mimi: hub.PathLike | None = None,
    tokenizer: hub.PathLike | None = None,
    config: hub.PathLike | None = None,
    threads: int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    progress: bool = True,
) -> Path:
    """Writes a checkpoint whose language model has another weight format.

    `load(target)` then gives, bit for bit, what `load(source, dtype=dtype)` gives, without the time
    and memory that quantising takes. Codec and tokenizer are copied, and so are embeddings and
    norms unless everything becomes bf16. The folder is written under another name and renamed when
    it is whole; nothing is overwritten.

    Args:
        source: as for `load`.
        target: the new folder; its parent must exist.
        dtype: "q8" (8.5 bits a weight), "q4" (4.5), "int8" (8), "fp8" (8, as F8_E4M3 tensors with
            their scales beside them, named with _scale) or "bf16".
        mimi, tokenizer, config, threads, revision, token: as for `load`.
        progress: show bars on stderr, of the download and of the conversion.

    Returns:
        The folder.

    Raises:
        CheckpointError: the source can't be opened or converted, or the target can't be written.
        ValueError: an option out of range.
    """
    _check_option("dtype", dtype, get_args(Target))
    _check_count("threads", threads)
    folder = hub.expanded(Path(os.fsdecode(target)))
    _check_target(folder)
    files = hub.resolve(
        source,
        mimi=mimi,
        tokenizer=tokenizer,
        config=config,
        revision=revision,
        token=token,
        progress=progress,
    )
    assert files.lm is not None
    conversion = _core.Conversion(
        lm_path=os.fspath(files.lm),
        config_path=os.fspath(files.config_path) if files.config_path else None,
        dtype=dtype,
        threads=threads or 0,
    )
    try:
        _write(folder, files, conversion, progress)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        conversion.close()
    return folder


def _write(
    folder: Path, files: hub.Checkpoint, conversion: _core.Conversion, progress: bool
) -> None:
    sizes = conversion.sizes
    copied = {
        "mimi_name": files.mimi,
        "mimi_config_name": files.mimi_config,
        "tokenizer_name": files.tokenizer,
    }
    total = sum(sizes) + sum(path.stat().st_size for path in copied.values() if path)
    free = shutil.disk_usage(folder.parent).free
    if free < total:
        raise CheckpointError(
            f"{folder} needs {total} bytes, but {folder.parent} has only {free} free"
        )
    names = {"moshi_name": hub.DEFAULT_LM}
    with _unfinished(folder) as work, Bar(progress, total / 1e9, "GB") as bar:
        for key, path in copied.items():
            if path is None:
                continue
            names[key] = name = _free_name(path.name, key, names.values())
            with (work / name).open("wb") as file:
                for block in _blocks(path):
                    file.write(block)
                _keep(file)
            bar.update(path.stat().st_size / 1e9)
        with (work / hub.DEFAULT_LM).open("wb") as file:
            for part, size in enumerate(sizes):
                file.write(conversion.read(part))
                bar.update(size / 1e9)
            _keep(file)
        with (work / "config.json").open("w", encoding="utf-8") as text:
            json.dump(files.config | names, text, indent=2)
            _keep(text)


def _blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file. What goes wrong here is the source's fault, not the target's."""
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                yield block
    except OSError as error:
        raise CheckpointError(f"{path} could not be read: {error.strerror or error}") from error


def _free_name(name: str, key: str, taken: Iterable[str]) -> str:
    """The file's own name, or another where a folder has it already or a config can't hold it."""
    used = {other.casefold() for other in ("config.json", *taken)}
    if name.casefold() in used or not name.isascii() or "\\" in name:
        return _COPIES[key]
    return name


def _check_target(folder: Path) -> None:
    if os.path.lexists(folder):
        raise CheckpointError(f"{folder} is there already; expected the name of a new folder")
    if not os.path.isdir(folder.parent):  # noqa: PTH112 - Path.is_dir raises for long names
        raise CheckpointError(f"{folder} cannot be written: there is no folder {folder.parent}")


@contextlib.contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """A folder beside it, which becomes it at the end, or is removed after a failure."""
    work = folder.with_name(f"{folder.name}.unfinished")
    try:
        work.mkdir()
    except FileExistsError:
        raise CheckpointError(
            f"{work} is there already: another process is writing it, or was ended while it did; "
            "remove it"
        ) from None
    try:
        yield work
        # Of all that may be there by now only an empty folder would be replaced.
        work.rename(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _keep(file: IO[bytes] | IO[str]) -> None:
    """What is renamed into place must be on the disk first."""
    file.flush()
    os.fsync(file.fileno())
