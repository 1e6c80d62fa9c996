"""Rows: the named columns of every row of a data file, each with its file and number, one after the other."""

import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from mini_qwen.files import DAMAGE, brief, check_content, describe_damage, kind, open_bytes, open_parquet

csv.field_size_limit(sys.maxsize)
JSON_READ_SIZE = 1 << 20  # characters
SEPARATORS = re.compile(r"[\s,]*")
Fields = dict[str, Any]
NOT_UTF8, NOT_JSON, NOT_FIELDS = "not valid UTF-8", "not valid JSON", "no object with named fields"


class Row(NamedTuple):
    file: Path
    number: int  # counted from 0 in its file
    values: Fields
    fault: str | None = None  # why the row cannot be read, if it cannot

    @property
    def place(self) -> str:
        return f"{self.file}, row {self.number}"

    def text(self, name: str) -> str:
        """What stands under `name`. Raises SystemExit for a row that cannot be read, and for what is no text."""
        if self.fault is not None:
            raise SystemExit(f"{self.place} cannot be read: {self.fault}. Correct this row, or take it out.")
        value = self.values.get(name)
        if not isinstance(value, str):
            raise SystemExit(f"{self.place}: '{name}' is {value!r}, but must be text.")
        if not value.isascii() and value.encode(errors="replace").decode() != value:
            raise SystemExit(f"{self.place}: '{name}' is {value[:40]!r}, which is not valid Unicode. Correct it.")
        return value


def read_rows(files: list[Path], columns: list[str] | None) -> Iterator[Row]:
    """Yield every row's values of those `columns` that its file has (None: all); others are never read.

    So it does not matter that `id` is a number in one file and a string in the next. A row that cannot be read comes
    with its fault and without values. Raises SystemExit for a file that cannot be read further.
    """
    for file in files:
        read = {".parquet": read_parquet, ".json": read_json, ".csv": read_csv}.get(kind(file), read_lines)
        rows = read(file, columns)
        number = 0
        while True:
            try:
                values = next(rows, None)
            except DAMAGE as error:
                what = describe_damage(file) if number == 0 else "damaged; fetch it again"
                raise SystemExit(
                    f"{file} cannot be read beyond row {number}: it is {what}. ({brief(error)})"
                ) from None
            if values is None:
                break
            yield Row(file, number, {}, values) if isinstance(values, str) else Row(file, number, values)
            number += 1


def read_parquet(file: Path, columns: list[str] | None) -> Iterator[Fields | str]:
    with open_parquet(file) as parquet:
        num_rows, layout = 0, parquet.metadata
        names = parquet.schema_arrow.names
        present = names if columns is None else [name for name in columns if name in names]
        for batch in parquet.iter_batches(batch_size=200, columns=present, use_threads=False):
            num_rows += len(batch)
            try:
                rows = batch.to_pylist()
            except (ValueError, OverflowError):
                yield from (read_record(batch.slice(index, 1)) for index in range(len(batch)))
            else:
                yield from rows
        in_groups = sum(layout.row_group(group).num_rows for group in range(layout.num_row_groups))
        for wanted in (layout.num_rows, in_groups):  # also none: a damaged file must not pass for an empty one
            if num_rows != wanted:
                raise SystemExit(f"{file} is damaged: it has {num_rows:,} rows, not {wanted:,}; fetch it again.")


def read_record(batch: pa.RecordBatch) -> Fields | str:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError:
        return NOT_UTF8
    except (ValueError, OverflowError):  # a date out of range, for one
        return "a value that cannot be read"


def read_lines(file: Path, columns: list[str] | None) -> Iterator[Fields | str]:
    """Of .jsonl an object a line, of .txt a document a line; blank lines are no rows."""
    with open_bytes(file) as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8-sig")
                yield {"text": text.rstrip("\r\n")} if kind(file) == ".txt" else choose(json.loads(text), columns)
            except UnicodeDecodeError:
                yield NOT_UTF8
            except (ValueError, RecursionError):  # also for a number of more than 4,300 digits
                yield NOT_JSON


def choose(record: Any, columns: list[str] | None) -> Fields | str:
    if not isinstance(record, dict):
        return NOT_FIELDS
    return record if columns is None else {name: record[name] for name in columns if name in record}


def read_csv(file: Path, columns: list[str] | None) -> Iterator[Fields | str]:
    with io.TextIOWrapper(open_bytes(file), encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        records = csv.DictReader(text, strict=True)
        try:
            for record in records:
                ragged = None in record or None in record.values()
                yield "more or fewer fields than the header" if ragged else choose(record, columns)
        except csv.Error as error:
            raise SystemExit(
                f"{file}, line {records.line_num + 1} is not valid csv: {error}. Correct this line."
            ) from None


def read_json(file: Path, columns: list[str] | None) -> Iterator[Fields | str]:
    """The objects of a list, or objects one after the other, without holding the file in memory.

    Raises SystemExit where the JSON breaks off: what comes after cannot be told apart.
    """
    decoder = json.JSONDecoder()
    with io.TextIOWrapper(open_bytes(file), encoding="utf-8-sig", errors="surrogateescape") as text:
        rest = ""
        while not rest and (more := text.read(JSON_READ_SIZE)):
            rest = more.lstrip()
        end_of_list = "]" if rest.startswith("[") else ""
        at, number = len(end_of_list), 0
        while True:
            at = SEPARATORS.match(rest, at).end()
            try:
                record, at = decoder.raw_decode(rest, at)
            except (ValueError, RecursionError) as error:
                # Doubling: a long object is not parsed many times.
                more = text.read(max(JSON_READ_SIZE, len(rest))) if breaks_off(error, rest) else ""
                rest, at = rest[at:] + more, 0
                if more:
                    continue
                if rest.strip() == end_of_list:
                    return
                raise SystemExit(
                    f"{file}, row {number} is not valid JSON ({brief(error)}): {rest[:40]!r}. Correct it, or fetch "
                    "the file again if it is cut off."
                ) from None
            yield choose(record, columns)
            number += 1


def breaks_off(error: Exception, text: str) -> bool:
    """Whether what follows on the text may mend the error: then it is at its end, or in a string that begins in it."""
    at_end = isinstance(error, json.JSONDecodeError) and error.pos > len(text.rstrip()) - len("\\ud83d\\ude42")
    return at_end or "Unterminated string" in str(error)


def check_columns(files: list[Path], choices: list[list[str]]) -> None:
    """Before anything expensive: every file must have all columns of at least one of the `choices`.

    Of a file that is no parquet its first readable row is looked at; a file without rows passes.
    """
    for file in files:
        names = column_names(file)
        if names is not None and not any(set(choice) <= set(names) for choice in choices):
            wanted = " or ".join(" + ".join(f"'{name}'" for name in choice) for choice in choices)
            raise SystemExit(f"{file} lacks the column {wanted}. It has: {brief(', '.join(names)) or 'none'}.")


def column_names(file: Path) -> list[str] | None:
    if kind(file) == ".parquet":
        with open_parquet(file) as parquet:
            return parquet.schema_arrow.names
    check_content(file)
    if kind(file) == ".txt":
        return ["text"]
    first = next((row.values for row in read_rows([file], None) if row.fault is None), None)
    return list(first) if first is not None else None
