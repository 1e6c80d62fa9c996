"""mini_qwen/ledger.py: it adds up or the run stops, and says so in words."""

import json
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_qwen.ledger import Ledger

COUNTS = st.integers(0, 10**9)
REASONS = st.dictionaries(st.sampled_from(["empty text", "no answer", "malformed turn"]), st.integers(1, 10**6)).map(
    Counter
)


@st.composite
def ledgers(draw: st.DrawFn) -> Ledger:
    """Ledgers that add up."""
    kept, held_out, trained, masked = (draw(COUNTS) for _ in range(4))
    rows_dropped, tokens_dropped = draw(REASONS), draw(REASONS)
    return Ledger(
        files=draw(COUNTS),
        rows_read=kept + held_out + rows_dropped.total(),
        rows_kept=kept,
        rows_held_out=held_out,
        rows_shortened=draw(st.integers(0, kept)),
        rows_dropped=rows_dropped,
        tokens_read=trained + masked + tokens_dropped.total(),
        tokens_trained=trained,
        tokens_masked=masked,
        tokens_dropped=tokens_dropped,
    )


def full() -> Ledger:
    return Ledger(
        files=2,
        rows_read=1000,
        rows_kept=940,
        rows_held_out=10,
        rows_shortened=7,
        rows_dropped=Counter({"no answer": 20, "malformed turn": 30}),
        tokens_read=10_000,
        tokens_trained=4_000,
        tokens_masked=5_500,
        tokens_dropped=Counter({"shortened to max_length": 500}),
    )


def test_what_adds_up_passes() -> None:
    full().check(max_drop_share=0.05)


@pytest.mark.parametrize("key", ["rows_read", "rows_kept", "rows_held_out"])
@pytest.mark.parametrize("by", [-1, 1])
def test_rows_that_do_not_add_up_are_our_own_mistake(key: str, by: int) -> None:
    ledger = full()
    setattr(ledger, key, getattr(ledger, key) + by)
    with pytest.raises(AssertionError):
        ledger.check(max_drop_share=1.0)


@pytest.mark.parametrize("key", ["tokens_read", "tokens_trained", "tokens_masked"])
@pytest.mark.parametrize("by", [-1, 1])
def test_tokens_that_do_not_add_up_are_our_own_mistake(key: str, by: int) -> None:
    ledger = full()
    setattr(ledger, key, getattr(ledger, key) + by)
    with pytest.raises(AssertionError):
        ledger.check(max_drop_share=1.0)


def test_more_dropped_than_allowed_stops_the_run_with_the_reasons() -> None:
    with pytest.raises(SystemExit) as error:
        full().check(max_drop_share=0.0499)
    for part in ("50 of 1,000 rows", "30 malformed turn, 20 no answer", "max_drop_share"):
        assert part in str(error.value)


def test_nothing_left_to_train_on_stops_the_run() -> None:
    ledger = Ledger(rows_read=3, rows_held_out=1, rows_dropped=Counter({"no answer": 2}))
    with pytest.raises(SystemExit, match="3 rows read.*2 no answer"):
        ledger.check(max_drop_share=1.0)


@given(ledgers())
def test_any_ledger_survives_its_file(ledger: Ledger) -> None:
    again = Ledger.from_dict(json.loads(json.dumps(ledger.as_dict())))
    assert again == ledger
    again.rows_dropped["another reason"] += 1  # still a counter
    assert again.rows_dropped.total() == ledger.rows_dropped.total() + 1


@given(ledgers())
def test_the_summary_is_two_sums_that_are_right(ledger: Ledger) -> None:
    rows, tokens = ledger.summary().split("\n")
    row_sum = rows.partition(f" ({ledger.rows_shortened:,} of the kept")[0]
    for line, total in ((row_sum, ledger.rows_read), (tokens, ledger.tokens_read)):
        whole, _, parts = line.partition(" = ")
        assert int(re.sub(r"[^\d]", "", whole)) == total
        assert sum(int(part.split()[0].replace(",", "")) for part in parts.split(" + ")) == total
    assert f"{ledger.rows_shortened:,} of the kept shortened" in rows
    assert f"from {ledger.files} files" in rows
    for line, reasons in ((rows, ledger.rows_dropped), (tokens, ledger.tokens_dropped)):
        for reason, count in reasons.items():
            assert f"{count:,} dropped ({reason})" in line
