"""Show what is in a data file: columns, number of rows, and the first rows with long text shortened.

    python utils/view_data.py data/sft/7M/train-00000-of-00075.parquet --rows 2
    python utils/view_data.py my_rows.jsonl --width 200

Reads .parquet, .jsonl (one row a line) and .json (a list of rows, or one row).
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyarrow.parquet import ParquetFile


def read_parquet(path: Path, num_rows: int) -> tuple[list[str], int, list[Any]]:
    """The columns with their types, the number of rows, and the first `num_rows` rows; the rest is not read."""
    with ParquetFile(path) as parquet:
        batch = next(parquet.iter_batches(batch_size=num_rows), None)
        columns = [f"{field.name}: {field.type}" for field in parquet.schema_arrow]
        return columns, parquet.metadata.num_rows, batch.to_pylist() if batch else []


def read_json(path: Path, num_rows: int) -> tuple[list[str], int, list[Any]]:
    """As `read_parquet`, from .json or .jsonl; the columns are those of the rows that are returned."""
    with path.open(encoding="utf-8-sig") as file:
        if path.suffix.lower() == ".json":
            rows = json.load(file)
            rows = rows if isinstance(rows, list) else [rows]
            total, rows = len(rows), rows[:num_rows]
        else:
            total, rows = 0, []
            for number, line in enumerate(file, 1):
                total += bool(line.strip())
                if line.strip() and len(rows) < num_rows:
                    try:
                        rows.append(json.loads(line))
                    except ValueError as error:
                        raise ValueError(f"line {number}: {error}") from None
    types: dict[str, list[str]] = {}
    for key, value in [pair for row in rows if isinstance(row, dict) for pair in row.items()]:
        types[key] = sorted({*types.get(key, []), type(value).__name__})
    return [f"{key}: {' or '.join(names)}" for key, names in types.items()], total, rows


def show(name: str, value: Any, width: int, indent: str = "") -> Iterator[str]:
    """The lines for one value: nested ones key by key, text as it is, the rest as JSON; long ones cut at `width`.

    >>> list(show("turn", {"from": "human", "value": "abcdef"}, width=5))
    ['turn:', '  from: human', '  value: abcde... [1 more characters]']
    """
    nested = isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value)
    if nested or isinstance(value, dict):
        yield f"{indent}{name}:"
        for key, inner in enumerate(value) if nested else value.items():
            yield from show(str(key), inner, width, indent + "  ")
        return
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > width:
        text = f"{text[:width]}... [{len(text) - width:,} more characters]"
    yield f"{indent}{name}: " + text.replace("\n", f"\n{indent}  ")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, read the file, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--rows", type=int, default=3, help="rows to show (default: 3)")
    parser.add_argument("--width", type=int, default=400, help="characters to show of a text (default: 400)")
    args = parser.parse_args(argv)

    if args.rows < 1 or args.width < 1:
        raise SystemExit(f"--rows is {args.rows} and --width is {args.width}: both must be 1 or more.")
    if not args.file.is_file():
        raise SystemExit(f"{args.file} is not a file: name a .parquet, .jsonl or .json file.")
    suffix = args.file.suffix.lower()
    if suffix not in (".parquet", ".jsonl", ".json"):
        raise SystemExit(
            f"{args.file} ends in {args.file.suffix or 'nothing'}: only .parquet, .jsonl, .json are read."
        )
    read = read_parquet if suffix == ".parquet" else read_json
    try:
        columns, total, rows = read(args.file, args.rows)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"{args.file} is not readable as {args.file.suffix} (cut off, or misnamed?): {error}"
        ) from None

    # JSON can spell half a character pair, which no UTF-8 can hold; it is shown as it is spelt.
    sys.stdout.reconfigure(errors="backslashreplace")
    print(f"{args.file}: {total:,} rows, {args.file.stat().st_size:,} bytes", "", "columns", sep="\n")
    print(*(f"  {column}" for column in columns), sep="\n")
    for number, row in enumerate(rows):
        print("", *show(f"row {number}", row, args.width), sep="\n")


if __name__ == "__main__":
    main()
