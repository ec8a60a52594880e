"""Best-fit decreasing bin packing of many items of few sizes (Johnson, 1973), as documents are packed into rows in
"Fewer Truncations Improve Language Modeling" (Ding et al., arXiv 2404.10830).

Items of one size are alike, so that bins are kept in groups that are alike too: the work depends on the sizes, not on
the number of items.
"""

from bisect import bisect_left, insort
from collections import deque
from typing import NamedTuple

import numpy as np


class Share(NamedTuple):
    """Items of one size in each bin of a group: bin j has the items first + j * n to first + (j + 1) * n - 1."""

    size: int
    n: int
    first: int


class Group(NamedTuple):
    """Bins that hold the same sizes."""

    bins: int
    shares: tuple[Share, ...]

    def split(self, at: int) -> tuple["Group", "Group"]:
        """The first `at` bins, and the others."""
        moved = tuple(share._replace(first=share.first + at * share.n) for share in self.shares)
        return Group(at, self.shares), Group(self.bins - at, moved)

    def with_items(self, share: Share) -> "Group":
        """With further items in each bin."""
        return Group(self.bins, (*self.shares, share))


def best_fit_decreasing(counts: np.ndarray) -> list[Group]:
    """Pack items, the largest first, each into the fullest bin that it fits into, or into a new one.

    Args:
        counts: (capacity + 1,) number of items of each size; none of size 0.

    Returns:
        The bins. Every item, numbered from 0 within its size, is in one of them.
    """
    capacity = len(counts) - 1
    full: list[Group] = []
    waiting: dict[int, deque[Group]] = {}  # by the room that is left
    rooms: list[int] = []  # of `waiting`, ascending

    def keep(group: Group, room: int) -> None:
        if group.bins == 0:
            return
        if room == 0:
            full.append(group)
        elif room in waiting:
            waiting[room].append(group)
        else:
            waiting[room] = deque([group])
            insort(rooms, room)

    for size in np.flatnonzero(counts)[::-1].tolist():
        left, first = int(counts[size]), 0
        while left:
            at = bisect_left(rooms, size)
            if at == len(rooms):
                each = capacity // size
                room, group = capacity, Group(-(-left // each), ())
            else:
                # With an item more a bin has the least room of all, so the next item goes there too, while it fits.
                room = rooms[at]
                each = room // size
                group = waiting[room].popleft()
                if not waiting[room]:
                    del waiting[room], rooms[at]
            filled, rest = group.split(min(group.bins, left // each))
            keep(filled.with_items(Share(size, each, first)), room - each * size)
            first, left = first + filled.bins * each, left - filled.bins * each
            if rest.bins and left:  # fewer than `each`
                last, rest = rest.split(1)
                keep(last.with_items(Share(size, left, first)), room - left * size)
                left = 0
            keep(rest, room)
    return full + [group for room in rooms for group in waiting[room]]
