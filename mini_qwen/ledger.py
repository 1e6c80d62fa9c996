"""The ledger: what became of every row and every token that was read. It adds up, or the run stops."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Ledger:
    """Counts of one preparation.

    rows_read = rows_kept + held_out + dropped rows; `rows_shortened` counts kept rows that lost a part.
    tokens_read = tokens_trained + tokens_masked + dropped tokens. A masked token is seen by the model but not scored
    (questions, the template, the first token of a document). Rows that are dropped before they are tokenised add no
    tokens.
    """

    files: int = 0
    rows_read: int = 0
    rows_kept: int = 0
    rows_held_out: int = 0
    rows_shortened: int = 0
    rows_dropped: Counter[str] = field(default_factory=Counter)
    tokens_read: int = 0
    tokens_trained: int = 0
    tokens_masked: int = 0
    tokens_dropped: Counter[str] = field(default_factory=Counter)

    def check(self, max_drop_share: float) -> None:
        """Raises SystemExit when nothing is left or more than `max_drop_share` of the rows were dropped."""
        dropped = self.rows_dropped.total()
        assert self.rows_read == self.rows_kept + self.rows_held_out + dropped, self
        assert self.tokens_read == self.tokens_trained + self.tokens_masked + self.tokens_dropped.total(), self
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.rows_dropped.most_common()) or "none"
        if not self.rows_kept:
            raise SystemExit(f"No row is left to train on: of {self.rows_read:,} rows read, dropped: {reasons}.")
        if dropped > max_drop_share * self.rows_read:
            raise SystemExit(
                f"{dropped:,} of {self.rows_read:,} rows were dropped ({reasons}), more than the share of "
                f"{max_drop_share:.0%} that max_drop_share allows. Clean the data, raise max_length if rows are too "
                "long, or raise max_drop_share if this is meant."
            )

    def as_dict(self) -> dict[str, Any]:
        return {key: dict(value) if isinstance(value, Counter) else value for key, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Ledger":
        counters = {key: Counter(values[key]) for key in ("rows_dropped", "tokens_dropped")}
        return cls(**{**values, **counters})

    def summary(self) -> str:
        """Two lines for the log."""

        def line(total: int, **parts: int) -> str:
            named = (f"{count:,} {name.replace('_', ' ')}" for name, count in parts.items())
            return f"{total:,} read = " + " + ".join(named)

        dropped_rows = {f"dropped ({reason})": count for reason, count in self.rows_dropped.items()}
        dropped_tokens = {f"dropped ({reason})": count for reason, count in self.tokens_dropped.items()}
        rows = line(self.rows_read, kept=self.rows_kept, held_out=self.rows_held_out, **dropped_rows)
        tokens = line(self.tokens_read, trained=self.tokens_trained, masked=self.tokens_masked, **dropped_tokens)
        shortened = f"{self.rows_shortened:,} of the kept shortened"
        return f"rows:   {rows} ({shortened}), from {self.files} files\ntokens: {tokens}"
