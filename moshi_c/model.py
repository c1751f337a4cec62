"""Models: weights on one device, with their codec and tokenizer."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from . import _core, hub
from .audio import Pcm, as_pcm, read_blocks
from .errors import AudioError, CheckpointError, DeviceError
from .fields import Fields
from .tokenizer import Tokenizer

#: Formats of the language model's matrices; "auto" is as stored. "fp8" (e4m3) and "int8" have one
#: scale for each row, "q8" and "q4" have one for 32 weights.
Dtype = Literal["auto", "f32", "f16", "bf16", "fp8", "int8", "q8", "q4"]
#: Formats of what the sessions remember; "auto" is f32 for f32 weights, else bf16. "int8" has one
#: scale for each head and frame.
KvDtype = Literal["auto", "f32", "bf16", "int8"]

#: Of a signal that is not held whole, frames at a time: enough for long passes, 1 MB of sound.
_PIECE_FRAMES = 120


class _Closable(Protocol):
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Device(Fields):
    """One device of this machine.

    name: what `load(device=)` takes, such as "cpu".
    description: the instruction set in use, or the card's name.
    memory: bytes, 0 if unknown.
    usable: whether models can run on it.
    reason: why not, in one sentence; "" when usable.
    """

    name: str
    description: str
    memory: int
    usable: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Memory(Fields):
    """Bytes.

    weights: of the language model and the codec, mapped or private.
    session: one session with its context full.
    used: by all open sessions now.
    free: available on the device.
    """

    weights: int
    session: int
    used: int
    free: int


@dataclass(frozen=True, slots=True)
class ModelStats(Fields):
    """Where the time of all frames so far went: milliseconds a frame, on average.

    frames: stepped by all sessions.
    ticks: steps of the engine, fewer than frames when sessions share them.
    encode_ms, temporal_ms, depth_ms, decode_ms: of the stages; encode and decode are the codec's.
    other_ms: of all else.
    """

    frames: int
    ticks: int
    encode_ms: float
    temporal_ms: float
    depth_ms: float
    decode_ms: float
    other_ms: float


def devices() -> list[Device]:
    """What this machine offers, and for what is not usable the reason."""
    return [
        Device(d["name"], d["description"], d["memory_bytes"], d["usable"], d["reason"])
        for d in _core.devices()
    ]


def load(
    source: hub.PathLike | None = None,
    *,
    device: str = "auto",
    dtype: Dtype = "auto",
    kv_dtype: KvDtype = "auto",
    context: int | None = None,
    max_sessions: int = 8,
    threads: int | None = None,
    mimi: hub.PathLike | None = None,
    tokenizer: hub.PathLike | None = None,
    config: hub.PathLike | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    mmap: bool = True,
    check_weights: bool = False,
    progress: bool = True,
) -> Model:
    """Opens a model.

    Args:
        source: None for the small model in the package, a folder laid out like a published
            repository, one weight file (`.safetensors`, or the `.index.json` of shards), or a
            repository on the Hugging Face hub, such as "kyutai/moshiko-pytorch-bf16".
        device: "cpu", "cuda", or "cuda:1" for the second card, and so on. "auto" is the
            environment's MOSHI_C_DEVICE, else a card that can hold the model, else the CPU.
        dtype: format of the language model's matrices: "auto" (as stored), "f32", "f16", "bf16",
            or made while loading: "fp8" (8 bits a weight, e4m3), "int8" (8), "q8" (8.5), "q4"
            (4.5). Embeddings and norms stay as stored. The panels of `moshi-c quantize`, which are
            int8, q8 and q4, open in their own format only.
        kv_dtype: format of what the sessions remember: "auto" (f32 for f32 weights, else bf16),
            "f32", "bf16", or "int8", half the memory of bf16, at a small loss that
            benchmarks/quality.py measures.
        context: frames remembered; None for the checkpoint's.
        max_sessions: how many sessions may be open at once, 1 to 4096.
        threads: of the CPU, 1 to 1024; None for MOSHI_C_THREADS, else one per core.
        mimi, tokenizer, config: files to use instead of what the source has, as a path or
            "hf://org/repo/file". A file of weights alone needs them.
        revision: branch, tag or commit on the hub.
        token: for gated repositories; None for HF_TOKEN or the token stored on this machine.
        mmap: map the weight files instead of reading a copy. A mapped file must not be changed
            while the model is open: other bytes change what is said, and a file cut short ends the
            process (SIGBUS), which no library can turn into an exception. Where others may write
            to the files, False reads a copy and needs them no longer. The codec is always copied.
        check_weights: read all weights now, and refuse NaN and infinity. Without it, such a weight
            ends the sessions that it reaches. The codec's weights are always checked.
        progress: show the progress of downloads.

    Raises:
        CheckpointError: a file is missing, damaged, refused or of the wrong shape.
        DeviceError: no such device, or not enough memory.
        ValueError: an option out of range.
    """
    device = _device(device)
    _check_option("dtype", dtype, get_args(Dtype))
    _check_option("kv_dtype", kv_dtype, get_args(KvDtype))
    _check_count("context", context)
    _check_count("max_sessions", max_sessions)
    _check_count("threads", threads)
    checkpoint = hub.resolve(
        source,
        mimi=mimi,
        tokenizer=tokenizer,
        config=config,
        revision=revision,
        token=token,
        progress=progress,
    )
    lm, codec = checkpoint.lm, checkpoint.mimi
    core = _core.Model(
        # only a folder may lack a codec; what it has is given file by file
        folder=_text(lm.parent) if lm is not None and codec is None else None,
        config_path=_text(checkpoint.config_path),
        lm_path=_text(lm),
        mimi_path=_text(codec),
        mimi_config_path=_text(checkpoint.mimi_config),
        device=device,
        dtype=dtype,
        threads=threads or 0,
        copy_weights=not mmap,
        check_weights=check_weights,
        kv_dtype=kv_dtype,
        context=context or 0,
        max_sessions=max_sessions,
    )
    return Model(core, checkpoint, max_sessions)


def load_mimi(
    source: hub.PathLike | None = None,
    *,
    device: str = "auto",
    dtype: Literal["auto", "f32", "bf16", "int8"] = "auto",
    codebooks: int = 8,
    config: hub.PathLike | None = None,
    threads: int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    mmap: bool = True,
    progress: bool = True,
) -> Mimi:
    """Opens the codec alone.

    Args:
        source: None for the small codec in the package, a weight file, or a folder or repository of
            a model.
        device, threads, revision, token, mmap, progress: as for `load`.
        dtype: of the layers with most weights: "auto" or "f32": float32; "bf16", half the
            memory to read; "int8" (one scale per row), a quarter. Sound and sums stay float32.
        codebooks: how many codes a frame has, 1 to what the file holds.
        config: the codec's own JSON settings, when no `config.json` beside it names them and they
            are not Mimi's.

    Raises:
        CheckpointError, DeviceError, ValueError: as for `load`.
    """
    device = _device(device)
    _check_option("dtype", dtype, ("auto", "f32", "bf16", "int8"))
    _check_count("codebooks", codebooks)
    _check_count("threads", threads)
    checkpoint = hub.resolve_mimi(
        source, config=config, revision=revision, token=token, progress=progress
    )
    core = _core.Model(
        mimi_path=_text(checkpoint.mimi),
        mimi_config_path=_text(checkpoint.mimi_config),
        device=device,
        mimi_dtype=dtype,
        mimi_codebooks=codebooks,
        threads=threads or 0,
        codec_only=True,
        copy_weights=not mmap,
    )
    return Mimi(core, owned=True)


def _text(path: os.PathLike[str] | None) -> str | None:
    return None if path is None else os.fspath(path)


def _device(name: str) -> str:
    """What the core is to open."""
    asked = f"device is {name!r}"
    if name == "auto":
        name = os.environ.get("MOSHI_C_DEVICE", "").strip() or "auto"
        asked = f"MOSHI_C_DEVICE is {name!r}"
    if name in ("auto", "cpu", "cuda") or (name.startswith("cuda:") and name[5:].isdecimal()):
        return name
    raise DeviceError(f"{asked}; expected 'auto', 'cpu', 'cuda' or 'cuda:1' and so on")


def _check_option(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")


def _check_count(name: str, value: int | None) -> None:
    if value is None or (
        isinstance(value, Integral) and not isinstance(value, bool) and 1 <= value < 2**31
    ):
        return
    raise ValueError(f"{name} is {value!r}; expected a whole number of 1 or more")


class Model:
    """Weights on one device, with their codec and tokenizer. Made by `load`, shared by all its
    sessions and by threads. A context manager: leaving it closes the sessions, then the model."""

    def __init__(
        self, core: _core.Model, checkpoint: hub.Checkpoint, max_sessions: int = 8
    ) -> None:
        """For `load`."""
        self._core = core
        self._info = info = core.info
        self._source = checkpoint.source
        self._config = checkpoint.config
        self._max_sessions = max_sessions
        self._delays = core.delays
        self._open: weakref.WeakSet[_Closable] = weakref.WeakSet()
        self._mimi = Mimi(core, owned=False, opened=self._open) if info["has_mimi"] else None
        self._tokenizer = None
        if checkpoint.tokenizer is not None:
            self._tokenizer = Tokenizer(
                checkpoint.tokenizer,
                padding_id=info["text_padding_id"],
                end_padding_id=info["text_end_padding_id"],
            )

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json as it is; upstream's 7B settings when it has none."""
        return self._config

    @property
    def family(self) -> str:
        """ "moshi", "hibiki", "stt", "tts" or "personaplex": the config's model_type."""
        return str(self._info["family"])

    @property
    def device(self) -> str:
        """Where the weights are, such as "cpu"."""
        return str(self._info["device"])

    @property
    def dtype(self) -> str:
        """Format of the language model's matrices, such as "bf16" or "q4"."""
        return str(self._info["dtype"])

    @property
    def sample_rate(self) -> int:
        """Of the sound going in and out, in Hz."""
        return int(self._info["sample_rate"])

    @property
    def frame_rate(self) -> float:
        """Frames a second (12.5)."""
        return float(self._info["frame_rate"])

    @property
    def frame_size(self) -> int:
        """Samples of one frame (1920)."""
        return int(self._info["frame_size"])

    @property
    def delays(self) -> tuple[int, ...]:
        """Frames by which each stream is late: text, then the model's and the user's codes."""
        return self._delays

    @property
    def max_delay(self) -> int:
        """Frames stepped before the first output."""
        return int(self._info["max_delay"])

    @property
    def max_sessions(self) -> int:
        """How many sessions may be open at once."""
        return self._max_sessions

    @property
    def memory(self) -> Memory:
        """Bytes in use and free."""
        m = self._core.memory()
        return Memory(
            m["weights_bytes"], m["session_bytes"], m["session_used_bytes"], m["free_bytes"]
        )

    @property
    def stats(self) -> ModelStats:
        """Where the time of all frames so far went."""
        s = self._core.stats()
        frames = int(s["frames"])
        parts = ("encode", "temporal", "depth", "decode", "other")
        each = [1000.0 * s[f"{part}_s"] / max(frames, 1) for part in parts]
        return ModelStats(frames, int(s["ticks"]), *each)

    @property
    def mimi(self) -> Mimi:
        """The codec. CheckpointError when the model was loaded without one."""
        if self._mimi is None:
            raise CheckpointError(
                f"{self._source} was loaded without a codec; give one with load(..., mimi=...)"
            )
        return self._mimi

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Text to tokens and back; None when the checkpoint has none."""
        return self._tokenizer

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._core.closed

    def close(self) -> None:
        """Frees the weights. SessionError while sessions or streams are open."""
        self._core.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc: object) -> None:
        for child in list(self._open):
            child.close()
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return f"<Model {self._source} (closed)>"
        return (
            f"<Model {self._source}: {self.family}, {self._info['parameters'] / 1e6:.1f} M "
            f"parameters, {self.dtype} on {self.device}>"
        )


class Mimi:
    """The codec: sound to codes, 12.5 times a second, and back. May be shared by threads.

    `encode` and `decode` take whole signals and equal upstream's non-streaming calls; `stream`
    makes a MimiStream, which goes frame by frame and equals upstream's streaming.
    """

    def __init__(
        self,
        core: _core.Model,
        *,
        owned: bool,
        opened: weakref.WeakSet[_Closable] | None = None,
    ) -> None:
        """For `load` and `load_mimi`."""
        self._core = core
        self._info = core.info
        self._owned = owned
        self._open: weakref.WeakSet[_Closable] = weakref.WeakSet() if opened is None else opened

    @property
    def sample_rate(self) -> int:
        """In Hz (24000)."""
        return int(self._info["sample_rate"])

    @property
    def frame_rate(self) -> float:
        """Frames a second (12.5)."""
        return float(self._info["frame_rate"])

    @property
    def frame_size(self) -> int:
        """Samples of one frame (1920)."""
        return int(self._info["frame_size"])

    @property
    def codebooks(self) -> int:
        """Codes of one frame, K."""
        return int(self._info["codebooks"])

    @property
    def codebook_size(self) -> int:
        """Codes are 0 to this, exclusive."""
        return int(self._info["codebook_size"])

    @property
    def dtype(self) -> str:
        """Format of the codec's large matrices: "f32", "bf16" or "int8"."""
        return str(self._info["mimi_dtype"])

    def encode(self, audio: Any) -> NDArray[np.int32]:
        """Codes of a whole signal.

        Args:
            audio: a path, or samples at `sample_rate`: `[N]`, or a batch `[B, N]`; float32, or
                int16. Zeros are added to fill the last frame.

        Returns:
            int32[K, T], or int32[B, K, T] for a batch; T is N / frame_size, rounded up.

        Raises:
            AudioError: the file or the samples are not usable.
        """
        if isinstance(audio, (str, os.PathLike)):
            return self._encode_blocks(read_blocks(audio, self.sample_rate))[0]
        batched = np.ndim(audio) == 2
        pcm = as_pcm(audio, "audio", ndim=2)
        if pcm.size == 0:
            codes = np.zeros((len(pcm), self.codebooks, 0), np.int32)
        else:
            codes = self._core.encode(pcm)
        return codes if batched else codes[0]

    def decode(self, codes: Any) -> Pcm:
        """The signal of whole codes.

        Args:
            codes: integers `[K, T]`, or a batch `[B, K, T]`; K may be smaller than `codebooks`.

        Returns:
            float32[T * frame_size], or float32[B, T * frame_size].

        Raises:
            AudioError: a wrong shape, or a code out of range.
        """
        array = _as_codes(codes)
        if array.ndim not in (2, 3):
            raise AudioError(
                f"codes have shape {list(array.shape)}; expected [codebooks, frames] or "
                "[batch, codebooks, frames]"
            )
        batch = array if array.ndim == 3 else array[None]
        if batch.shape[0] == 0 or batch.shape[2] == 0:
            pcm: Pcm = np.zeros((batch.shape[0], batch.shape[2] * self.frame_size), np.float32)
        else:
            pcm = self._core.decode(batch)
        return pcm if array.ndim == 3 else pcm[0]

    def _encode_blocks(self, blocks: Iterable[Pcm]) -> tuple[NDArray[np.int32], int]:
        """Codes of one signal that comes in blocks, and its samples; the sound is not kept."""
        codes = [np.zeros((self.codebooks, 0), np.int32)]
        held: list[Pcm] = []
        samples = waiting = 0
        with contextlib.closing(_core.MimiStream(self._core, whole=True)) as stream:
            for block in blocks:
                samples += len(block)
                waiting += len(block)
                held.append(block)
                if waiting >= _PIECE_FRAMES * self.frame_size:
                    pcm = np.concatenate(held)
                    whole = waiting // self.frame_size * self.frame_size
                    codes.append(stream.encode_piece(pcm[:whole]))
                    held, waiting = [pcm[whole:].copy()], waiting - whole
            if waiting:
                codes.append(stream.encode_piece(np.concatenate(held)))
        return np.concatenate(codes, axis=1), samples

    def _decode_pieces(self, codes: NDArray[np.int32]) -> Iterator[Pcm]:
        """The signal of `[K, T]`, piece by piece."""
        with contextlib.closing(_core.MimiStream(self._core, whole=True)) as stream:
            for first in range(0, codes.shape[1], _PIECE_FRAMES):
                yield stream.decode_piece(codes[:, first : first + _PIECE_FRAMES])

    def stream(self, batch: int = 1) -> MimiStream:
        """A codec that goes frame by frame, `batch` signals at once.

        Raises:
            ValueError: `batch` is no whole number of 1 or more.
        """
        _check_count("batch", batch)
        stream = MimiStream(_core.MimiStream(self._core, batch), batch)
        self._open.add(stream)
        return stream

    @property
    def closed(self) -> bool:
        """Whether the weights are freed."""
        return self._core.closed

    def close(self) -> None:
        """Frees the weights of a codec made by `load_mimi`; SessionError while streams are open.
        The codec of a Model closes with the model: this call then does nothing."""
        if self._owned:
            self._core.close()

    def __enter__(self) -> Mimi:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._owned:
            for child in list(self._open):
                child.close()
        self.close()

    def __repr__(self) -> str:
        return f"<Mimi: {self.codebooks} codebooks of {self.codebook_size}, {self.dtype}>"


def _as_codes(codes: Any) -> NDArray[Any]:
    """Integers of any width; the core checks the values."""
    try:
        array = np.asarray(codes)
    except Exception as error:
        raise AudioError(f"codes could not be read as an array: {error}") from error
    if array.dtype.kind not in "iu" and array.size:
        raise AudioError(f"codes have elements of type {array.dtype}; expected integers")
    return array if array.dtype.kind in "iu" else array.astype(np.int32)


class MimiStream:
    """The codec frame by frame, for one signal or a batch that goes in step. One thread at a time.
    Encoding and decoding are two independent streams. A context manager."""

    def __init__(self, core: _core.MimiStream, batch: int) -> None:
        """For `Mimi.stream`."""
        self._core = core
        self.batch = batch

    def encode(self, pcm: Any) -> NDArray[np.int32]:
        """float32[1920] -> int32[K]; in a batch float32[B, 1920] -> int32[B, K].

        Raises:
            AudioError: another length, type or value.
            SessionError: closed, or in use by another thread.
        """
        codes = self._core.encode(pcm)
        return codes if np.ndim(pcm) == 2 else codes[0]

    def decode(self, codes: Any) -> Pcm:
        """int32[K] -> float32[1920]; in a batch int32[B, K] -> float32[B, 1920]. K may be smaller
        than the codec's.

        Raises:
            AudioError: a wrong shape, or a code out of range.
            SessionError: closed, or in use by another thread.
        """
        array = _as_codes(codes)
        pcm = self._core.decode(array)
        return pcm if array.ndim == 2 else pcm[0]

    def reset(self) -> None:
        """Back to the state of a new stream."""
        self._core.reset()

    def snapshot(self) -> bytes:
        """The whole state of both directions, for `restore`.

        Raises:
            SessionError: closed, or in use by another thread.
        """
        return self._core.snapshot()

    def restore(self, data: bytes) -> None:
        """Goes on where a stream of the same codec and batch took a snapshot, bit for bit on the
        same kind of processor.

        Raises:
            CheckpointError: damaged, or of another codec, device, batch or version; the stream is
                as new then.
            SessionError: closed, or in use by another thread.
        """
        self._core.restore(bytes(memoryview(data)))

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._core.closed

    def close(self) -> None:
        """Frees the stream's state."""
        self._core.close()

    def __enter__(self) -> MimiStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
