"""mini_qwen/ledger.py: it adds up or the run stops, and says so in words."""

import json
import re
from collections import Counter
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_qwen.ledger import Ledger

COUNTS = st.integers(0, 10**9)
REASONS = st.dictionaries(st.sampled_from(["empty text", "no answer", "malformed turn"]), st.integers(1, 10**6)).map(
    Counter
)
SOURCES = st.dictionaries(st.sampled_from(["data/web", "data/books"]), st.integers(1, 10**9)).map(Counter)
PLACES = st.dictionaries(st.sampled_from(["empty text", "no answer"]), st.sampled_from(["a, row 0", "b, row 7"]))


@st.composite
def ledgers(draw: st.DrawFn) -> Ledger:
    """Ledgers that add up."""
    kept, held_out, unused, joined, trained, masked, tokens_out, tokens_unused = (draw(COUNTS) for _ in range(8))
    alike, tokens_alike = draw(COUNTS), draw(COUNTS)
    rows_dropped, tokens_dropped = draw(REASONS), draw(REASONS)
    rows = kept + held_out + alike + unused + joined + rows_dropped.total()
    tokens = trained + masked + tokens_out + tokens_alike + tokens_unused + tokens_dropped.total()
    split_off, repeated = draw(st.integers(0, rows)), draw(st.integers(0, tokens))
    blocks = draw(st.integers(0, 9))
    return Ledger(
        files=draw(COUNTS),
        files_without_rows=draw(st.integers(0, 2)),
        rows_read=rows - split_off,
        rows_split_off=split_off,
        rows_kept=kept,
        rows_held_out=held_out,
        rows_like_held_out=alike,
        rows_unused=unused,
        rows_joined=joined,
        rows_dropped=rows_dropped,
        rows_shortened=draw(st.integers(0, kept)),
        rows_with_control_text=draw(st.integers(0, 2)),
        rows_cut=draw(st.integers(0, kept)),
        short_rows_cut=draw(COUNTS),
        tokens_read=tokens - repeated,
        tokens_repeated=repeated,
        tokens_trained=trained,
        tokens_masked=masked,
        tokens_held_out=tokens_out,
        tokens_like_held_out=tokens_alike,
        tokens_unused=tokens_unused,
        tokens_dropped=tokens_dropped,
        blocks=blocks if trained else 0,
        tokens_padding=draw(COUNTS),
        tokens_by_source=draw(SOURCES),
        first_places=draw(PLACES),
    )


def full() -> Ledger:
    """Of every kind of count some."""
    return Ledger(
        files=2,
        files_without_rows=1,
        rows_read=1000,
        rows_split_off=25,
        rows_kept=936,
        rows_like_held_out=4,
        rows_held_out=10,
        rows_unused=20,
        rows_joined=5,
        rows_shortened=7,
        rows_with_control_text=3,
        rows_dropped=Counter({"no answer": 20, "malformed turn": 30}),
        rows_cut=12,
        short_rows_cut=4,
        tokens_read=10_000,
        tokens_repeated=800,
        tokens_trained=4_000,
        tokens_like_held_out=40,
        tokens_masked=5_500,
        tokens_held_out=100,
        tokens_unused=660,
        tokens_dropped=Counter({"shortened": 500}),
        blocks=10,
        tokens_padding=500,
        tokens_by_source=Counter({"data/web": 7_125, "data/books": 2_375}),
        first_places={"no answer": "data/web/a.jsonl, row 3", "malformed turn": "data/web/b.jsonl, row 0"},
    )


def test_what_adds_up_passes() -> None:
    full().check(max_drop_share=0.05)


@given(ledgers())
def test_everything_is_in_one_of_the_two_sums(ledger: Ledger) -> None:
    if ledger.rows_kept:
        ledger.check(max_drop_share=1.0)


ADDED = ["rows_read", "rows_split_off", "rows_kept", "rows_held_out", "rows_unused", "rows_joined"]
ADDED += ["tokens_read", "tokens_repeated", "tokens_trained", "tokens_masked", "tokens_held_out", "tokens_unused"]
ADDED += ["rows_like_held_out", "tokens_like_held_out"]


@pytest.mark.parametrize("key", ADDED)
@pytest.mark.parametrize("by", [-1, 1])
def test_a_count_that_is_off_is_our_own_mistake(key: str, by: int) -> None:
    ledger = full()
    setattr(ledger, key, getattr(ledger, key) + by)
    with pytest.raises(AssertionError):
        ledger.check(max_drop_share=1.0)


@pytest.mark.parametrize("key", ["rows_dropped", "tokens_dropped"])
def test_a_drop_that_is_off_is_our_own_mistake(key: str) -> None:
    ledger = full()
    getattr(ledger, key)["another reason"] += 1
    with pytest.raises(AssertionError):
        ledger.check(max_drop_share=1.0)


def test_more_dropped_than_allowed_stops_the_run_with_the_reasons_and_where_they_began() -> None:
    """The share is of all rows, those that huge documents were split into as well: 50 of 1,025 are 4.88%."""
    full().check(max_drop_share=0.0488)
    with pytest.raises(SystemExit) as error:
        full().check(max_drop_share=0.0487)
    for part in (
        "50 of 1,025 rows",
        "30 malformed turn (first: data/web/b.jsonl, row 0), 20 no answer (first: data/web/a.jsonl, row 3)",
        "max_drop_share",
    ):
        assert part in str(error.value)


def test_nothing_left_to_train_on_stops_the_run() -> None:
    ledger = Ledger(rows_read=3, rows_held_out=1)
    for number in range(2):
        ledger.drop("no answer", f"rows.jsonl, row {number}")
    with pytest.raises(SystemExit, match=r"of 3 read, dropped: 2 no answer \(first: rows\.jsonl, row 0\)"):
        ledger.check(max_drop_share=1.0)


def test_a_dropped_row_is_counted_with_its_tokens_and_its_first_place() -> None:
    ledger = Ledger(rows_read=4, rows_kept=1)
    ledger.drop("too long", "a, row 1", tokens=7)
    ledger.drop("too long", "a, row 2", tokens=5)
    ledger.drop("empty text", "a, row 3")
    assert ledger.rows_dropped == {"too long": 2, "empty text": 1}
    assert (ledger.tokens_read, ledger.tokens_dropped) == (12, {"too long": 12})
    assert ledger.first_places == {"too long": "a, row 1", "empty text": "a, row 3"}
    ledger.check(max_drop_share=1.0)


@given(ledgers(), ledgers())
def test_two_ledgers_together_are_the_sums_of_their_counts(first: Ledger, second: Ledger) -> None:
    total = Ledger()
    total.add(first)
    total.add(second)
    for name in (item.name for item in fields(Ledger) if item.name != "first_places"):
        assert getattr(total, name) == getattr(first, name) + getattr(second, name)
    assert total.first_places == {**second.first_places, **first.first_places}


def test_adding_leaves_the_added_ledger_alone() -> None:
    total, part = Ledger(), full()
    total.add(part)
    total.add(full())
    total.drop("no answer", "elsewhere")
    assert part == full()


@given(ledgers())
def test_any_ledger_survives_its_file(ledger: Ledger) -> None:
    again = Ledger.from_dict(json.loads(json.dumps(ledger.as_dict())))
    assert again == ledger
    again.rows_dropped["another reason"] += 1  # still a counter, and one of its own
    assert again.rows_dropped.total() == ledger.rows_dropped.total() + 1


@given(ledgers())
def test_the_summary_is_two_sums_that_are_right(ledger: Ledger) -> None:
    rows, tokens, *_ = ledger.summary().split("\n")
    row_sum = rows.partition(f" ({ledger.rows_shortened:,} shortened")[0]
    num_rows, num_tokens = ledger.rows_read + ledger.rows_split_off, ledger.tokens_read + ledger.tokens_repeated
    for line, total in ((row_sum.removeprefix("rows:"), num_rows), (tokens.removeprefix("tokens:"), num_tokens)):
        for side in line.split(" = "):
            assert sum(int(part.split()[0].replace(",", "")) for part in side.split(" + ") if part.strip()) == total
    assert f"{ledger.rows_shortened:,} shortened" in rows
    assert f"from {ledger.files} files" in rows
    for line, reasons in ((rows, ledger.rows_dropped), (tokens, ledger.tokens_dropped)):
        for reason, count in reasons.items():
            assert f"{count:,} dropped ({reason})" in line


def test_the_summary_of_a_full_ledger() -> None:
    assert full().summary().split("\n") == [
        "rows:   1,000 read + 25 split off = 936 kept + 10 held out + 4 like held out + 20 unused + 5 joined + "
        "20 dropped (no answer) + "
        "30 dropped (malformed turn) (7 shortened, 3 spell a control token, 1 files without rows), "
        "from 2 files",
        "tokens: 10,000 read + 800 repeated = 4,000 trained + 5,500 masked + 100 held out + "
        "40 like held out + 660 unused + 500 dropped (shortened)",
        "blocks: 10, 5.00% padding; 12 rows in more than one block, 4 of them no longer than one",
        "source: data/web 7,125 (75.0%), data/books 2,375 (25.0%)",
    ]


def test_sources_of_which_nothing_is_taken_have_no_share() -> None:
    summary = Ledger(tokens_by_source=Counter({"data/web": 0, "data/books": 0})).summary()
    assert summary.endswith("source: data/web 0 (0.0%), data/books 0 (0.0%)")


def test_the_summary_leaves_out_what_there_is_none_of() -> None:
    ledger = Ledger(files=1, rows_read=2, rows_kept=2, tokens_read=5, tokens_trained=5)
    ledger.tokens_by_source["data"] += 5
    assert ledger.summary().split("\n") == [
        "rows:   2 read = 2 kept (0 shortened), from 1 files",
        "tokens: 5 read = 5 trained",
    ]
    assert not re.search(r"held|unused|joined|repeated|blocks|source", ledger.summary())
