"""Where the files of a checkpoint are: a folder, a single file, or a repository on the Hugging Face
hub, by the rules of upstream's `config.json` (`moshi_name`, `mimi_name`, `tokenizer_name`,
`mimi_config_name`; without a `config.json` the published 7B layout).

A name in a config is a path inside the folder or repository, `hf://org/repo/file`, or, in a folder
of this machine only, `file://path`. Names that lead elsewhere (`../x`, `/x`) are refused: a
downloaded config must not choose which files are opened.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol

from .errors import CheckpointError

PathLike = str | os.PathLike[str]

DEFAULT_LM = "model.safetensors"
DEFAULT_MIMI = "tokenizer-e351c8d8-checkpoint125.safetensors"
DEFAULT_TOKENIZER = "tokenizer_spm_32k_3.model"
_INDEX = ".index.json"

#: Bytes of a file's name, as file systems have it.
_MAX_PART = 255

#: Twenty times the largest index of shards.
_MAX_JSON_BYTES = 100_000_000
_WEIGHTS = (".safetensors", ".sft", ".sfts")

#: The settings of the published 7B models, which came without a config.json.
BUILT_IN_CONFIG: dict[str, Any] = {
    "dim": 4096,
    "num_heads": 32,
    "num_layers": 32,
    "hidden_scale": 4.125,
    "context": 3000,
    "max_period": 10000,
    "causal": True,
    "layer_scale": None,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
    "text_card": 32000,
    "existing_text_padding_id": 3,
    "card": 2048,
    "n_q": 16,
    "dep_q": 8,
    "delays": [0, *([0] + [1] * 7) * 2],
    "depformer_dim": 1024,
    "depformer_dim_feedforward": 4224,
    "depformer_num_heads": 16,
    "depformer_num_layers": 6,
    "depformer_layer_scale": None,
    "depformer_multi_linear": True,
    "depformer_context": 8,
    "depformer_max_period": 10000,
    "depformer_gating": "silu",
    "depformer_pos_emb": "none",
    "depformer_weights_per_step": True,
}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The files of one checkpoint, all on this machine. None: the checkpoint does without."""

    source: str
    config: dict[str, Any]
    config_path: Path | None
    lm: Path | None
    mimi: Path | None
    mimi_config: Path | None
    tokenizer: Path | None


class _Place(Protocol):
    """Where plain names are looked up."""

    @property
    def local(self) -> bool:
        """Whether it is a folder of this machine, whose config may name any file."""

    def get(self, name: str, role: str) -> Path:
        """The file, or CheckpointError."""

    def find(self, name: str) -> Path | None:
        """The file, or None when there is none."""


@dataclass(frozen=True)
class _Hub:
    """How to reach the hub."""

    revision: str | None
    token: str | bool | None
    progress: bool

    def download(self, repo: str, name: str, *, revision: str | None) -> Path:
        """The local copy. Raises what huggingface_hub raises."""
        import huggingface_hub

        cached = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision)
        with _progress_bars(self.progress):
            path = huggingface_hub.hf_hub_download(repo, name, revision=revision, token=self.token)
        if path != cached:
            _check_digest(Path(path), f"{name} of {repo}")
        return Path(path)


def _check_digest(path: Path, what: str) -> None:
    """Compares a new file of the cache with its digest, after which the hub names what it stores:
    SHA-256 of large files, Git's SHA-1 of small ones. A file that differs is removed."""
    blob = path.resolve()
    if not re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", blob.name):
        return
    digest = hashlib.sha256()
    if len(blob.name) == 40:
        digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size, usedforsecurity=False)
    with blob.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != blob.name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise CheckpointError(
            f"{what} arrived damaged and was removed: its digest is {digest.hexdigest()}, expected "
            f"{blob.name}; load again to fetch it anew"
        )


@contextlib.contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    import huggingface_hub.utils

    bars: Any = huggingface_hub.utils
    if shown or bars.are_progress_bars_disabled():
        yield
        return
    bars.disable_progress_bars()
    try:
        yield
    finally:
        bars.enable_progress_bars()


# ---- places ------------------------------------------------------------------------------------


def _is_file(path: Path) -> bool:
    """False also for names that no file can have: too long, or with a NUL."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


@dataclass(frozen=True)
class _Folder:
    path: Path
    local: bool = True

    def find(self, name: str) -> Path | None:
        path = self.path / name
        return path if _is_file(path) else None

    def get(self, name: str, role: str) -> Path:
        found = self.find(name)
        if found is None:
            path = self.path / name
            if os.path.lexists(path):
                raise CheckpointError(f"{path}, {role}, is {_kind(path)}; expected a file")
            raise CheckpointError(
                f"{path}, {role}, does not exist; the folder has {self._listing()}"
            )
        return found

    def _listing(self) -> str:
        try:
            names = sorted(entry.name for entry in self.path.iterdir())
        except OSError as error:
            return f"nothing readable ({error.strerror})"
        if not names:
            return "no files"
        more = len(names) - 12
        return ", ".join(names[:12]) + (f" and {more} more" if more > 0 else "")


def _kind(path: Path) -> str:
    if not path.exists():
        return "a link that leads nowhere"
    return "a folder" if path.is_dir() else "a pipe, a socket or a device"


@dataclass(frozen=True)
class _Repository:
    id: str
    hub: _Hub
    revision: str | None
    local: bool = False

    def find(self, name: str) -> Path | None:
        try:
            return self.hub.download(self.id, name, revision=self.revision)
        except Exception as error:
            if _is_absent(error, self.id, name, self.revision):
                return None
            raise _explain(error, self.id, name, self.revision) from error

    def get(self, name: str, role: str) -> Path:
        found = self.find(name)
        if found is None:
            raise CheckpointError(f"the repository {self.id} has no {name}, {role}")
        return found


def _is_absent(error: Exception, repo: str, name: str, revision: str | None) -> bool:
    """Whether the hub says, or said when it was last asked, that there is no such file."""
    from huggingface_hub import errors

    if not isinstance(error, errors.EntryNotFoundError):
        return False
    if not isinstance(error, errors.LocalEntryNotFoundError):
        return True
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    with contextlib.suppress(Exception):
        return try_to_load_from_cache(repo, name, revision=revision) is _CACHED_NO_EXIST
    return False


def _explain(error: Exception, repo: str, name: str, revision: str | None) -> CheckpointError:
    """A sentence for a failed download: what happened and what to do."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repo}"
    # a refusal of the first request is the cause of another error, "not found locally"
    responses = [getattr(e, "response", None) for e in (error, error.__cause__)]
    status = next((r.status_code for r in responses if r is not None), None)
    unlock = f"accept the licence at {page} and set HF_TOKEN to a token of your account"
    what = f"{name} of {repo}"
    if isinstance(error, errors.GatedRepoError) or (
        status in (401, 403) and not isinstance(error, errors.RepositoryNotFoundError)
    ):
        return CheckpointError(f"{what} was refused by the hub: {unlock}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"there is no folder {repo} here, and the hub has no such repository or does not show "
            f"it to you: check the name, or {unlock}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(f"the repository {repo} has no revision {revision!r}: see {page}")
    if isinstance(error, errors.HFValidationError):
        return CheckpointError(f"{repo!r} is no name of a repository; expected 'org/name'")
    if isinstance(error, errors.LocalEntryNotFoundError) and status:
        return CheckpointError(
            f"{what} is not on this machine and the hub answered {status}; expected the file: try "
            "again later, or give a folder"
        )
    if isinstance(
        error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError)
    ):
        return CheckpointError(
            f"{what} is not on this machine and the hub cannot be reached: connect to the network "
            "(and unset HF_HUB_OFFLINE), or give a folder"
        )
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else "no reason given"
    return CheckpointError(f"downloading {what} failed: {type(error).__name__}: {reason}")


# ---- references --------------------------------------------------------------------------------


_PART = re.compile(r"[A-Za-z0-9][\w.-]*")


def _repository_id(text: str) -> bool:
    parts = text.split("/")
    return len(parts) == 2 and all(_PART.fullmatch(part) and ".." not in part for part in parts)


def _is_plain(name: str) -> bool:
    """Whether a name stays inside the folder it is looked up in."""
    if not name or "\0" in name or "\\" in name or "://" in name:
        return False
    path = PurePosixPath(name)
    windows = PureWindowsPath(name)
    if any(len(part.encode("utf-8", "surrogatepass")) > _MAX_PART for part in path.parts):
        return False
    return not (path.is_absolute() or windows.drive or windows.root or ".." in path.parts)


def _shown(value: Any) -> str:
    """A value for a sentence: not as long as it likes."""
    text = str(value) if isinstance(value, Path) else repr(value)
    return text if len(text) <= 300 else f"{text[:150]}...{text[-147:]}"


def _split_hub(reference: str) -> tuple[str, str]:
    """`hf://org/repo/sub/file` -> ("org/repo", "sub/file"); the file is "" when not given."""
    parts = reference.removeprefix("hf://").split("/", 2)
    repo, name = "/".join(parts[:2]), parts[2] if len(parts) == 3 else ""
    if not _repository_id(repo) or (name and not _is_plain(name)):
        raise CheckpointError(f"{_shown(reference)} is no reference; expected hf://org/repo/file")
    return repo, name


def _local(text: str) -> Path:
    return expanded(Path(text.removeprefix("file://")))


def expanded(path: Path) -> Path:
    """With the folder of the user that a "~" names."""
    with contextlib.suppress(RuntimeError):  # "~name" of nobody
        return path.expanduser()
    return path


def _given(value: PathLike, what: str, hub: _Hub) -> Path:
    """A file that the caller names: a path, `file://path` or `hf://org/repo/file`."""
    if isinstance(value, str) and value.startswith("hf://"):
        repo, name = _split_hub(value)
        if not name:
            raise CheckpointError(f"{what} is {value!r}; expected hf://org/repo/file")
        return _Repository(repo, hub, None).get(name, what)
    path = _local(os.fsdecode(value))
    if not _is_file(path):
        found = "is a folder, not a file" if _is_folder(path) else "does not exist"
        raise CheckpointError(f"{_shown(path)}, given as {what}, {found}; expected a file")
    return path


def _configured(value: Any, key: str, place: _Place, hub: _Hub) -> Path:
    """A file that a config names under `key`."""
    role = f"named as {key} in config.json"
    if not isinstance(value, str):
        raise CheckpointError(f"config.json: {key} is {_shown(value)}; expected the name of a file")
    if value.startswith("hf://"):
        repo, name = _split_hub(value)
        if not name:
            raise CheckpointError(
                f"config.json: {key} is {_shown(value)}; expected hf://org/repo/file"
            )
        return _Repository(repo, hub, None).get(name, role)
    if value.startswith("file://") and place.local:
        path = Path(value.removeprefix("file://"))
        if not _is_file(path):
            raise CheckpointError(f"{_shown(path)}, {role}, does not exist")
        return path
    if not _is_plain(value):
        raise CheckpointError(
            f"config.json: {key} is {_shown(value)}; expected a name inside {_name_of(place)}"
        )
    return place.get(value, role)


def _name_of(place: _Place) -> str:
    return f"the folder {place.path}" if isinstance(place, _Folder) else "the repository"


def _check_weights(path: Path) -> Path:
    """Refuses weight files in formats that are not read."""
    if path.name.endswith(_INDEX) or path.suffix in _WEIGHTS:
        return path
    raise CheckpointError(
        f"{path} is not a safetensors file; expected the suffix .safetensors or "
        f".safetensors{_INDEX}"
    )


def _with_shards(path: Path, place: _Place) -> Path:
    """Fetches the shards that an index names, beside it."""
    if not path.name.endswith(_INDEX) or place.local:
        return path
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path} has no weight_map")
    for shard in sorted({str(name) for name in weight_map.values()}):
        if not _is_plain(shard) or "/" in shard:
            raise CheckpointError(
                f"{path} names the shard {_shown(shard)}; expected a file beside it"
            )
        place.get(shard, f"named in {path.name}")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. CheckpointError when the file holds none."""
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; expected at most {_MAX_JSON_BYTES}")
        value = json.loads(path.read_text("utf-8"), parse_int=_integer)
    except OSError as error:
        raise CheckpointError(f"{path} could not be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path} is not JSON: byte {error.start} is no part of a character; expected UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    except RecursionError as error:
        raise CheckpointError(
            f"{path} is not JSON: its values are nested too deeply; expected a few levels"
        ) from error
    if not isinstance(value, dict):
        kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
        found = kinds.get(type(value), "a number")
        raise CheckpointError(f"{path} holds {found}; expected a JSON object")
    return value


def _integer(digits: str) -> int | float:
    """What is longer than any integer of a config is left to those who check its range."""
    return int(digits) if len(digits) < 100 else float(digits)


# ---- the checkpoint ----------------------------------------------------------------------------


def packaged_model() -> Path:
    """The folder of the model that comes with the package."""
    return Path(__file__).parent / "data" / "moshi-tiny"


def _locate(source: PathLike | None, hub: _Hub) -> tuple[_Place, Path | None]:
    """Where the files are, and the one that the source itself is."""
    if source is None:
        return _Folder(packaged_model()), None
    text = os.fsdecode(source)
    if isinstance(source, str) and text.startswith("hf://"):
        repo, name = _split_hub(text)
        place = _Repository(repo, hub, hub.revision)
        return place, place.get(name, "the source") if name else None
    path = _local(text) if text else Path("\0")
    if _is_folder(path):
        return _Folder(path), None
    if _is_file(path):
        return _Folder(path.parent), path
    if isinstance(source, str) and _repository_id(text) and path.suffix not in _WEIGHTS:
        return _Repository(text, hub, hub.revision), None
    raise CheckpointError(
        f"{_shown(Path(text))} does not exist; expected a folder, a .safetensors file, or a "
        "repository on the hub such as 'kyutai/moshiko-pytorch-bf16'"
    )


def _read_config(config: PathLike | None, place: _Place, hub: _Hub) -> tuple[Path | None, Any]:
    path = place.find("config.json") if config is None else _given(config, "config", hub)
    if path is None:
        return None, copy.deepcopy(BUILT_IN_CONFIG)
    raw = read_json(path)
    if "dim" not in raw and "transformers_version" in raw:
        raise CheckpointError(
            f"{path} is in the layout of transformers; expected Kyutai's own, "
            "as in 'kyutai/moshiko-pytorch-bf16'"
        )
    return path, raw


def _optional(raw: dict[str, Any], key: str, default: str, place: _Place, hub: _Hub) -> Path | None:
    """What the config names must be there; the default name may be absent."""
    if raw.get(key) is not None:
        return _configured(raw[key], key, place, hub)
    return place.find(default)


def resolve(
    source: PathLike | None,
    *,
    mimi: PathLike | None = None,
    tokenizer: PathLike | None = None,
    config: PathLike | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    progress: bool = True,
) -> Checkpoint:
    """Finds the files of a model, downloading what is not here.

    Args:
        source: None for the packaged model, a folder, a weight file (its folder is searched for
            the rest), `org/name` on the hub, `hf://org/name` or `hf://org/name/file`.
        mimi, tokenizer, config: files to use instead of what the source has; a path,
            `file://path` or `hf://org/repo/file`.
        revision: branch, tag or commit of the source's repository.
        token: for gated repositories; None: HF_TOKEN or the one stored by `hf auth login`.
        progress: show download bars.

    Raises:
        CheckpointError: something is missing, refused or unreadable; the message says what to do.
    """
    hub = _Hub(revision, token, progress)
    place, lm = _locate(source, hub)
    config_path, raw = _read_config(config, place, hub)
    if lm is None:
        lm = _find_lm(raw, place, hub)
    if mimi is not None:
        codec: Path | None = _given(mimi, "mimi", hub)
    else:
        codec = _optional(raw, "mimi_name", DEFAULT_MIMI, place, hub)
    if tokenizer is not None:
        pieces: Path | None = _given(tokenizer, "tokenizer", hub)
    else:
        pieces = _optional(raw, "tokenizer_name", DEFAULT_TOKENIZER, place, hub)
    return Checkpoint(
        source="moshi-tiny" if source is None else os.fspath(source),
        config=raw,
        config_path=config_path,
        lm=_with_shards(_check_weights(lm), place),
        mimi=codec and _check_weights(codec),
        mimi_config=_mimi_config(raw, place, hub),
        tokenizer=pieces,
    )


def _find_lm(raw: dict[str, Any], place: _Place, hub: _Hub) -> Path:
    if raw.get("moshi_name") is not None:
        return _configured(raw["moshi_name"], "moshi_name", place, hub)
    found = place.find(DEFAULT_LM) or place.find(DEFAULT_LM + _INDEX)
    return found or place.get(DEFAULT_LM, "the language model")


def _mimi_config(raw: dict[str, Any], place: _Place, hub: _Hub) -> Path | None:
    name = raw.get("mimi_config_name")
    return None if name is None else _configured(name, "mimi_config_name", place, hub)


def resolve_mimi(
    source: PathLike | None,
    *,
    config: PathLike | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    progress: bool = True,
) -> Checkpoint:
    """Finds the files of a codec: those of a model's folder or repository, or a weight file alone.

    Args:
        source: as for `resolve`; a file is the codec itself.
        config: the codec's own settings; None: what `config.json` beside it names, else Mimi's.
        revision, token, progress: as for `resolve`.

    Raises:
        CheckpointError: something is missing, refused or unreadable.
    """
    hub = _Hub(revision, token, progress)
    place, mimi = _locate(source, hub)
    config_path = place.find("config.json")
    raw = read_json(config_path) if config_path is not None else {}
    if mimi is None:
        name = raw.get("mimi_name")
        if name is None:
            mimi = place.get(DEFAULT_MIMI, "the codec")
        else:
            mimi = _configured(name, "mimi_name", place, hub)
    elif raw.get("mimi_name") != mimi.name:
        raw = {}
    settings = _given(config, "config", hub) if config is not None else None
    return Checkpoint(
        source="moshi-tiny" if source is None else os.fspath(source),
        config=raw,
        config_path=config_path,
        lm=None,
        mimi=_check_weights(mimi),
        mimi_config=settings or _mimi_config(raw, place, hub),
        tokenizer=None,
    )
