"""Ogg pages taken apart and put together, for streams that no encoder writes."""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace

CONTINUED, FIRST, LAST = 1, 2, 4  # flags of a page
NO_PACKET_ENDS = 2**64 - 1  # granule of a page in which none does


@functools.cache
def _table() -> list[int]:
    table = []
    for value in range(256):
        value <<= 24
        for _ in range(8):
            value = (value << 1) ^ (0x04C11DB7 if value & 0x80000000 else 0)
        table.append(value & 0xFFFFFFFF)
    return table


def _checksum(data: bytes) -> int:
    table, value = _table(), 0
    for byte in data:
        value = (value << 8 & 0xFFFFFFFF) ^ table[value >> 24 ^ byte]
    return value


@dataclass(frozen=True)
class Page:
    """One page; `lacing` are the lengths in its segment table."""

    flags: int
    granule: int
    serial: int
    number: int
    lacing: bytes
    body: bytes

    def __bytes__(self) -> bytes:
        head = struct.pack(
            "<4sBBQIII", b"OggS", 0, self.flags, self.granule, self.serial, self.number, 0
        )
        data = head + bytes([len(self.lacing)]) + self.lacing + self.body
        return data[:22] + struct.pack("<I", _checksum(data)) + data[26:]

    @property
    def packets(self) -> list[bytes]:
        """Of a page whose packets all begin and end in it."""
        found, start, length = [], 0, 0
        for value in self.lacing:
            length += value
            if value < 255:
                found.append(self.body[start : start + length])
                start, length = start + length, 0
        return found


def page(
    packets: Iterable[bytes], number: int, granule: int = 0, flags: int = 0, serial: int = 1
) -> Page:
    """Whole packets on a page."""
    packets = list(packets)
    lacing = b"".join(b"\xff" * (len(one) // 255) + bytes([len(one) % 255]) for one in packets)
    assert len(lacing) <= 255
    return Page(flags, granule, serial, number, lacing, b"".join(packets))


def pages(data: bytes) -> list[Page]:
    """The pages of a stream without damage."""
    found = []
    while data:
        magic, _, flags, granule, serial, number, _, count = struct.unpack("<4sBBQIIIB", data[:27])
        assert magic == b"OggS"
        lacing = data[27 : 27 + count]
        end = 27 + count + sum(lacing)
        found.append(Page(flags, granule, serial, number, lacing, data[27 + count : end]))
        assert bytes(found[-1]) == data[:end]
        data = data[end:]
    return found


def join(parts: Iterable[Page]) -> bytes:
    return b"".join(map(bytes, parts))


def cut(whole: Page, at: int) -> list[Page]:
    """A page of one packet as two pages; the packet goes on in the second."""
    first = whole.lacing[:at]
    assert set(first) == {255}
    body = 255 * at
    return [
        replace(whole, lacing=first, body=whole.body[:body], granule=NO_PACKET_ENDS),
        replace(
            whole,
            lacing=whole.lacing[at:],
            body=whole.body[body:],
            number=whole.number + 1,
            flags=whole.flags | CONTINUED,
        ),
    ]


def joined_packet(packets: list[bytes]) -> bytes:
    """Opus packets of one frame each, of the same kind, as one packet (RFC 6716, code 3)."""
    kinds = {one[0] for one in packets}
    assert len(kinds) == 1 and kinds.pop() & 3 == 0
    frames = [one[1:] for one in packets]
    sizes = b""
    for frame in frames[:-1]:
        size = len(frame)
        sizes += bytes([size]) if size < 252 else bytes([252 + size % 4, (size - 252) // 4])
    return bytes([packets[0][0] | 3, 0x80 | len(frames)]) + sizes + b"".join(frames)
