"""Fields: what small result objects share."""

from collections.abc import Iterator, Mapping
from typing import Any


class Fields(Mapping[str, Any]):
    """Base of frozen dataclasses whose fields are read as attributes or by name, as in a dict:
    `stats.frames`, `stats["frames"]`, `dict(stats)`."""

    __slots__ = ()

    @classmethod
    def _names(cls) -> tuple[str, ...]:
        return tuple(getattr(cls, "__dataclass_fields__", ()))

    def __getitem__(self, name: str) -> Any:
        if name not in self._names():
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())
