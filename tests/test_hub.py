"""Where files come from: folders, single files and the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from moshi_c import CheckpointError, hub, load

REPO = "kyutai/moshiko-pytorch-bf16"
OTHER = "kyutai/stt-1b-en_fr"


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


def configured(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"dim": 8} | config))
    return folder


# ---- folders -----------------------------------------------------------------------------------


def test_nothing_is_the_packaged_model() -> None:
    found = hub.resolve(None)
    folder = hub.packaged_model()
    assert found.lm == folder / "model.safetensors"
    assert found.mimi == folder / "mimi-tiny.safetensors"
    assert found.mimi_config == folder / "mimi_config.json"
    assert found.tokenizer == folder / "tokenizer_tiny.model"
    assert found.config == json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_with_upstreams_names(tmp_path: Path, kind: Callable[[Path], Any]) -> None:
    touch(tmp_path, hub.DEFAULT_LM, hub.DEFAULT_MIMI, hub.DEFAULT_TOKENIZER)
    found = hub.resolve(kind(tmp_path))
    assert found.config_path is None
    assert (found.config["dim"], found.config["n_q"], found.config["delays"][2]) == (4096, 16, 1)
    assert found.lm == tmp_path / hub.DEFAULT_LM
    assert found.mimi == tmp_path / hub.DEFAULT_MIMI
    assert found.tokenizer == tmp_path / hub.DEFAULT_TOKENIZER
    assert found.mimi_config is None


@pytest.mark.parity
def test_the_built_in_settings_are_upstreams() -> None:
    from moshi.models import loaders

    assert loaders._lm_kwargs == hub.BUILT_IN_CONFIG
    assert hub.DEFAULT_LM == loaders.MOSHI_NAME
    assert hub.DEFAULT_MIMI == loaders.MIMI_NAME
    assert hub.DEFAULT_TOKENIZER == loaders.TEXT_TOKENIZER_NAME


def test_the_built_in_settings_are_a_copy(tmp_path: Path) -> None:
    touch(tmp_path, hub.DEFAULT_LM)
    hub.resolve(tmp_path).config["delays"].clear()
    assert hub.BUILT_IN_CONFIG["delays"]


def test_a_config_names_the_files(tmp_path: Path) -> None:
    configured(tmp_path, moshi_name="a/lm.safetensors", mimi_name="m.safetensors",
               tokenizer_name="t.model", mimi_config_name="m.json")  # fmt: skip
    touch(tmp_path, "a/lm.safetensors", "m.safetensors", "t.model", "m.json")
    found = hub.resolve(tmp_path)
    names = (found.lm, found.mimi, found.tokenizer, found.mimi_config)
    assert [path and path.name for path in names] == [
        "lm.safetensors", "m.safetensors", "t.model", "m.json",
    ]  # fmt: skip


def test_shards_are_found_by_their_index(tmp_path: Path) -> None:
    touch(tmp_path, "model.safetensors.index.json")
    assert hub.resolve(tmp_path).lm == tmp_path / "model.safetensors.index.json"
    found = hub.resolve(tmp_path / "model.safetensors.index.json")
    assert found.lm == tmp_path / "model.safetensors.index.json"


def test_what_nobody_named_may_be_absent(tmp_path: Path) -> None:
    touch(tmp_path, "only.safetensors")
    found = hub.resolve(tmp_path / "only.safetensors")
    assert found.lm == tmp_path / "only.safetensors"
    assert (found.mimi, found.tokenizer, found.config_path) == (None, None, None)


def test_a_single_file_finds_the_rest_beside_it(tmp_path: Path) -> None:
    configured(tmp_path, moshi_name="a.safetensors", mimi_name="m.safetensors")
    touch(tmp_path, "b.safetensors", "m.safetensors")
    found = hub.resolve(tmp_path / "b.safetensors")
    assert found.lm == tmp_path / "b.safetensors"
    assert found.mimi == tmp_path / "m.safetensors"


def test_files_that_are_given_win(tmp_path: Path) -> None:
    touch(tmp_path / "lm", "lm.safetensors")
    touch(tmp_path / "rest", "m.safetensors", "t.model")
    config = configured(tmp_path / "rest", moshi_name="lm.safetensors") / "config.json"
    found = hub.resolve(
        tmp_path / "lm",
        mimi=f"file://{tmp_path}/rest/m.safetensors",
        tokenizer=str(tmp_path / "rest" / "t.model"),
        config=config,
    )
    assert found.lm == tmp_path / "lm" / "lm.safetensors"
    assert found.mimi == tmp_path / "rest" / "m.safetensors"
    assert found.tokenizer == tmp_path / "rest" / "t.model"
    assert found.config_path == config


def test_a_folder_of_this_machine_may_name_any_local_file(tmp_path: Path) -> None:
    touch(tmp_path / "else", "m.safetensors")
    folder = configured(tmp_path / "here", mimi_name=f"file://{tmp_path}/else/m.safetensors")
    touch(folder, hub.DEFAULT_LM)
    assert hub.resolve(folder).mimi == tmp_path / "else" / "m.safetensors"


# ---- what is wrong with folders ----------------------------------------------------------------


def test_a_missing_file_is_named_with_what_is_there(tmp_path: Path) -> None:
    configured(tmp_path, moshi_name="lm.safetensors")
    touch(tmp_path, "other.safetensors")
    with pytest.raises(CheckpointError) as caught:
        hub.resolve(tmp_path)
    sentence = str(caught.value)
    assert f"{tmp_path / 'lm.safetensors'}, named as moshi_name in config.json" in sentence
    assert "the folder has config.json, other.safetensors" in sentence


def test_a_long_folder_is_not_listed_in_full(tmp_path: Path) -> None:
    touch(tmp_path, *[f"{i:03}.txt" for i in range(40)])
    with pytest.raises(CheckpointError, match=r"011\.txt and 28 more"):
        hub.resolve(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(CheckpointError, match="the folder has no files"):
        hub.resolve(tmp_path / "none")


@pytest.mark.parametrize("key", ["moshi_name", "mimi_name", "tokenizer_name", "mimi_config_name"])
@pytest.mark.parametrize(
    "name",
    ["../up.safetensors", "/etc/passwd", "a/../../up", "..\\up", "C:\\x", "C:x", "", "a\0b",
     "http://x/y", 7, ["x"], True],
)  # fmt: skip
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, key: str, name: Any) -> None:
    touch(tmp_path, "up.safetensors")
    folder = configured(tmp_path / "in", **{key: name})
    touch(folder, hub.DEFAULT_LM)
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} is .*; expected"):
        hub.resolve(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"a": ' * 3000, "\xff"])
def test_a_damaged_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, "latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json (is not JSON|holds a)"):
        hub.resolve(tmp_path)


def test_other_layouts_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"transformers_version": "5.0", "model_type": "moshi"}')
    with pytest.raises(CheckpointError, match="layout of transformers"):
        hub.resolve(tmp_path)


@pytest.mark.parametrize("name", ["model.q8.gguf", "model.pt", "model.npz"])
def test_other_weight_files_are_refused(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name)
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        hub.resolve(tmp_path / name)


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a/b/c", "x.safetensors", ""])
def test_what_does_not_exist_is_said_to(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist; expected a folder"):
        hub.resolve(source)


@pytest.mark.parametrize("which", ["mimi", "tokenizer", "config"])
def test_a_given_file_that_is_missing_is_named(tmp_path: Path, which: str) -> None:
    missing: Any = {which: tmp_path / "gone"}
    folder: Any = {which: tmp_path}
    touch(tmp_path, hub.DEFAULT_LM)
    with pytest.raises(CheckpointError, match=rf"gone, given as {which}, does not exist"):
        hub.resolve(tmp_path, **missing)
    with pytest.raises(CheckpointError, match=rf"given as {which}, is a folder"):
        hub.resolve(tmp_path, **folder)


# ---- the codec alone ---------------------------------------------------------------------------


def test_the_codec_of_a_folder_or_a_file(tmp_path: Path) -> None:
    configured(tmp_path, mimi_name="m.safetensors", mimi_config_name="m.json")
    touch(tmp_path, "m.safetensors", "m.json", "other.safetensors")
    for source in (tmp_path, tmp_path / "m.safetensors"):
        found = hub.resolve_mimi(source)
        assert found.mimi == tmp_path / "m.safetensors"
        assert found.mimi_config == tmp_path / "m.json"
        assert found.lm is None
    assert hub.resolve_mimi(tmp_path / "other.safetensors").mimi_config is None
    given = hub.resolve_mimi(tmp_path / "other.safetensors", config=tmp_path / "m.json")
    assert given.mimi_config == tmp_path / "m.json"
    assert hub.resolve_mimi(None).mimi == hub.packaged_model() / "mimi-tiny.safetensors"


def test_a_folder_without_codec_says_so(tmp_path: Path) -> None:
    touch(tmp_path, hub.DEFAULT_LM)
    with pytest.raises(CheckpointError, match="the codec, does not exist; the folder has model"):
        hub.resolve_mimi(tmp_path)


# ---- the hub -----------------------------------------------------------------------------------


class FakeHub:
    """Stands for hf_hub_download: repositories are folders, and what was asked is kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str]] = []
        self.options: list[dict[str, Any]] = []
        self.failure: Exception | None = None

    def __call__(self, repo: str, name: str, **options: Any) -> str:
        self.asked.append((repo, name))
        self.options.append(options)
        if self.failure is not None:
            raise self.failure
        path = self.folder / repo / name
        if not path.exists():
            raise errors.EntryNotFoundError(f"404: no {name}")
        return str(path)

    def repo(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return path


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake)
    return fake


def test_a_repository_without_config_is_the_7b(fake: FakeHub) -> None:
    folder = touch(fake.repo(REPO), hub.DEFAULT_LM, hub.DEFAULT_MIMI, hub.DEFAULT_TOKENIZER)
    found = hub.resolve(REPO, revision="main", token="secret", progress=False)
    assert found.config["dim"] == 4096
    assert found.lm == folder / hub.DEFAULT_LM
    assert found.tokenizer == folder / hub.DEFAULT_TOKENIZER
    assert all(o == {"revision": "main", "token": "secret"} for o in fake.options)


@pytest.mark.parametrize("source", [OTHER, f"hf://{OTHER}"])
def test_a_repository_whose_config_refers_to_another(fake: FakeHub, source: str) -> None:
    folder = configured(
        fake.repo(OTHER), mimi_name=f"hf://{REPO}/sub/m.safetensors", tokenizer_name="t.model"
    )
    touch(folder, hub.DEFAULT_LM, "t.model")
    touch(fake.repo(REPO), "sub/m.safetensors")
    found = hub.resolve(source, revision="v1")
    assert found.mimi == fake.repo(REPO) / "sub" / "m.safetensors"
    asked = dict(zip(fake.asked, fake.options, strict=True))
    assert asked[REPO, "sub/m.safetensors"]["revision"] is None, "the revision is the source's"
    assert asked[OTHER, "t.model"]["revision"] == "v1"


def test_one_file_of_a_repository(fake: FakeHub) -> None:
    folder = configured(fake.repo(OTHER), moshi_name="a.safetensors")
    touch(folder, "b.safetensors")
    assert hub.resolve(f"hf://{OTHER}/b.safetensors").lm == folder / "b.safetensors"
    assert hub.resolve_mimi(f"hf://{OTHER}/b.safetensors").mimi == folder / "b.safetensors"


def test_shards_of_a_repository_are_fetched(fake: FakeHub) -> None:
    folder = fake.repo(OTHER)
    shards = ["model-1.safetensors", "model-2.safetensors"]
    touch(folder, *shards)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}))
    assert hub.resolve(OTHER).lm == index
    assert [name for _, name in fake.asked if name in shards] == shards
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(CheckpointError, match="expected a file beside it"):
        hub.resolve(OTHER)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        hub.resolve(OTHER)


@pytest.mark.parametrize("name", ["file:///etc/passwd", "../x", "/x", "hf://a", "hf://../x/y"])
def test_a_downloaded_config_chooses_no_local_file(fake: FakeHub, name: str) -> None:
    touch(configured(fake.repo(OTHER), mimi_name=name), hub.DEFAULT_LM)
    with pytest.raises(CheckpointError, match="expected"):
        hub.resolve(OTHER)


def test_a_local_folder_wins_over_the_hub(fake: FakeHub) -> None:
    touch(Path(OTHER), hub.DEFAULT_LM)
    assert hub.resolve(OTHER).lm == Path(OTHER) / hub.DEFAULT_LM
    assert not fake.asked


def failure(kind: type[Exception], status: int) -> Exception:
    """An error as huggingface_hub makes it; its constructors differ between versions."""
    error = kind.__new__(kind)
    error.args = (f"{status} from the hub",)
    error.response = type("Response", (), {"status_code": status})()  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("kind", "status", "sentence"),
    [
        (errors.GatedRepoError, 403, f"accept the licence at https://huggingface.co/{REPO} and "
         "set HF_TOKEN"),
        (errors.HfHubHTTPError, 401, "accept the licence at"),
        (errors.HfHubHTTPError, 403, "accept the licence at"),
        (errors.HfHubHTTPError, 500, "failed: HfHubHTTPError: 500 from the hub"),
        (errors.RepositoryNotFoundError, 401, "no such repository or does not show it to you"),
        (errors.RevisionNotFoundError, 404, "has no revision 'v9'"),
        (errors.LocalEntryNotFoundError, 0, "the hub cannot be reached: connect to the network"),
        (errors.OfflineModeIsEnabled, 0, "the hub cannot be reached"),
        (ConnectionError, 0, "the hub cannot be reached"),
        (OSError, 0, "failed: OSError"),
    ],
)  # fmt: skip
def test_a_failed_download_says_what_to_do(
    fake: FakeHub, kind: type[Exception], status: int, sentence: str
) -> None:
    fake.failure = failure(kind, status)
    with pytest.raises(CheckpointError) as caught:
        hub.resolve(REPO, revision="v9")
    assert sentence in str(caught.value)
    assert REPO in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "sentence"),
    [(403, "was refused by the hub: accept the licence"), (500, "the hub answered 500; expected")],
)
def test_a_refusal_behind_a_missing_file_is_told(fake: FakeHub, status: int, sentence: str) -> None:
    fake.failure = failure(errors.LocalEntryNotFoundError, 0)
    fake.failure.response = None  # type: ignore[attr-defined]
    fake.failure.__cause__ = failure(errors.HfHubHTTPError, status)
    with pytest.raises(CheckpointError, match=sentence):
        hub.resolve(REPO)


def test_a_file_that_a_repository_lacks_is_named(fake: FakeHub) -> None:
    touch(configured(fake.repo(OTHER), tokenizer_name="t.model"), hub.DEFAULT_LM)
    with pytest.raises(CheckpointError, match=r"has no t\.model, named as tokenizer_name"):
        hub.resolve(OTHER)
    fake.repo("kyutai/empty")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors, the language model"):
        hub.resolve("kyutai/empty")


def test_a_cached_repository_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real hf_hub_download: the cache knows that there is no config.json."""
    cache = tmp_path / "cache" / f"models--{REPO.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = cache / "snapshots" / commit
    touch(snapshot, hub.DEFAULT_LM, hub.DEFAULT_MIMI, hub.DEFAULT_TOKENIZER)
    touch(cache / ".no_exist" / commit, "config.json")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = hub.resolve(REPO)
    assert found.config["dim"] == 4096
    assert found.lm == snapshot / hub.DEFAULT_LM
    with pytest.raises(CheckpointError, match="cannot be reached"):
        hub.resolve("kyutai/never-seen")


def test_download_bars_are_left_as_they_were(fake: FakeHub) -> None:
    import huggingface_hub.utils

    bars: Any = huggingface_hub.utils
    touch(fake.repo(OTHER), hub.DEFAULT_LM)
    before = bars.are_progress_bars_disabled()
    hub.resolve(OTHER, progress=False)
    assert bars.are_progress_bars_disabled() == before


def test_a_model_loads_from_the_hub(fake: FakeHub) -> None:
    shutil.copytree(hub.packaged_model(), fake.repo("org/tiny"), dirs_exist_ok=True)
    with load("org/tiny", progress=False) as model:
        assert model.family == "moshi"
        assert model.tokenizer is not None
