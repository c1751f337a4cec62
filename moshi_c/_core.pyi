"""The C core as Python sees it. Everything public wraps these types; see the package's own
docstrings for the contracts. Arrays out are NumPy arrays made through the NumPy C API; arrays in
are any object with the buffer protocol."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypedDict, final

import numpy as np
from numpy.typing import NDArray

__version__: Final[str]

class Device(TypedDict):
    name: str
    description: str
    memory_bytes: int
    usable: bool
    reason: str

#: index, pcm float32[frame_size] (None when not decoded), text_token (-1 before the first output),
#: codes int32[dep_q] (None before the first output), user_codes int32[user_q], level in dBFS,
#: heads float32[heads, head_dim] (None without heads), seconds the step took, event: None or a word
FrameTuple = tuple[
    int,
    NDArray[np.float32] | None,
    int,
    NDArray[np.int32] | None,
    NDArray[np.int32],
    float,
    NDArray[np.float32] | None,
    float,
    str | None,
]

@final
class Model:
    def __new__(
        cls,
        *,
        folder: str | None = None,
        config_path: str | None = None,
        lm_path: str | None = None,
        mimi_path: str | None = None,
        mimi_config_path: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        mimi_dtype: str = "auto",
        mimi_codebooks: int = 0,
        threads: int = 0,
        codec_only: bool = False,
        copy_weights: bool = False,
        kv_dtype: str = "auto",
        context: int = 0,
        max_sessions: int = 0,
        check_weights: bool = False,
    ) -> Model: ...
    @property
    def info(self) -> dict[str, Any]: ...
    """All fields of struct moshi_model_info under their C names."""
    @property
    def delays(self) -> tuple[int, ...]: ...
    @property
    def conditions(self) -> dict[str, list[str]]: ...
    @property
    def closed(self) -> bool: ...
    def memory(self) -> dict[str, int]: ...
    def stats(self) -> dict[str, float]: ...
    def encode(self, pcm: Any) -> NDArray[np.int32]: ...
    """float32[B, N] -> int32[B, K, T]"""
    def decode(self, codes: Any) -> NDArray[np.float32]: ...
    """int32[B, K, T] -> float32[B, T * frame_size]"""
    def close(self) -> None: ...
    """Raises SessionError while sessions or streams are open."""

@final
class Session:
    def __new__(
        cls,
        model: Model,
        *,
        seed: int,
        text_temperature: float | None = None,
        text_top_k: int | None = None,
        audio_temperature: float | None = None,
        audio_top_k: int | None = None,
        cfg_coef: float = 1.0,
        cfg_masked_until: int = -1,
        cfg_no_text: bool = False,
        conditions: Mapping[str, str | None] | None = None,
        null_conditions: Mapping[str, str | None] | None = None,
        offline_start: bool = False,
        keep_logits: bool = False,
        context_policy: str = "ring",
        context_range: int = 0,
        context_keep: int = 0,
    ) -> Session: ...
    @property
    def seed(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    @property
    def in_flight(self) -> bool: ...
    @property
    def forced_left(self) -> int: ...
    def check_open(self) -> None: ...
    """Raises SessionError when closed, or in a process forked from the one that made it."""
    def step(self, pcm: Any, decode: bool = True, dtype: str | None = None) -> FrameTuple: ...
    """pcm: one frame of float32 or int16, any buffer or DLPack on the CPU, strides allowed; raw
    bytes need dtype="float32" or "int16" (little endian). int16 is divided by 32768."""
    def step_codes(self, codes: Any, decode: bool = True) -> FrameTuple: ...
    def prefill(self, text_tokens: Any, codes: Any, user_codes: Any) -> NDArray[np.int32]: ...
    """int32[T], [dep_q, T] and [user_q, T] -> int32[T], the text that came out, -1 for none."""
    def force_text(self, tokens: Sequence[int]) -> None: ...
    def force_next(self, text: int | None, audio: Any | None) -> None: ...
    def logits(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...
    def reset(self, seed: int | None = None) -> None: ...
    def submit(self, pcm: Any, decode: bool = True, dtype: str | None = None) -> None: ...
    """The first half of step. The session is in use until finish or a withdraw that is True."""
    def finish(self) -> FrameTuple: ...
    def withdraw(self) -> bool: ...
    def descriptor(self) -> int: ...
    def snapshot(self, note: bytes) -> bytes: ...
    @classmethod
    def restore(cls, model: Model, data: bytes) -> tuple[Session, bytes]: ...
    def fork(self, seed: int | None = None) -> Session: ...
    def close(self) -> None: ...

@final
class MimiStream:
    def __new__(cls, model: Model, batch: int = 1, whole: bool = False) -> MimiStream: ...
    """whole: for one whole signal in pieces."""
    @property
    def closed(self) -> bool: ...
    def encode(self, pcm: Any) -> NDArray[np.int32]: ...
    """float32[batch, frame_size] -> int32[batch, codebooks]"""
    def decode(self, codes: Any) -> NDArray[np.float32]: ...
    """int32[batch, K] -> float32[batch, frame_size]"""
    def encode_piece(self, pcm: Any, /) -> NDArray[np.int32]: ...
    """float32[samples] -> int32[codebooks, frames]; only the last piece may end inside a frame"""
    def decode_piece(self, codes: Any, /) -> NDArray[np.float32]: ...
    """int32[K, frames] -> float32[frames * frame_size]"""
    def reset(self) -> None: ...
    def snapshot(self) -> bytes: ...
    def restore(self, data: bytes) -> None: ...
    def close(self) -> None: ...

@final
class Conversion:
    """A language model in another format, as the parts of one .safetensors file."""

    def __new__(
        cls, lm_path: str, dtype: str, config_path: str | None = None, threads: int = 0
    ) -> Conversion: ...
    @property
    def sizes(self) -> tuple[int, ...]: ...
    """Bytes of each part."""
    def read(self, part: int, /) -> bytes: ...
    def close(self) -> None: ...

def step_many(
    sessions: Sequence[Session], pcms: Sequence[Any], decode: bool = True, codes: bool = False
) -> list[FrameTuple]: ...
def devices() -> list[Device]: ...
def measure(threads: int, seconds: float, /) -> dict[str, float]: ...
