"""mini_qwen/packing.py: nothing lost, nothing doubled, and no row cut that need not be."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_qwen.packing import NO_SPANS, Packed, best_fit, cut, fit, lengths_of, one_each, split_at

PACKERS = {"cut": cut, "fit": partial(fit, fill=False), "fill": partial(fit, fill=True), "one_each": one_each}
# Rows are stretches of a store, with gaps where other rows lie: each is (tokens before it, tokens).
ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), max_size=20)
SIZES = st.integers(1, 12)


def spans_of(rows: list[tuple[int, int]]) -> np.ndarray:
    at, spans = 0, []
    for gap, length in rows:
        spans.append((at + gap, at + gap + length))
        at += gap + length
    return np.array(spans, np.int64).reshape(-1, 2)


def blocks_of(packed: Packed) -> list[np.ndarray]:
    assert packed.num_spans.sum() == len(packed.spans)
    return np.split(packed.spans, np.cumsum(packed.num_spans)[:-1]) if len(packed.num_spans) else []


def block_sizes(packed: Packed) -> list[int]:
    return [int(lengths_of(spans).sum()) for spans in blocks_of(packed)]


def tokens_in(spans: np.ndarray) -> list[int]:
    return [token for start, end in spans.tolist() for token in range(start, end)]


@pytest.mark.parametrize("packer", PACKERS)
@settings(max_examples=150)
@given(rows=ROWS, times=st.integers(1, 3), size=SIZES)
def test_every_token_is_in_one_block_or_the_rest_as_often_as_given(
    packer: str, rows: list[tuple[int, int]], times: int, size: int
) -> None:
    """A row may be given more than once, by a mixture that takes its source more than once."""
    spans = np.repeat(spans_of(rows), times, axis=0)
    packed = PACKERS[packer](spans, size)
    assert packed.spans.dtype == packed.rest.dtype == packed.num_spans.dtype == np.int64
    assert sorted(tokens_in(packed.spans) + tokens_in(packed.rest)) == sorted(tokens_in(spans))
    assert (lengths_of(packed.spans) > 0).all()
    assert (packed.num_spans > 0).all()
    assert max(block_sizes(packed), default=0) <= size
    assert lengths_of(packed.rest).sum() < size


@pytest.mark.parametrize("packer", PACKERS)
@settings(max_examples=80)
@given(rows=ROWS, size=SIZES)
def test_a_span_is_a_stretch_of_one_row(packer: str, rows: list[tuple[int, int]], size: int) -> None:
    packed = PACKERS[packer](spans_of(rows), size)
    found = np.concatenate([packed.spans, packed.rest])
    owners = np.searchsorted(spans_of(rows)[:, 1], found[:, 0], side="right")
    assert (spans_of(rows)[owners, 0] <= found[:, 0]).all()
    assert (found[:, 1] <= spans_of(rows)[owners, 1]).all()


@settings(max_examples=80)
@given(rows=ROWS, size=SIZES)
def test_cut_keeps_the_order_and_fills_every_block(rows: list[tuple[int, int]], size: int) -> None:
    packed = cut(spans_of(rows), size)
    assert set(block_sizes(packed)) <= {size}
    assert tokens_in(packed.spans) + tokens_in(packed.rest) == tokens_in(spans_of(rows))


@settings(max_examples=80)
@given(rows=ROWS, size=SIZES)
def test_one_each_has_a_row_to_a_block_and_only_the_last_of_a_row_is_short(
    rows: list[tuple[int, int]], size: int
) -> None:
    packed = one_each(spans_of(rows), size)
    assert packed.rest.tolist() == []
    assert packed.num_spans.tolist() == [1] * len(packed.spans)
    assert tokens_in(packed.spans) == tokens_in(spans_of(rows))
    ends = set(spans_of(rows)[:, 1].tolist())
    last_but_one = {end - 2 for end in ends}  # a token shorter, so that the last has two
    assert all(end - start == size or end in ends | last_but_one for start, end in packed.spans.tolist())
    singles = sum(length == 1 for _, length in rows)
    assert size <= 2 or sum(end - start == 1 for start, end in packed.spans.tolist()) == singles
    assert len(packed.spans) == sum(-(-length // size) for _, length in rows)


@pytest.mark.parametrize("fill", [False, True])
@settings(max_examples=150)
@given(rows=ROWS, size=SIZES)
def test_fit_cuts_no_row_that_one_block_can_hold(rows: list[tuple[int, int]], size: int, fill: bool) -> None:
    spans = spans_of(rows)
    packed = fit(spans, size, fill)
    whole = {(start, end) for start, end in spans.tolist() if end - start <= size}
    assert whole <= set(map(tuple, packed.spans.tolist()))


@settings(max_examples=80)
@given(rows=ROWS, size=SIZES)
def test_fit_without_filling_cuts_long_rows_once_in_a_block_length_and_leaves_nothing(
    rows: list[tuple[int, int]], size: int
) -> None:
    packed = fit(spans_of(rows), size, fill=False)
    assert packed.rest.tolist() == []
    expected = [list(span) for span in one_each(spans_of(rows), size).spans.tolist()]
    assert sorted(packed.spans.tolist()) == expected


@settings(max_examples=150)
@given(rows=ROWS, size=SIZES)
def test_filled_blocks_are_full_as_long_as_there_are_long_rows_to_fill_them_with(
    rows: list[tuple[int, int]], size: int
) -> None:
    spans = spans_of(rows)
    unfilled, filled = fit(spans, size, fill=False), fit(spans, size, fill=True)
    room = sum(size - length for length in block_sizes(unfilled))
    lengths = lengths_of(spans)
    whole = lengths // size - ((lengths % size == 1) & (size > 2))  # the last gives a token to a rest of one
    available = int((whole[lengths > size] * size).sum())
    padding = sum(size - length for length in block_sizes(filled))
    assert padding == max(0, room - available)
    assert len(filled.rest) == 0 or padding == 0
    assert len(filled.num_spans) <= len(unfilled.num_spans)


def test_rows_and_their_blocks_by_hand() -> None:
    """Rows of 3, 9 and 2 tokens in blocks of 4: the long one is cut into 4 + 3 + 2, and the 4 fills what is left."""
    spans = np.array([[0, 3], [10, 19], [20, 22]])
    assert [block.tolist() for block in blocks_of(cut(spans, 4))] == [
        [[0, 3], [10, 11]],
        [[11, 15]],
        [[15, 19]],
    ]
    assert cut(spans, 4).rest.tolist() == [[20, 22]]
    assert [block.tolist() for block in blocks_of(fit(spans, 4, fill=False))] == [
        [[0, 3]],
        [[14, 17]],
        [[20, 22], [17, 19]],
        [[10, 14]],
    ]
    assert [block.tolist() for block in blocks_of(fit(spans, 4, fill=True))] == [
        [[0, 3], [10, 11]],
        [[14, 17], [11, 12]],
        [[20, 22], [17, 19]],
    ]
    assert fit(spans, 4, fill=True).rest.tolist() == [[12, 14]]


@pytest.mark.parametrize("packer", PACKERS)
def test_nothing_makes_no_blocks(packer: str) -> None:
    packed = PACKERS[packer](NO_SPANS, 8)
    assert (len(packed.spans), len(packed.num_spans), len(packed.rest)) == (0, 0, 0)


@settings(max_examples=80)
@given(rows=ROWS, cuts=st.sets(st.integers(0, 100), max_size=8))
def test_split_pieces_begin_where_a_row_begins_or_a_cut_is(rows: list[tuple[int, int]], cuts: set[int]) -> None:
    spans = spans_of(rows)
    pieces, begins = split_at(spans, np.array(sorted(cuts), np.int64))
    assert tokens_in(pieces) == tokens_in(spans)
    total = sum(length for _, length in rows)
    row_begins = {sum(length for _, length in rows[:number]) for number in range(len(rows))}
    assert begins.tolist() == sorted(row_begins | {at for at in cuts if at < total})
    assert lengths_of(pieces).tolist() == np.diff([*begins.tolist(), total]).tolist()


@settings(max_examples=200)
@given(st.data())
def test_best_fit_fills_bins_of_which_no_two_could_be_one(data: st.DataObject) -> None:
    """A bin is opened only for a row that fits into none before it, so any two hold more than one could."""
    capacity = data.draw(st.integers(1, 40))
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=40))
    bin_of = best_fit(np.array(lengths, dtype=np.int64), capacity)
    assert len(bin_of) == len(lengths)
    assert sorted(set(bin_of.tolist())) == list(range(len(set(bin_of.tolist()))))
    filled = sorted(np.bincount(bin_of, lengths).tolist())
    assert all(total <= capacity for total in filled)
    assert len(filled) < 2 or filled[0] + filled[1] > capacity


def plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The same, the plain way: long rows first, each into the fullest bin with room, the last of the fullest."""
    rooms: list[int] = []
    bin_of = [0] * len(lengths)
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        able = [room for room in rooms if room >= lengths[row]]
        if not able:
            rooms.append(capacity)
            able = [capacity]
        bin_of[row] = rooms.index(min(able))
        rooms[bin_of[row]] -= lengths[row]
    return bin_of


@settings(max_examples=150)
@given(lengths=st.lists(st.integers(1, 20), max_size=40))
def test_best_fit_is_as_tight_as_looking_at_every_bin(lengths: list[int]) -> None:
    fast, plain = best_fit(np.array(lengths, np.int64), 20), plain_best_fit(lengths, 20)
    assert sorted(np.bincount(fast, lengths).tolist()) == sorted(np.bincount(plain, lengths).tolist())


def fewest_bins(lengths: list[int], capacity: int) -> int:
    """By trying every way; for a few rows only."""

    def place(row: int, bins: list[int]) -> int:
        if row == len(lengths):
            return len(bins)
        tries = [
            place(row + 1, [*bins[:at], used + lengths[row], *bins[at + 1 :]])
            for at, used in enumerate(bins)
            if used + lengths[row] <= capacity
        ]
        return min([*tries, place(row + 1, [*bins, lengths[row]])])

    return place(0, [])


@settings(max_examples=80)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_best_fit_needs_at_most_half_again_the_fewest_bins(lengths: list[int]) -> None:
    """The bound of best-fit decreasing: Simchi-Levi, New worst-case results for the bin-packing problem, 1994."""
    num_bins = int(best_fit(np.array(lengths), 12).max()) + 1
    assert 2 * num_bins <= 3 * fewest_bins(lengths, 12)


def test_a_row_longer_than_a_bin_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="6.*5"):
        best_fit(np.array([3, 6]), capacity=5)
