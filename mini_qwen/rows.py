"""Rows: find data files, and read only the named columns of their rows, each with its file and number."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = (".parquet", ".jsonl", ".json")


@dataclass
class DataKeys:
    """Recipe keys of the data that every training stage has."""

    train_files: list[str]  # files or folders; folders are searched for parquet, jsonl and json
    max_drop_share: float = 0.05  # above this share of dropped rows the run stops
    cache_dir: str = "cache"  # prepared token rows, 4 or 5 bytes a token; old folders in it may be removed


class Row(NamedTuple):
    file: Path
    number: int  # counted from 0 in its file
    values: dict[str, Any]

    @property
    def place(self) -> str:
        return f"{self.file}, row {self.number}"


def find_files(paths: list[str]) -> list[Path]:
    """All data files under the given files and folders, in a fixed order.

    Raises SystemExit for a path that is missing, a folder without data files, and a file of another kind.
    """
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if not path.exists():
            raise SystemExit(
                f"There is no data at '{name}'. Name a file or folder that exists: mini_data/ comes with the project, "
                "'bash prepare.sh' fetches the big data into data/."
            )
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES) if path.is_dir() else [path]
        if not files:
            raise SystemExit(f"The folder '{name}' holds no data files ({', '.join(SUFFIXES)}).")
        found += files
    wrong = [file for file in found if file.suffix not in SUFFIXES]
    if wrong:
        raise SystemExit(f"'{wrong[0]}' is not a data file: known are {', '.join(SUFFIXES)}.")
    return list(dict.fromkeys(found))


def open_parquet(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        head = file.open("rb").read(64)
        kind = "broken or cut off"
        if head.startswith(b"version https://git-lfs"):
            kind = "a Git LFS pointer, not the data itself ('git lfs pull' fetches it)"
        elif head.lstrip().startswith(b"<"):
            kind = "a web page, not data (the download failed)"
        raise SystemExit(f"{file} cannot be read as parquet: it is {kind}. Fetch it again. ({error})") from None


def count_rows(file: Path) -> int:
    if file.suffix == ".parquet":
        return open_parquet(file).metadata.num_rows
    return sum(1 for _ in read_file(file, []))


def read_rows(files: list[Path], columns: list[str]) -> Iterator[Row]:
    """Yield every row's values of those `columns` that its file has; other columns are never read.

    So it does not matter that `id` is a number in one file and a string in the next.
    """
    for file in files:
        for number, values in enumerate(read_file(file, columns)):
            yield Row(file, number, values)


def read_file(file: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    if file.suffix == ".parquet":
        parquet = open_parquet(file)
        present = [name for name in columns if name in parquet.schema_arrow.names]
        try:
            for batch in parquet.iter_batches(batch_size=1000, columns=present):
                yield from batch.to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise SystemExit(f"{file} is damaged inside: {error}. Fetch it again.") from None
        return
    for number, record in enumerate(read_json(file) if file.suffix == ".json" else read_jsonl(file)):
        if not isinstance(record, dict):
            raise SystemExit(f"{file}, row {number} holds {record!r:.80}, not an object with named fields.")
        yield {name: record[name] for name in columns if name in record}


def read_json(file: Path) -> list[Any]:
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SystemExit(f"{file} is not valid json in UTF-8: {error}.") from None
    if not isinstance(records, list):
        raise SystemExit(f"{file} holds {records!r:.80}, not a list of objects with named fields.")
    return records


def read_jsonl(file: Path) -> Iterator[Any]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line.decode("utf-8"))
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    raise SystemExit(f"{file}, line {number} is not valid json in UTF-8: {error}.") from None


def check_columns(files: list[Path], choices: list[list[str]]) -> None:
    """Before anything expensive: every file must have all columns of at least one of the `choices`.

    Of a jsonl or json file its first row is looked at; a file without rows passes.
    """
    for file in files:
        names = column_names(file)
        if names is not None and not any(set(choice) <= set(names) for choice in choices):
            wanted = " or ".join(" + ".join(f"'{name}'" for name in choice) for choice in choices)
            raise SystemExit(f"{file} lacks the column {wanted}. It has: {', '.join(names)}.")


def column_names(file: Path) -> list[str] | None:
    if file.suffix == ".parquet":
        return open_parquet(file).schema_arrow.names
    first = next(iter(read_json(file) if file.suffix == ".json" else read_jsonl(file)), None)
    return list(first) if isinstance(first, dict) else None


def choose_held_out(files: list[Path], eval_rows: int, seed: int) -> set[int]:
    """Indices, over all files, of the rows to keep away from training: a function of the seed and the row count."""
    if not eval_rows:
        return set()
    num_rows = sum(map(count_rows, files))
    if eval_rows >= num_rows:
        raise SystemExit(f"eval_rows is {eval_rows:,}, but the data has only {num_rows:,} rows. Choose fewer.")
    return set(random.Random(seed).sample(range(num_rows), eval_rows))
