"""Checkpoints that are made once per test run, and the rule that nothing is skipped silently.

A skipped test proves nothing, so a run with a skip whose reason is not in `allowed_skips.txt`
fails. An absent `moshi_c` or an absent upstream is an error, never a skip.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import hypothesis
import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    import torch
    from checkpoints import Shape
    from moshi.models import LMModel
    from upstream import LiveRun

# Before PyTorch is imported by any test: see `upstream`.
os.environ.setdefault("NO_TORCH_COMPILE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# No test measures time: a busy machine is not a failure.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.txt")


# ---- skips -------------------------------------------------------------------------------------


def allowed_reasons(text: str) -> list[str]:
    """The reasons in `allowed_skips.txt`: lines that are neither empty nor comments."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str | None:
    """Why a test was skipped; None if it was not (an expected failure is not a skip)."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return None
    where = report.longrepr
    reason = where[2] if isinstance(where, tuple) else str(where)
    return reason.removeprefix("Skipped: ").strip()


class SkipRule:
    """Collects the skips of a run that nobody has allowed, and fails the run for them."""

    def __init__(self, allowed: list[str]) -> None:
        self.allowed = allowed
        self.offending: list[tuple[str, str]] = []

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        reason = skip_reason(report)
        if reason is not None and not any(reason.startswith(line) for line in self.allowed):
            self.offending.append((report.nodeid, reason))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.offending and session.exitstatus in (
            pytest.ExitCode.OK,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        ):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.offending:
            terminalreporter.section("skips that are not allowed", red=True)
            for nodeid, reason in self.offending:
                terminalreporter.line(f"{nodeid}: {reason}")
            terminalreporter.line(f"allowed reasons are listed in {ALLOWED_SKIPS.name}")


# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("moshi", deadline=None)
hypothesis.settings.load_profile("moshi")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="hold the live conversation for a minute")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SkipRule(allowed_reasons(ALLOWED_SKIPS.read_text())))


# ---- checkpoints -------------------------------------------------------------------------------


@contextmanager
def locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[IO[str]]:
    """A file that one process at a time has to itself, or several share."""
    with path.open("w") as file:
        fcntl.flock(file, how)
        yield file


class Checkpoints:
    """Random checkpoints under one folder, each made on first use, by whichever process it is."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def _once(self, name: str, make: Callable[[Path], Any]) -> Path:
        folder = self.root / name
        with locked(self.root / f"{name}.lock"):
            if not folder.exists():
                unfinished = self.root / f"{name}.unfinished"
                make(unfinished)
                unfinished.rename(folder)
        return folder

    def mimi(self, size: str, bins: int | None = None) -> Path:
        """A folder with a codec alone: "full" (published sizes) or "small"."""
        import checkpoints

        name = f"mimi-{size}" if bins is None else f"mimi-{size}-{bins}"
        return self._once(name, lambda to: checkpoints.make_mimi(to, size, bins=bins))

    def tokenizer(self, text_card: int) -> Path:
        """A toy tokenizer file."""
        import checkpoints

        folder = self._once(
            f"tokenizer-{text_card}", lambda to: checkpoints.make_tokenizer(to, text_card)
        )
        return folder / checkpoints.TOKENIZER_NAME

    def lm(
        self,
        shape_name: str,
        *,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        packed: bool = True,
        sharded: bool = False,
        shape: Shape | None = None,
        label: str = "",
        mimi: str | None = None,
    ) -> Path:
        """A complete folder: language model, codec, tokenizer and `config.json`.

        `shape` replaces the named one under a `label` of its own. The codec is a small one with
        codebooks of the model's size, unless `mimi` asks for another.
        """
        import checkpoints
        import torch

        dtype = dtype or torch.float32
        shape = shape or checkpoints.SHAPES[shape_name]
        words = [shape_name, label, str(seed), str(dtype).removeprefix("torch.")]
        words += ["split"] * (not packed) + ["sharded"] * sharded + ([mimi] if mimi else [])
        name = "-".join(word for word in words if word)

        def make(folder: Path) -> None:
            size = mimi or "small"
            codec = self.mimi(size, None if size == "full" else shape.card)
            tokenizer = self.tokenizer(shape.text_card)
            checkpoints.make_folder(
                folder, shape_name, codec, tokenizer, seed, dtype, packed, sharded, shape
            )

        return self._once(name, make)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoints]:
    """Makes checkpoints, and makes each only once per run; gigabytes, so they go at its end.

    Processes that share the work (pytest-xdist) share the folder; the last one removes it.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    root = base / "checkpoints"
    with locked(base / "checkpoints.lock", fcntl.LOCK_SH) as users:
        root.mkdir(exist_ok=True)
        yield Checkpoints(root)
        with suppress(BlockingIOError):
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def mimi_full(made: Checkpoints) -> Path:
    """A codec of the published sizes."""
    return made.mimi("full")


@pytest.fixture(scope="session")
def mimi_small(made: Checkpoints) -> Path:
    """A codec that is small in every direction."""
    return made.mimi("small")


# ---- what upstream did -------------------------------------------------------------------------


@dataclass(frozen=True)
class Conversation:
    """A conversation with upstream's live server, and the folder that it ran from."""

    folder: Path
    run: LiveRun


@pytest.fixture(scope="session")
def conversation(
    made: Checkpoints, mimi_full: Path, request: pytest.FixtureRequest
) -> Conversation:
    """A first frame and 26 s of sound (with --long a minute): longer than the codec's ring of 10 s
    and the language model's of 16 s. All of the codec's decisions are clear of ties."""
    import numpy as np
    import sound
    import upstream
    from tolerances import bound

    folders: list[Path] = []

    def models() -> Iterator[LMModel]:
        for seed in (1, 0, 2, 3, 4, 5):  # with the first no choice is close
            folders.append(made.lm("session", seed=seed, mimi="full"))
            yield upstream.load_lm(folders[-1])

    seconds = 60 if request.config.getoption("long") else 26
    pcm = np.concatenate([sound.noise(0.08, 7), sound.minute()[: seconds * sound.RATE]])
    run = upstream.server_loop(
        upstream.load_mimi(mimi_full),
        models(),
        pcm,
        lead=bound("session_clear"),
        margin=bound("greedy_margin"),
    )
    return Conversation(folders[-1], run)
