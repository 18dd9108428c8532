"""Which tokens a training step and an evaluation see."""

import mmap

import numpy as np
import torch
from torch import Tensor


class BlockSampler:
    """Training sequences: every epoch visits every block of block_size tokens once, in an order of its own.

    Which block is sample number i is a function of the seed and i alone, so a run that goes on needs to remember only
    how many samples it has seen. Where tokens are left over, each epoch cuts the blocks at another offset. `tokens` is
    a flat array of ids.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, seed: int):
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        self.blocks = (len(tokens) - 1) // block_size  # the last target lies one behind the last input
        self.epoch = -1

    def start(self, i: int) -> int:
        """Where sample i begins."""
        epoch, position = divmod(i, self.blocks)
        if epoch != self.epoch:
            draw = np.random.default_rng([self.seed, epoch])
            slack = len(self.tokens) - 1 - self.blocks * self.block_size
            self.shift, self.order, self.epoch = int(draw.integers(slack + 1)), draw.permutation(self.blocks), epoch
        return self.shift + int(self.order[position]) * self.block_size

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (count, T) of samples first, first + 1, ..."""
        rows = sequences(self.tokens, [self.start(i) for i in range(first, first + count)], self.block_size)
        self._expect(range(first + count, first + 2 * count))
        return rows

    def _expect(self, samples: range) -> None:
        """Have the kernel read these from the disk meanwhile: a cold disk takes six milliseconds for a batch, a distant
        one longer. No thread is needed for that, and memory, where they mostly are, takes twenty microseconds."""
        file = getattr(self.tokens, "_mmap", None)  # of a memmap
        if file is None or not hasattr(mmap, "MADV_WILLNEED"):
            return
        for i in samples:
            if i // self.blocks == self.epoch:  # another epoch's order would be drawn, and then this one's again
                begin, size = self.start(i) * self.tokens.itemsize, (self.block_size + 1) * self.tokens.itemsize
                within = begin % mmap.PAGESIZE
                file.madvise(mmap.MADV_WILLNEED, begin - within, within + size)


def sequences(tokens: np.ndarray, starts: list[int], block_size: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T), int64: the block_size tokens from each start, and the ones that follow each."""
    rows = torch.from_numpy(np.stack([tokens[s : s + block_size + 1] for s in starts]).astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def fixed_batches(tokens: np.ndarray, block_size: int, batch_size: int, count: int) -> list[list[int]]:
    """Where the `count` sequences of an evaluation begin, in batches: spread evenly, not overlapping, fixed."""
    fitting = min(count, (len(tokens) - 1) // block_size)
    starts = np.linspace(0, len(tokens) - 1 - block_size, fitting).astype(int).tolist()
    return [starts[i : i + batch_size] for i in range(0, fitting, batch_size)]
