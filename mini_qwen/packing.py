"""Packing: which stretches of the token rows make up which block. Arrays of numbers only; no token is read.

A span is a stretch of tokens of one row, [first, one past the last], counted in the store. Spans come as arrays
int64 [n, 2], the spans of a block one after the other.
"""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np


class Packed(NamedTuple):
    spans: np.ndarray  # int64 [n, 2]
    num_spans: np.ndarray  # int64 [number of blocks]: how many of the spans each block has
    rest: np.ndarray  # spans [m, 2] that fill no block, fewer tokens than one


NO_SPANS = np.empty((0, 2), np.int64)


def lengths_of(spans: np.ndarray) -> np.ndarray:
    return spans[:, 1] - spans[:, 0]


def split_at(spans: np.ndarray, cuts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lay the spans end to end and cut the line at `cuts` as well; the pieces, and where each begins on the line.

    >>> pieces, begins = split_at(np.array([[10, 14], [20, 23]]), np.array([0, 3, 6]))
    >>> pieces.tolist(), begins.tolist()
    ([[10, 13], [13, 14], [20, 22], [22, 23]], [0, 3, 4, 6])
    """
    ends = np.cumsum(lengths_of(spans))
    total = int(ends[-1]) if len(ends) else 0
    begins = np.union1d(cuts[cuts < total], ends - lengths_of(spans))
    owner = np.searchsorted(ends, begins, side="right")
    first = spans[owner, 1] - ends[owner] + begins
    return np.stack([first, first + np.diff(begins, append=total)], axis=1), begins


def cut(spans: np.ndarray, size: int) -> Packed:
    """Cut the rows, laid end to end, into blocks of exactly `size` tokens."""
    num_blocks = int(lengths_of(spans).sum()) // size
    borders = np.arange(num_blocks + 1) * size
    pieces, begins = split_at(spans, borders)
    first = np.searchsorted(begins, borders)
    return Packed(pieces[: first[-1]], np.diff(first), pieces[first[-1] :])


def one_each(spans: np.ndarray, size: int) -> Packed:
    """Every row in a block of its own, and one longer than `size` in as many as it needs.

    No row ends in a piece of a single token, which nothing would predict, but in blocks of 2: 9 tokens in blocks of 4
    are 4, 3 and 2.
    """
    count = -(-lengths_of(spans) // size)
    owner = np.repeat(np.arange(len(spans)), count)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    begin = spans[owner, 0] + nth * size
    end = np.minimum(begin + size, spans[owner, 1])
    if size > 2:
        single = np.flatnonzero((end - begin == 1) & (nth > 0))
        begin[single] -= 1
        end[single - 1] -= 1
    pieces = np.stack([begin, end], axis=1)
    return Packed(pieces, np.ones(len(pieces), np.int64), NO_SPANS)


def fit(spans: np.ndarray, size: int, fill: bool) -> Packed:
    """Put rows into blocks of at most `size` tokens by best fit; none that one block can hold is cut.

    A longer row gives whole blocks from its beginning and a rest, which is packed like a row. With `fill`, the room
    that is left in blocks is filled with pieces of those whole blocks, as long as there are any, so that nearly all
    blocks have exactly `size` tokens.
    """
    is_long = lengths_of(spans) > size
    parts = one_each(spans[is_long], size).spans
    is_whole = lengths_of(parts) == size
    whole, rests = parts[is_whole], np.concatenate([spans[~is_long], parts[~is_whole]])
    bin_of = best_fit(lengths_of(rests), size)
    num_bins = int(bin_of.max(initial=-1)) + 1
    room = size - np.bincount(bin_of, lengths_of(rests), num_bins).astype(np.int64)
    num_fillers = min(-(-int(room.sum()) // size), len(whole)) if fill else 0
    fillers, whole = whole[len(whole) - num_fillers :], whole[: len(whole) - num_fillers]
    room_ends = np.cumsum(room)
    pieces, begins = split_at(fillers, room_ends)
    target = np.searchsorted(room_ends, begins, side="right")  # the bin whose room a piece fills
    left = target == num_bins

    block_of = np.concatenate([bin_of, target[~left], num_bins + np.arange(len(whole))])
    order = np.argsort(block_of, kind="stable")
    packed = np.concatenate([rests, pieces[~left], whole])[order]
    return Packed(packed, np.bincount(block_of, minlength=num_bins + len(whole)), pieces[left])


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Put rows into as few bins of `capacity` tokens as best-fit decreasing finds: long rows first, fullest bin first.

    The bin of each row:

    >>> best_fit(np.array([4, 3, 6, 5]), capacity=9).tolist()
    [1, 0, 0, 1]
    """
    assert not len(lengths) or lengths.max() <= capacity, (lengths.max(), capacity)
    bin_of = np.empty(len(lengths), np.int64)
    num_bins = 0
    bins_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms: list[int] = []  # those of which there are bins, sorted
    order = np.argsort(-lengths, kind="stable")
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            number, room = num_bins, capacity
            num_bins += 1
        else:
            room = rooms[at]
            number = bins_by_room[room].pop()
            if not bins_by_room[room]:
                del rooms[at]
        bin_of[row] = number
        left = room - length
        if left:
            if not bins_by_room[left]:
                insort(rooms, left)
            bins_by_room[left].append(number)
    return bin_of
