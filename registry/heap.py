"""How far the buffers of a training step make the heap of a process grow, on Linux with glibc.

device.keep_freed_memory has glibc keep what is freed, for speed, and what it keeps lies in holes that the next buffers
do not always fit. The heap then grows to anything from a tenth more than what is ever needed at once to over twice as
much, so an estimate that left it out would be worth little.
"""

import random
from bisect import bisect_left, insort
from statistics import median

from registry.rehearsal import Rehearsal

MAPPED_FROM = 1 << 30  # bytes; buffers this large are not in the heap: device.keep_freed_memory
SLIVER = 80  # bytes that glibc takes on top of a buffer: it is to lie at a multiple of 64, and has a header
# Odds that a freed buffer leaves a hole too small for the next of its size, by whether blocks are computed again.
PINNED = {False: 0.09, True: 0.03}
STEPS, TRIES = 3, 9


def heap_peak(rehearsal: Rehearsal, recompute: bool = False) -> int:
    """Bytes that the heap and the largest buffers take at most in a few steps.

    glibc needs a hole somewhat larger than the buffer. Where one of the many small objects of a step has settled in the
    sliver beside a freed buffer, for good, the next one of its size fits there no more. Which buffers that happens to
    differs from run to run, and peaks of one and the same run differ by a tenth and more; so here dice decide, and the
    median of a few throws counts. Their odds, PINNED, are the numbers of the estimate that were fitted to measured
    peaks (docs/memory.md).
    """
    return int(median(_peak(rehearsal, random.Random(seed), PINNED[recompute]) for seed in range(TRIES)))


def _peak(rehearsal: Rehearsal, dice: random.Random, pinned: float) -> int:
    heap, sizes = Heap(dice, pinned), rehearsal.sizes
    for n in rehearsal.moves + rehearsal.moves[rehearsal.again :] * (STEPS - 2):
        number = max(n, ~n)
        old = heap.blocks.pop(number, None)  # when one comes that never went: that of the step before
        if n >= 0:
            heap.allocate(number, sizes[number])
        if old is not None:
            heap.release(*old)
    return heap.peak


class Heap:
    """Takes the smallest hole that will do, else grows at its top. Holes that touch become one; none is given back."""

    def __init__(self, dice: random.Random, pinned: float):
        self.dice, self.pinned = dice, pinned
        self.blocks: dict[int, tuple[int | None, int]] = {}  # {number: (address, bytes that go with it)}
        self.holes: list[tuple[int, int]] = []  # (size, address), sorted
        self.starts: dict[int, int] = {}  # {address of a hole: its size}
        self.ends: dict[int, int] = {}  # {address behind a hole: its size}
        self.top = self.highest = self.mapped = self.peak = 0

    def allocate(self, number: int, size: int) -> None:
        if size >= MAPPED_FROM:
            self.mapped += size
            self.blocks[number] = None, size
        else:
            taken = size + SLIVER
            address = self._place(taken)
            self.blocks[number] = address, (size if self.dice.random() < self.pinned else taken)
        self.peak = max(self.peak, self.highest + self.mapped)

    def release(self, address: int | None, size: int) -> None:
        if address is None:
            self.mapped -= size
            return
        if before := self.ends.get(address):
            self._close(address - before, before)
            address, size = address - before, size + before
        if behind := self.starts.get(address + size):
            self._close(address + size, behind)
            size += behind
        if address + size == self.top:
            self.top = address
        elif size:
            self._open(address, size)

    def _place(self, size: int) -> int:
        i = bisect_left(self.holes, (size, -1))
        if i == len(self.holes):
            self.top += size
            self.highest = max(self.highest, self.top)
            return self.top - size
        hole, address = self.holes[i]
        self._close(address, hole)
        if hole > size:
            self._open(address + size, hole - size)
        return address

    def _open(self, address: int, size: int) -> None:
        insort(self.holes, (size, address))
        self.starts[address] = self.ends[address + size] = size

    def _close(self, address: int, size: int) -> None:
        del self.holes[bisect_left(self.holes, (size, address))], self.starts[address], self.ends[address + size]
