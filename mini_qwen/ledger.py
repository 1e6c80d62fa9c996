"""The ledger: what became of every row and every token that was read. It adds up, or the run stops."""

import json
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

SHORTENED = "shortened"  # reason under which tokens are dropped of rows that are kept


@dataclass
class Ledger:
    """Counts of one preparation.

        rows_read + rows_split_off
            = rows_kept + rows_held_out + rows_like_held_out + rows_unused + rows_joined + rows_dropped
        tokens_read + tokens_repeated
            = tokens_trained + tokens_masked + tokens_held_out + tokens_like_held_out + tokens_unused + tokens_dropped

    A masked token is seen by the model but not scored (questions, the template, the first token of a document). Rows
    whose text cannot be read, or whose turns are no turns, add no tokens. For a pair, tokens are those of both sides,
    each with its prompt.
    """

    files: int = 0
    files_without_rows: int = 0
    rows_read: int = 0
    rows_split_off: int = 0  # further rows that huge documents were split into
    rows_kept: int = 0
    rows_held_out: int = 0
    rows_like_held_out: int = 0  # not trained on, for a held-out row is the same
    rows_unused: int = 0  # left out by a mixture that takes less than all of their source
    rows_joined: int = 0  # rated answers that became the second side of a pair
    rows_dropped: Counter[str] = field(default_factory=Counter)
    rows_shortened: int = 0  # of those that are not dropped
    rows_with_control_text: int = 0  # of the read: their text spells a control token, and is tokenised as plain text
    rows_cut: int = 0  # of the kept: laid into more than one block
    short_rows_cut: int = 0  # of those, the ones that one block could have held
    tokens_read: int = 0
    tokens_repeated: int = 0  # by a mixture that takes a source more than once
    tokens_trained: int = 0
    tokens_masked: int = 0
    tokens_held_out: int = 0
    tokens_like_held_out: int = 0
    tokens_unused: int = 0
    tokens_dropped: Counter[str] = field(default_factory=Counter)
    blocks: int = 0
    tokens_padding: int = 0  # room in the blocks that no token fills
    tokens_by_source: Counter[str] = field(default_factory=Counter)  # trained and masked
    test_rows_read: int = 0  # of pairs that are only scored
    test_rows_dropped: Counter[str] = field(default_factory=Counter)
    first_places: dict[str, str] = field(default_factory=dict)  # of each reason for dropping, the first row

    def drop(self, reason: str, place: str, tokens: int = 0) -> None:
        """Count a row that is left out, with the tokens it would have had."""
        self.rows_dropped[reason] += 1
        self.first_places.setdefault(reason, place)
        if tokens:
            self.tokens_read += tokens
            self.tokens_dropped[reason] += tokens

    def keep(self, tokens: int, shortened_by: int) -> None:
        """Count a row that is kept, with the tokens it had and those that it lost."""
        self.rows_kept += 1
        self.tokens_read += tokens
        if shortened_by:
            self.rows_shortened += 1
            self.tokens_dropped[SHORTENED] += shortened_by

    def add(self, other: "Ledger") -> None:
        """Take over the counts of rows that come after those of this ledger."""
        self.first_places = other.first_places | self.first_places
        for name in (item.name for item in fields(self) if item.name != "first_places"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def check(self, max_drop_share: float) -> None:
        """Make sure that rows and tokens add up, and `check_drops`."""
        dropped, rows = self.rows_dropped.total(), self.rows_read + self.rows_split_off
        left_out = self.rows_held_out + self.rows_like_held_out + self.rows_unused
        assert rows == self.rows_kept + left_out + self.rows_joined + dropped, self
        unlearnt = self.tokens_held_out + self.tokens_like_held_out + self.tokens_unused + self.tokens_dropped.total()
        assert self.tokens_read + self.tokens_repeated == self.tokens_trained + self.tokens_masked + unlearnt, self
        self.check_drops(max_drop_share)

    def check_drops(self, max_drop_share: float) -> None:
        """Raises SystemExit when nothing is left or more than `max_drop_share` of the rows were dropped."""
        dropped, rows = self.rows_dropped.total(), self.rows_read + self.rows_split_off
        reasons = ", ".join(
            f"{count:,} {reason} (first: {self.first_places.get(reason, 'unknown')})"
            for reason, count in self.rows_dropped.most_common()
        )
        if not self.rows_kept:
            why = f"of {self.rows_read:,} read, dropped: {reasons or 'none'}"
            why += f"; {self.rows_like_held_out:,} are the same as held-out ones" * bool(self.rows_like_held_out)
            if not self.rows_read:
                why = f"the files, {self.files:,} in all, have none"
            raise SystemExit(
                f"No row is left to train on: {why}. Correct the data, or name other files in train_files."
            )
        if dropped > max_drop_share * rows:
            raise SystemExit(
                f"{dropped:,} of {rows:,} rows were dropped: {reasons}. That is more than the share of "
                f"{max_drop_share:.0%} that max_drop_share allows. Clean the data, raise max_length if rows are too "
                "long, or raise max_drop_share if this is meant."
            )

    def as_dict(self) -> dict[str, Any]:
        return {key: dict(value) if isinstance(value, Counter) else value for key, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Ledger":
        counters = {
            key: Counter(values[key])
            for key in ("rows_dropped", "tokens_dropped", "tokens_by_source", "test_rows_dropped")
        }
        return cls(**(values | counters))

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: Path) -> "Ledger":
        return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))

    def summary(self) -> str:
        """A few lines for the log; counts that are 0 and need no mention are left out."""

        def terms(stem: str, names: str, dropped: Counter[str]) -> str:
            counts = {name: getattr(self, f"{stem}_{name}") for name in names.split()}
            named = [
                f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items() if count or name == "kept"
            ]
            return " + ".join([*named, *(f"{count:,} dropped ({reason})" for reason, count in dropped.items())])

        def read(stem: str, extra: str) -> str:
            more = getattr(self, f"{stem}_{extra}")
            return f"{getattr(self, f'{stem}_read'):,} read" + (f" + {more:,} {extra.replace('_', ' ')}" * bool(more))

        notes = [
            f"{self.rows_shortened:,} shortened",
            f"{self.rows_with_control_text:,} spell a control token" * bool(self.rows_with_control_text),
            f"{self.files_without_rows:,} files without rows" * bool(self.files_without_rows),
        ]
        rows = terms("rows", "kept held_out like_held_out unused joined", self.rows_dropped)
        tokens = terms("tokens", "trained masked held_out like_held_out unused", self.tokens_dropped)
        remarks = ", ".join(filter(None, notes))
        lines = [
            f"rows:   {read('rows', 'split_off')} = {rows} ({remarks}), from {self.files} files",
            f"tokens: {read('tokens', 'repeated')} = {tokens}",
        ]
        if self.test_rows_read:
            test = "".join(f", {count:,} dropped ({reason})" for reason, count in self.test_rows_dropped.items())
            lines.append(f"test:   {self.test_rows_read:,} rows read{test}")
        if self.blocks:
            filled = self.tokens_trained + self.tokens_masked
            lines.append(
                f"blocks: {self.blocks:,}, {self.tokens_padding / (filled + self.tokens_padding):.2%} padding; "
                f"{self.rows_cut:,} rows in more than one block, {self.short_rows_cut:,} of them no longer than one"
            )
        if len(self.tokens_by_source) > 1:
            total = self.tokens_by_source.total() or 1
            shares = (f"{name} {count:,} ({count / total:.1%})" for name, count in self.tokens_by_source.items())
            lines.append("source: " + ", ".join(shares))
        return "\n".join(lines)
