"""Who talks, who waits, who is refused: a number of slots and a line of bounded length."""

from __future__ import annotations

import asyncio


class Place:
    """One caller's, from the request to the end of the call."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.changed = asyncio.Event()

    @property
    def position(self) -> int:
        """0 with a slot, else 1 for the next one to get one."""
        return self._admission.position(self)

    def leave(self) -> None:
        """Gives the slot, or the place in the line, to the next one; a second call does nothing."""
        self._admission.leave(self)


class Admission:
    """First come, first served."""

    def __init__(self, slots: int, queue: int) -> None:
        self.slots = slots
        self.queue = queue
        self._talking: set[Place] = set()
        self._line: list[Place] = []

    @property
    def busy(self) -> int:
        """Slots in use."""
        return len(self._talking)

    @property
    def waiting(self) -> int:
        """Callers in the line."""
        return len(self._line)

    @property
    def full(self) -> bool:
        """Whether the next caller is refused."""
        return self.busy >= self.slots and self.waiting >= self.queue

    def enter(self) -> Place | None:
        """A slot or a place in the line; None when both are full."""
        if self.full:
            return None
        place = Place(self)
        if self.busy < self.slots:
            self._talking.add(place)
        else:
            self._line.append(place)
        return place

    def position(self, place: Place) -> int:
        """See Place.position."""
        return self._line.index(place) + 1 if place in self._line else 0

    def leave(self, place: Place) -> None:
        """See Place.leave."""
        if place in self._line:
            self._line.remove(place)
        elif place in self._talking:
            self._talking.remove(place)
            if self._line:
                self._talking.add(self._line.pop(0))
        else:
            return
        for other in (*self._talking, *self._line):
            other.changed.set()
