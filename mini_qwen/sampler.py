"""The order of pairs: batches of like length, so that little is padding, and the batches in random order."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

BATCHES_SORTED_TOGETHER = 50  # more would pad less, and put the same rows together in every epoch


class ByLength(Sampler[int]):
    """Indices of which each run of `batch_size` has like lengths; another order in every epoch, by seed alone.

    Rows are shuffled, sorted by length within windows of 50 batches, and cut into batches, which are shuffled in turn.
    The rows that fill no batch come last, so that all others stay whole.

    Args:
        lengths: of each row, in tokens.
        batch_size: of all processes together, so that they compute batches of like length at the same time.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = np.asarray(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self))
        whole = len(self) - len(self) % self.batch_size
        window = BATCHES_SORTED_TOGETHER * self.batch_size
        parts = [order[start : min(start + window, whole)] for start in range(0, whole, window)]
        rows = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in parts] or [order[:0]])
        batches = generator.permutation(rows.reshape(-1, self.batch_size))
        return iter([*batches.ravel().tolist(), *order[whole:].tolist()])
