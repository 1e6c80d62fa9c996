"""Blocks: token rows laid side by side in the sequences that the model trains on, without seeing each other.

Two rows of a block are kept apart by their position ids, which restart at 0 with every row, and by the absence of an
attention mask: then transformers' attention (eager, SDPA, flex, flash) lets a token see its own row only. The first
token of a row is never a target, so that no row predicts the next.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch

from mini_qwen.ledger import Ledger
from mini_qwen.store import TokenStore

IGNORED = -100  # the label that PyTorch's cross-entropy skips
Span = tuple[int, int]  # first and one past the last token, counted in the store


class Blocks(torch.utils.data.Dataset):
    """The blocks of a TokenStore. Each item has `input_ids`, `position_ids` and `labels`, arrays of equal length.

    Rows [7, 8, 9] and [5, 6] of which all tokens are trained, in one block:

        input_ids      7    8  9     5  6
        position_ids   0    1  2     0  1
        labels      -100    8  9  -100  6

    Args:
        spans: the stretches of tokens, one a row, that make up the block of a given number.
        remake: a function and its arguments that make these blocks again. Another process, and the hash that
            `datasets` takes, get those instead of the tokens.
    """

    def __init__(
        self, store: TokenStore, num_blocks: int, spans: Callable[[int], list[Span]], remake: tuple[Callable, tuple]
    ) -> None:
        self.store, self.num_blocks, self.spans, self.remake = store, num_blocks, spans, remake

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.remake

    def __len__(self) -> int:
        return self.num_blocks

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self.num_blocks:
            raise IndexError(index)
        spans = self.spans(index)
        ids = np.concatenate([self.store.ids[start:end] for start, end in spans]).astype(np.int64)
        positions = np.concatenate([np.arange(end - start) for start, end in spans])
        labels = np.where(positions == 0, IGNORED, ids)
        if self.store.trained is not None:
            trained = np.concatenate([self.store.trained[start:end] for start, end in spans])
            labels = np.where(trained, labels, IGNORED)
        return {"input_ids": ids, "position_ids": positions, "labels": labels}

    def as_dataset(self) -> datasets.Dataset:
        """The same items as a `datasets.Dataset`, the only kind that TRL's trainers take."""
        return datasets.Dataset.from_dict({"block": range(len(self))}).with_transform(self.fetch)

    def fetch(self, batch: dict[str, list[int]]) -> dict[str, list[np.ndarray]]:
        items = [self[index] for index in batch["block"]]
        return {name: [item[name] for item in items] for name in items[0]}


def cut_blocks(store: TokenStore, block_size: int, isolate: bool, keep_tail: bool) -> Blocks:
    """Cut the documents, laid end to end, into blocks of exactly `block_size` tokens, for pretraining.

    Args:
        isolate: keep the documents of a block apart; otherwise each token sees all of its block before it.
        keep_tail: make a shorter last block of what is left over, if it has a token to predict; else leave it out.
    """
    num_blocks, tail = divmod(store.num_tokens, block_size)
    cuts = span_starts(store, block_size, isolate, store.num_tokens)
    num_blocks += keep_tail and np.count_nonzero(cuts >= num_blocks * block_size) < tail
    end = min(num_blocks * block_size, store.num_tokens)

    def spans(index: int) -> list[Span]:
        low, high = index * block_size, min((index + 1) * block_size, end)
        inside = cuts[np.searchsorted(cuts, low) : np.searchsorted(cuts, high)].tolist()
        return list(zip(inside, [*inside[1:], high], strict=True))

    return Blocks(store, num_blocks, spans, remake=(cut_blocks, (store, block_size, isolate, keep_tail)))


def span_starts(store: TokenStore, block_size: int, isolate: bool, end: int) -> np.ndarray:
    """Where a row of a block begins: at every block, and with isolation at every document."""
    cuts = np.arange(0, end, block_size)
    return np.union1d(cuts, store.starts[store.starts < end]) if isolate else cuts


def count_cut(store: TokenStore, block_size: int, isolate: bool, ledger: Ledger) -> None:
    """Enter in the ledger what cutting without the tail does: tokens left over, and first tokens, never a target.

    Raises SystemExit when all documents together are shorter than one block.
    """
    if store.num_tokens < block_size:
        raise SystemExit(
            f"All documents together have {store.num_tokens:,} tokens, fewer than one block of {block_size:,}. Use "
            "more data or a smaller block_size."
        )
    tail = store.num_tokens % block_size
    masked = len(span_starts(store, block_size, isolate, store.num_tokens - tail))
    ledger.tokens_dropped["tail shorter than a block"] += tail
    ledger.tokens_masked += masked
    ledger.tokens_trained -= masked + tail


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Put rows into as few bins of `capacity` tokens as best-fit decreasing finds: long rows first, fullest bin first.

    >>> best_fit(np.array([4, 3, 6, 5]), capacity=9)
    [[2, 1], [3, 0]]
    """
    bins: list[list[int]] = []
    bins_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of bins_by_room, sorted
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        assert length <= capacity, f"row {row} has {length} tokens, a bin holds {capacity}"
        at = bisect_left(rooms, length)
        if at == len(rooms):
            number, room = len(bins), capacity
            bins.append([])
        else:
            room = rooms[at]
            number = bins_by_room[room].pop()
            if not bins_by_room[room]:
                del bins_by_room[room], rooms[at]
        bins[number].append(row)
        left = room - length
        if left not in bins_by_room:
            bins_by_room[left] = []
            insort(rooms, left)
        bins_by_room[left].append(number)
    return bins


def row_blocks(store: TokenStore, max_length: int, packing: bool) -> Blocks:
    """Whole rows, one to a block, or packed by best fit into blocks of at most `max_length` tokens."""
    bins = best_fit(store.lengths, max_length) if packing else [[row] for row in range(len(store))]

    def spans(index: int) -> list[Span]:
        return [(int(store.starts[row]), int(store.starts[row + 1])) for row in bins[index]]

    return Blocks(store, len(bins), spans, remake=(row_blocks, (store, max_length, packing)))


class BlockCollator:
    """Stack blocks into a batch [B, L]. Shorter blocks are filled up with a row of pads, kept apart like any other.

    Args:
        pad_id: token id to fill up with; its labels are ignored.
        flatten: make one row [1, B x L] of the batch, as flash attention needs to keep rows apart.
    """

    def __init__(self, pad_id: int, flatten: bool = False) -> None:
        self.pad_id, self.flatten = pad_id, flatten

    def __call__(self, blocks: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        length = max(len(block["input_ids"]) for block in blocks)
        batch: dict[str, Any] = {}
        for name, fill in [("input_ids", self.pad_id), ("position_ids", None), ("labels", IGNORED)]:
            rows = []
            for block in blocks:
                short = length - len(block[name])
                padding = np.arange(short) if fill is None else np.full(short, fill)
                rows.append(np.concatenate([block[name], padding]) if short else block[name])
            batch[name] = torch.from_numpy(np.stack(rows))
        return {name: tensor.reshape(1, -1) for name, tensor in batch.items()} if self.flatten else batch
