"""Drivers around upstream's own classes: what it computes, step by step, on the CPU.

Nothing here decides anything that upstream decides. Its `LMGen` runs every step; hooks that it
offers record logits and force tokens, and `forward_depformer` is wrapped to see the depth logits
and to replace the previous code that it reads.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

os.environ.setdefault("NO_TORCH_COMPILE", "1")
os.environ.setdefault("NO_CUDA_GRAPH", "1")
# Threads that spin while they wait are ten times slower beside any other program.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json

import numpy as np
import sound as sounds
import torch
from moshi.conditioners import ConditionAttributes
from moshi.models import LMGen, LMModel, MimiModel
from moshi.models.loaders import CheckpointInfo, get_mimi
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.int64]
Conditions = Mapping[str, str | None]

FRAME = sounds.FRAME
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# Its share of them, where tests run in several processes.
torch.set_num_threads(max(1, CORES // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@contextmanager
def one_thread() -> Iterator[None]:
    """Small models are faster without handing work around."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def checkpoint(folder: Path) -> CheckpointInfo:
    """Upstream's view of a folder."""
    config = json.loads((folder / "config.json").read_text())
    return CheckpointInfo.from_hf_repo(
        "",
        moshi_weights=folder / config["moshi_name"],
        mimi_weights=folder / config["mimi_name"],
        tokenizer=folder / config["tokenizer_name"],
        config_path=folder / "config.json",
        mimi_config_path=folder / config["mimi_config_name"],
    )


def load_lm(folder: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> LMModel:
    """The language model of a folder, as upstream loads it."""
    return checkpoint(folder).get_moshi(
        device="cpu", dtype=dtype, lm_kwargs_overrides=copy.deepcopy(overrides)
    )


def load_mimi(folder: Path, codebooks: int = 8) -> MimiModel:
    """The codec of a folder, as upstream loads it."""
    config = json.loads((folder / "mimi.json").read_text())
    return get_mimi(folder / "mimi.safetensors", config, num_codebooks=codebooks)


# ---- language model ----------------------------------------------------------------------------


@dataclass
class LmRun:
    """What a language model did. Index 0 is the step."""

    out: Codes  # [T, 1 + dep_q], text first, delays undone; -1 while nothing comes out
    silent: int  # steps without output
    text: Codes  # [T] as sampled or forced in the step
    audio: Codes  # [T, dep_q]
    text_logits: Floats  # [T, text_card], after guidance
    audio_logits: Floats  # [T, dep_q, card]
    heads: Floats  # [T, heads, classes]; zeros while nothing comes out
    margin: float  # least lead of a greedy choice over the runner-up, in units of the logits' std


def _lead(logits: Floats) -> float:
    if not logits.size:
        return np.inf
    top = np.partition(logits, -2, axis=-1)[..., -2:]
    return float((top[..., 1] - top[..., 0]).min() / logits.std())


class LmDriver:
    """One conversation with upstream's `LMGen`, greedy, recording what it computes."""

    def __init__(
        self,
        lm: LMModel,
        *,
        conditions: Conditions | None = None,
        null_conditions: Conditions | None = None,
        cfg_coef: float = 1.0,
        cfg_is_no_text: bool = False,
        cfg_masked_until: int | None = None,
    ) -> None:
        tensors = None
        if lm.condition_provider is not None:
            rows = [ConditionAttributes(text=dict(conditions or {}))]
            if cfg_coef != 1.0:
                rows.append(ConditionAttributes(text=dict(null_conditions or {})))
            tensors = lm.condition_provider.prepare_and_provide(rows)
        self.lm = lm
        self.cfg_coef = cfg_coef
        self.gen = LMGen(
            lm,
            use_sampling=False,
            cfg_coef=cfg_coef,
            check=True,
            condition_tensors=tensors,
            on_text_hook=self._on_text,
            on_text_logits_hook=self._on_text_logits,
            on_audio_hook=self._on_audio,
            cfg_is_masked_until=None if cfg_masked_until is None else [cfg_masked_until],
            cfg_is_no_text=cfg_is_no_text,
        )
        self.out: list[Codes] = []
        self.text: list[int] = []
        self.audio: list[Codes] = []
        self.text_logits: list[Floats] = []
        self.audio_logits: list[list[Floats]] = []
        self.heads: list[Floats] = []
        self._forced_text: int | None = None
        self._forced_audio: Sequence[int] | Codes | None = None
        self._stack = ExitStack()

    def __enter__(self) -> LmDriver:
        self._stack.enter_context(torch.no_grad())
        self._stack.enter_context(self.gen.streaming(1))
        original = self.lm.forward_depformer

        def forward_depformer(
            index: int, sequence: torch.Tensor, transformer_out: torch.Tensor
        ) -> torch.Tensor:
            if index and self._forced_audio is not None:
                sequence = torch.full_like(sequence, int(self._forced_audio[index - 1]))
            logits = original(index, sequence, transformer_out)
            seen = logits.float()
            if self.cfg_coef != 1.0:
                told, null = logits.chunk(2)
                seen = (null + (told - null) * self.cfg_coef).float()
            self.audio_logits[-1].append(seen[0, 0, 0].numpy().copy())
            return logits

        self.lm.forward_depformer = forward_depformer
        self._stack.callback(lambda: self.lm.__dict__.pop("forward_depformer"))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _on_text_logits(self, logits: torch.Tensor) -> None:
        self.text_logits.append(logits[0, 0, 0].float().numpy().copy())

    def _on_text(self, token: torch.Tensor) -> None:
        if self._forced_text is not None:
            token[:] = self._forced_text
        self.text.append(int(token[0]))

    def _on_audio(self, codes: torch.Tensor) -> None:
        if self._forced_audio is not None:
            codes[:] = torch.as_tensor(np.asarray(self._forced_audio))
        self.audio.append(codes[0].numpy().copy())

    def step(
        self,
        user_codes: Codes,
        text: int | None = None,
        audio: Sequence[int] | Codes | None = None,
    ) -> Codes | None:
        """One frame; `text` and `audio` are stored instead of what the model would say."""
        self._forced_text, self._forced_audio = text, audio
        self.audio_logits.append([])
        given = torch.as_tensor(np.asarray(user_codes, np.int64)).view(1, -1, 1)
        heads: list[torch.Tensor] = []
        if len(self.lm.extra_heads):
            answer = self.gen.step_with_extra_heads(given)
            tokens, heads = (None, []) if answer is None else answer
        else:
            tokens = self.gen.step(given)
        self.heads.append(
            np.stack([head[0, 0].float().numpy() for head in heads])
            if heads
            else np.zeros((len(self.lm.extra_heads), 6), np.float32)
        )
        if tokens is None:
            self.out.append(np.full(1 + self.lm.dep_q, -1))
            return None
        frame: Codes = tokens[0, :, 0].numpy().copy()
        self.out.append(frame)
        return frame

    def result(self) -> LmRun:
        """All steps so far."""
        steps, dep_q, card = len(self.out), self.lm.dep_q, self.lm.card
        out = np.stack(self.out)
        text_logits = np.stack(self.text_logits)
        audio_logits = np.zeros((steps, 0, card), np.float32)
        if dep_q:
            audio_logits = np.stack([np.stack(frame) for frame in self.audio_logits])
        return LmRun(
            out=out,
            silent=int((out[:, 0] < 0).sum()),
            text=np.array(self.text),
            audio=np.stack(self.audio) if dep_q else np.zeros((steps, 0), np.int64),
            text_logits=text_logits,
            audio_logits=audio_logits,
            heads=np.stack(self.heads),
            margin=min(_lead(text_logits), _lead(audio_logits)),
        )


def lm_greedy(
    lm: LMModel,
    user_codes: Codes,
    *,
    forced_text: Mapping[int, int] | None = None,
    **options: Any,
) -> LmRun:
    """A greedy conversation; `forced_text` maps steps to tokens that upstream's hook puts in."""
    forced = forced_text or {}
    with LmDriver(lm, **options) as driver:
        for index, codes in enumerate(user_codes):
            driver.step(codes, text=forced.get(index))
        return driver.result()


def lm_teacher_forced(
    lm: LMModel, user_codes: Codes, text: Codes, audio: Codes, **options: Any
) -> LmRun:
    """The logits of each step when text [T] and audio [T, dep_q] are what was said."""
    with LmDriver(lm, **options) as driver:
        for index, codes in enumerate(user_codes):
            driver.step(codes, int(text[index]), audio[index] if lm.dep_q else None)
        return driver.result()


def user_codes(steps: int, streams: int, card: int, seed: int) -> Codes:
    """Random codes for the user's side."""
    return np.random.default_rng(seed).integers(0, card, (steps, streams))


# ---- codec -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disagreement:
    """Two encoders chose different codes: where first, and how far apart the choices are."""

    frame: int
    codebook: int
    gap: float  # (ours - theirs) / theirs, of the distances to the residual, in float64


class Quantizers:
    """The two residual quantisers of a codec in float64, to judge decisions by."""

    def __init__(self, mimi: MimiModel) -> None:
        self.parts: list[tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]] = []
        for part in (mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest):
            projection = part.input_proj.weight[:, :, 0].detach().double()
            books = [layer._codebook.embedding.double() for layer in part.vq.layers]
            self.parts.append((projection, books, [book.pow(2).sum(1) for book in books]))

    def leads(self, latents: Floats, codes: Codes) -> NDArray[np.float64]:
        """How much nearer each chosen entry is than the runner-up: relative, [K, T].

        latents [C, T], codes [K, T]. Negative where the choice was not the nearest at all.
        """
        found = []
        given, first = torch.from_numpy(codes), 0
        for projection, books, squares in self.parts:
            residual = (projection @ torch.from_numpy(latents).double()).T
            for chosen, book, square in zip(given[first:], books, squares, strict=False):
                # squared distances as a product: exact enough in float64
                distances = torch.addmm(square, residual, book.T, alpha=-2)  # less |residual|^2
                own = distances.gather(1, chosen[:, None])[:, 0]
                other = distances.scatter_(1, chosen[:, None], torch.inf).amin(1)
                length = residual.pow(2).sum(1)
                ratio = (other + length).clamp(min=0) / (own + length).clamp(min=1e-300)
                found.append((ratio.sqrt() - 1).numpy())
                residual = residual - book[chosen]
            first += len(books)
        return np.stack(found)

    def disagreements(self, latents: Floats, ours: Codes, theirs: Codes) -> list[Disagreement]:
        """Frames whose codes differ, each at the first level where a quantiser went another way."""
        found = []
        for frame in np.flatnonzero((ours != theirs).any(0)):
            first = 0
            for projection, books, _ in self.parts:
                span = slice(first, min(first + len(books), len(theirs)))
                residual = projection @ torch.from_numpy(latents[:, frame]).double()
                for level, mine in enumerate(ours[span, frame]):
                    other = theirs[first + level, frame]
                    if mine != other:
                        far = float((residual - books[level][mine]).norm())
                        near = float((residual - books[level][other]).norm())
                        gap = (far - near) / near
                        found.append(Disagreement(int(frame), first + level, gap))
                        break
                    residual = residual - books[level][other]
                first += len(books)
        return found


def latents_of(mimi: MimiModel, pcm: Floats) -> Floats:
    """What the quantiser sees in a whole signal [N]: [C, T]."""
    with torch.no_grad():
        latent: torch.Tensor = mimi._encode_to_unquantized_latent(torch.from_numpy(pcm)[None, None])
    return latent[0].numpy()


def encode(mimi: MimiModel, pcm: Floats) -> Codes:
    """Upstream's non-streaming encode of [B, N] or [N]: [B, K, T] or [K, T]."""
    batch = torch.from_numpy(np.atleast_2d(pcm))[:, None]
    with torch.no_grad():
        codes: Codes = mimi.encode(batch).numpy()
    return codes if pcm.ndim == 2 else codes[0]


def decode(mimi: MimiModel, codes: Codes) -> Floats:
    """Upstream's non-streaming decode of [B, K, T] or [K, T]: [B, N] or [N]."""
    batch = torch.from_numpy(codes if codes.ndim == 3 else codes[None])
    with torch.no_grad():
        pcm: Floats = mimi.decode(batch)[:, 0].numpy()
    return pcm if codes.ndim == 3 else pcm[0]


def stream(mimi: MimiModel, pcm: Floats) -> tuple[Codes, Floats]:
    """Upstream's streaming encode and decode, a frame a call: codes [K, T] and sound [N]."""
    codes, out = [], []
    with torch.no_grad(), mimi.streaming(1):
        for chunk in torch.from_numpy(pcm).split(FRAME):
            codes.append(mimi.encode(chunk[None, None]))
            out.append(mimi.decode(codes[-1]))
    return torch.cat(codes, 2)[0].numpy(), torch.cat(out, 2)[0, 0].numpy()


def fill_codebooks(
    mimi: MimiModel, seed: int, other: Callable[[float], Floats] | None = None
) -> None:
    """Puts residual vectors of other sound into the codebooks, level by level.

    Entries of the first level are frames of that sound. Further down an entry is the residual that
    a frame leaves at that level, shortened to about the length that is best subtracted along it (a
    raw residual in 256 dimensions is mostly not the neighbour's, and only the shortest would ever
    be chosen), by a factor that differs from entry to entry, so that lengths matter.
    To go on to the next level, a frame is quantised with the entries that are not its own or its
    neighbours': residuals shrink as they will for sound that the codebooks have not seen.
    """
    rng = np.random.default_rng(seed)
    bins = mimi.quantizer.rvq_first.bins
    pieces = -(-bins // 98)  # of 4 s: 49 frames at each of the two phases of the last stride
    pcm = (other or sounds.other_sound)(4.0 * pieces)[: pieces * 50 * FRAME]
    pcm = pcm + rng.normal(0, 1e-3, len(pcm)).astype(np.float32)
    with torch.no_grad():
        found = []
        for part in torch.from_numpy(pcm).view(pieces, 1, -1).split(4):
            x = mimi.encoder_transformer(mimi.encoder(part))[0]
            # in the order of time, so that neighbours stand side by side
            half = mimi.downsample(x[..., 1:-1])
            whole = mimi.downsample(x)[..., : half.shape[-1]]
            found.append(torch.stack([whole, half], -1).flatten(2))
        latents = torch.cat(found)
        for quantizer in (mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest):
            residual = quantizer.input_proj(latents).transpose(1, 2).flatten(0, 1)
            frames = len(residual)
            for level, layer in enumerate(quantizer.vq.layers):
                owner = torch.from_numpy(rng.permutation(frames)[:bins])
                entries = residual[owner]
                dots = residual @ entries.T
                near = (torch.arange(frames)[:, None] - owner[None]).abs() <= 3
                if level:
                    norms = entries.norm(dim=1)
                    best = (dots / norms).masked_fill_(near, 0).amax(1).mean()
                    spread = torch.from_numpy(rng.uniform(0.6, 1.2, bins).astype(np.float32))
                    factor = spread * best / norms
                    entries, dots = entries * factor[:, None], dots * factor
                book = layer._codebook
                usage = torch.from_numpy(rng.uniform(0.5, 20, bins).astype(np.float32))
                usage[torch.from_numpy(rng.permutation(bins)[: bins // 64])] = 0
                book.cluster_usage.copy_(usage)
                book.embedding_sum.copy_(entries * usage.clamp(min=book.epsilon)[:, None])
                book._initialized.fill_(1)
                book._embedding = None
                nearness = (2 * dots - entries.pow(2).sum(1)).masked_fill_(near, -np.inf)
                residual = residual - entries[nearness.argmax(1)]


# ---- the live server ---------------------------------------------------------------------------


@dataclass
class LiveRun:
    """A conversation as upstream's live server holds it. Index 0 is the frame."""

    pcm: Floats  # [T * 1920] what the user said
    user_codes: Codes  # [T, K]
    lead: float  # least relative lead of a code over the runner-up, all frames and codebooks
    changed: int  # frames that were altered because a decision was too close
    lm: LmRun
    sound: Floats  # [T * 1920] what came back; silence while nothing does


def _held(module: torch.nn.Module) -> list[tuple[Any, str, Any]]:
    """What streaming changes inside the module: object, attribute, value.

    Not the keys and values themselves: a repeated frame writes the same slots again.
    """
    held: list[tuple[Any, str, Any]] = []
    for child in module.modules():
        state = getattr(child, "_streaming_state", None)
        for owner in (state, getattr(state, "kv_cache", None)):
            for name, value in vars(owner).items() if owner is not None else ():
                if isinstance(value, torch.Tensor) and name != "cache":
                    held.append((owner, name, value.clone()))
                elif isinstance(value, int):
                    held.append((owner, name, value))
    return held


def _restore(held: list[tuple[Any, str, Any]]) -> None:
    for owner, name, value in held:
        setattr(owner, name, value.clone() if isinstance(value, torch.Tensor) else value)


def _encode_clearly(
    mimi: MimiModel, judge: Quantizers, chunk: Floats, bound: float
) -> tuple[Floats, Codes, float, bool]:
    """Encodes one frame; alters it slightly for as long as a decision lies within the bound."""
    sides = (mimi.encoder, mimi.encoder_transformer, mimi.downsample)
    before = [held for side in sides for held in _held(side)]
    for attempt in range(40):
        rng = np.random.default_rng(attempt)
        tried = chunk
        if attempt:
            tried = chunk * np.float32(1 - 0.002 * attempt)
            tried = tried + rng.normal(0, 2e-4 * attempt, FRAME).astype(np.float32)
        latent = mimi._encode_to_unquantized_latent(torch.from_numpy(tried)[None, None])
        codes: Codes = mimi.quantizer.encode(latent)[0].numpy()
        lead = float(judge.leads(latent[0].numpy(), codes).min())
        if lead > bound:
            return tried, codes[:, 0], lead, attempt > 0
        _restore(before)
    raise AssertionError("no variation of this frame is clear of ties")


def server_encode(mimi: MimiModel, pcm: Floats, lead: float) -> tuple[Floats, Codes, float, int]:
    """The codec's first part in upstream's `recv_loop`: encode, reset after the first frame.

    Frames with a decision closer than `lead` are altered before they are heard. Returns the sound
    that was used, its codes [T, K], the least lead and how many frames were altered.
    """
    judge = Quantizers(mimi)
    used, codes, least, changed = [], [], np.inf, 0
    with torch.no_grad(), mimi.streaming(1):
        for index, chunk in enumerate(pcm.reshape(-1, FRAME)):
            heard, heard_codes, clear, altered = _encode_clearly(mimi, judge, chunk, lead)
            if index == 0:
                mimi.reset_streaming()
            used.append(heard)
            codes.append(heard_codes)
            least, changed = min(least, clear), changed + altered
    return np.concatenate(used), np.stack(codes), least, changed


def server_decode(mimi: MimiModel, out: Codes) -> Floats:
    """The codec's second part: decode what came out; silence while nothing did."""
    sound = []
    with torch.no_grad(), mimi.streaming(1):
        for tokens in out:
            if tokens[0] < 0:
                sound.append(np.zeros(FRAME, np.float32))
            else:
                said = mimi.decode(torch.from_numpy(tokens[1:]).view(1, -1, 1))
                sound.append(said[0, 0].numpy().copy())
    return np.concatenate(sound)


def server_loop(
    mimi: MimiModel, lms: Iterable[LMModel], pcm: Floats, lead: float, margin: float
) -> LiveRun:
    """Upstream's `recv_loop`: encode, reset the codec after the first frame, step, decode.

    Encoder, language model and decoder share no state, so they run one after the other here. The
    first of the `lms` that makes no choice closer than `margin` talks; the rest are not asked.
    """
    used, codes, least, changed = server_encode(mimi, pcm, lead)
    for lm in lms:
        with one_thread():
            run = lm_greedy(lm, codes)
        if run.margin > margin:
            return LiveRun(used, codes, least, changed, run, server_decode(mimi, run.out))
    raise AssertionError("each of the models makes a choice too close to call")
