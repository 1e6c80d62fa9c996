"""mini_qwen/store.py: rows come back as written, however often the writing was broken off."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_qwen.store import STATE, StoreWriter, TokenStore

Tokens = list[tuple[int, bool]]  # of one row: each token and whether it is to be learnt
Part = tuple[list[Tokens], bool]  # the rows of one folder, and whether it has flags
TOKENS = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.booleans()), min_size=1, max_size=8)
ROWS = st.lists(TOKENS, max_size=8)
PARTS = st.lists(st.tuples(ROWS, st.booleans()), min_size=1, max_size=4)


def add(writer: StoreWriter, rows: list[Tokens], flags: bool) -> None:
    trained = [np.array([flag for _, flag in row], bool) for row in rows]
    writer.add([np.array([token for token, _ in row], np.uint32) for row in rows], trained if flags else None)


def write(parent: Path, parts: list[Part]) -> TokenStore:
    folders = [parent / "new" / f"part {number}" for number in range(len(parts))]
    for folder, (rows, flags) in zip(folders, parts, strict=True):
        writer = StoreWriter(folder, flags)
        add(writer, rows[:3], flags)
        add(writer, rows[3:], flags)
        writer.close()
    return TokenStore(folders)


def stretches(parts: list[Part]) -> np.ndarray:
    """Some stretches of every row: whole, without its first token, without its last."""
    at, spans = 0, []
    for row in (row for rows, _ in parts for row in rows):
        spans += [(at, at + len(row)), (at + 1, at + len(row)), (at, at + len(row) - 1)]
        at += len(row)
    return np.array([span for span in spans if span[0] < span[1]], np.int64).reshape(-1, 2)


@settings(max_examples=80)
@given(parts=PARTS)
def test_rows_of_several_folders_come_back_as_one(parts: list[Part]) -> None:
    with tempfile.TemporaryDirectory() as parent:
        opened = write(Path(parent), parts)
        rows = [[token for token, _ in row] for rows, _ in parts for row in rows]
        ends = np.cumsum([0, *map(len, rows)])
        assert (len(opened), opened.num_tokens) == (len(rows), ends[-1])
        assert opened.row_offsets.tolist() == np.cumsum([0, *(len(rows) for rows, _ in parts)]).tolist()
        spans = opened.spans(np.arange(len(rows)))
        assert spans.tolist() == np.stack([ends[:-1], ends[1:]], axis=1).tolist()
        assert [opened.row(index).tolist() for index in range(len(rows))] == rows


@settings(max_examples=40)
@given(parts=PARTS, data=st.data())
def test_spans_of_rows_in_any_order_and_more_than_once(parts: list[Part], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as parent:
        opened = write(Path(parent), parts)
        asked = data.draw(st.lists(st.integers(0, len(opened) - 1), max_size=6)) if len(opened) else []
        every = opened.spans(np.arange(len(opened))).tolist()
        assert opened.spans(np.array(asked, np.int64)).tolist() == [every[row] for row in asked]


@settings(max_examples=80)
@given(parts=PARTS)
def test_any_stretch_knows_its_tokens_flags_folder_and_row(parts: list[Part]) -> None:
    tokens = [pair for rows, _ in parts for row in rows for pair in row]
    rows = [(number, flags, row) for number, (rows, flags) in enumerate(parts) for row in rows]
    # Of every token: its folder, whether that has flags, the length of its row, and whether it begins the row.
    facts = [(number, flags, len(row), at == 0) for number, flags, row in rows for at in range(len(row))]
    with tempfile.TemporaryDirectory() as parent:
        opened = write(Path(parent), parts)
        spans = stretches(parts)
        expected = [facts[start] for start in spans[:, 0].tolist()]
        assert opened.parts_of(spans[:, 0]).tolist() == [number for number, *_ in expected]
        lengths, begins = opened.rows_of(spans)
        assert lengths.tolist() == [length for _, _, length, _ in expected]
        assert begins.tolist() == [first for *_, first in expected]
        all_flags = iter(opened.flags_of(spans))
        for (start, end), (_, flagged, *_) in zip(spans.tolist(), expected, strict=True):
            ids, flags = opened.read(start, end)
            assert ids.tolist() == [token for token, _ in tokens[start:end]]
            assert (flags is not None) == flagged
            if flagged:
                assert flags.tolist() == next(all_flags).tolist() == [flag for _, flag in tokens[start:end]]
        assert next(all_flags, None) is None


def test_a_row_without_tokens_is_our_own_mistake(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="without tokens"):
        write(tmp_path, [([[(7, True)], []], False)])


def test_nothing_is_read_when_a_store_is_opened(tmp_path: Path) -> None:
    opened = write(tmp_path, [([[(7, True)] * 1000], True)])
    assert all(isinstance(values.base, np.memmap) for part in opened.parts for values in part.values())


BATCHES = st.lists(ROWS, max_size=4)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@settings(max_examples=80)
@given(
    committed=BATCHES,
    lost=BATCHES,
    resumed=BATCHES,
    flags=st.booleans(),
    torn=st.dictionaries(st.sampled_from(["ids", "starts", "trained"]), st.integers(0, 40)),
    half_a_state=st.booleans(),
)
def test_a_writer_goes_on_from_the_last_commit_wherever_it_was_killed(
    committed: list[list[Tokens]],
    lost: list[list[Tokens]],
    resumed: list[list[Tokens]],
    flags: bool,
    torn: dict[str, int],
    half_a_state: bool,
) -> None:
    """Of what was added after the commit, any number of bytes of each file may have reached the disk."""
    with tempfile.TemporaryDirectory() as parent:
        broken, whole = Path(parent) / "broken", Path(parent) / "whole"
        first = StoreWriter(broken, flags)
        assert first.state == {}
        for number, rows in enumerate(committed):
            add(first, rows, flags)
            first.commit(num_batches=number + 1)
        sizes = first.state.get("sizes", {})
        for rows in lost:
            add(first, rows, flags)
        for name, stream in first.streams.items():
            stream.flush()
            stream.truncate(min(stream.tell(), sizes.get(name, 0) + torn.get(name, 0)))
            stream.close()
        if half_a_state:
            (broken / f"{STATE}.new").write_text('{"num_ba', encoding="utf-8")

        second, uninterrupted = StoreWriter(broken, flags), StoreWriter(whole, flags)
        assert second.state.get("num_batches", 0) == len(committed)
        for rows in resumed:
            add(second, rows, flags)
            second.commit(num_batches=0)
        for rows in [*committed, *resumed]:
            add(uninterrupted, rows, flags)
        second.close()
        uninterrupted.close()
        (broken / f"{STATE}.new").unlink(missing_ok=True)
        assert contents(broken) == contents(whole)
        assert STATE not in contents(whole)


@pytest.mark.parametrize("flags", [False, True])
def test_a_commit_is_on_disk_before_it_is_named(tmp_path: Path, flags: bool) -> None:
    """Whoever finds a state finds all the bytes that it speaks of."""
    writer = StoreWriter(tmp_path / "rows", flags)
    for number in range(5):
        add(writer, [[(number, True)] * 3000], flags)
        writer.commit(num_batches=number + 1)
        state = json.loads((tmp_path / "rows" / STATE).read_text(encoding="utf-8"))
        assert state["num_batches"] == number + 1
        assert state["sizes"]["ids"] == 4 * 3000 * (number + 1)
        for name, size in state["sizes"].items():
            assert (tmp_path / "rows" / name).stat().st_size == size
    assert ("trained" in state["sizes"]) == flags
