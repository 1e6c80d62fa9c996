"""Data files: find them, say what is wrong with one, and look at their columns before anything expensive."""

import gzip
import io
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

KINDS = (".parquet", ".jsonl", ".json", ".csv", ".txt")
OTHER_NAMES = {".ndjson": ".jsonl"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
DAMAGE = (pa.ArrowException, OSError, EOFError, zlib.error, MemoryError)  # what libraries raise on damaged bytes


@dataclass
class DataKeys:
    """Recipe keys of the data that every training stage has."""

    train_files: list[str]  # files or folders; folders are searched for data files
    max_drop_share: float = 0.05  # above this share of dropped rows the run stops
    cache_dir: str = "cache"  # prepared token rows, 4 or 5 bytes a token; old folders in it may be removed


def compression(file: Path) -> str:
    """`.gz` or `.zst` at the end of the name, or none; capitals do not matter."""
    suffix = file.suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def kind(file: Path) -> str:
    """`.jsonl` for rows.jsonl, rows.jsonl.gz, rows.ndjson.zst and ROWS.JSONL."""
    suffix = (Path(file.stem) if compression(file) else file).suffix.lower()
    return OTHER_NAMES.get(suffix, suffix)


def find_files(paths: list[str]) -> list[Path]:
    """All data files under the given files and folders, in a fixed order; one that has two names under the first.

    Raises SystemExit for a path that is missing, a folder without data files, and a file of another kind.
    """
    known = f"{', '.join(KINDS)}, each also as {' or '.join(COMPRESSIONS)}"
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if not path.exists():
            raise SystemExit(
                f"There is no data at '{name}'. Name a file or folder that exists: mini_data/ comes with the project, "
                "'bash prepare.sh' fetches the big data into data/."
            )
        files = [path]
        if path.is_dir():
            files = sorted(file for file in walk(path) if is_data(file))
        if not files:
            raise SystemExit(f"The folder '{name}' holds no data files ({known}).")
        found += files
    wrong = [file for file in found if kind(file) not in KINDS]
    if wrong:
        raise SystemExit(f"'{wrong[0]}' is not a data file: known are {known}.")
    names: dict[Path, Path] = {}
    for file in found:
        names.setdefault(file.resolve(), file)
    return list(names.values())


def is_data(file: Path) -> bool:
    return kind(file) in KINDS and file.is_file()


def walk(folder: Path) -> Iterator[Path]:
    """Every file below the folder, also behind links to folders; a folder that can be reached twice is entered once.

    Left out is what is hidden: downloads in progress lie in `.cache` of the Hugging Face Hub, `._____temp` of
    ModelScope.
    """
    entered = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place) / name for name in names if not name.startswith("."))


def count_unread(paths: list[str]) -> Counter[str]:
    """How many files below the given folders are no data files, by the end of their name."""
    inside = (file for name in paths if Path(name).is_dir() for file in walk(Path(name)))
    return Counter(file.suffix or file.name for file in inside if not is_data(file))


def open_bytes(file: Path) -> BinaryIO:
    """The file's bytes, decompressed on the way."""
    if compression(file) == ".gz":
        return gzip.open(file, "rb")
    if compression(file) == ".zst":
        return io.BufferedReader(pa.input_stream(str(file), compression="zstd"))
    return file.open("rb")


def open_parquet(file: Path) -> pq.ParquetFile:
    """Raises SystemExit for a file that is no parquet, saying what it is instead."""
    try:
        source: Any = file
        if compression(file):
            with open_bytes(file) as stream:
                source = pa.BufferReader(stream.read())
        # Pages as they come, not whole columns; and compared with their checksums, where the writer left some.
        parquet = pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
        _ = parquet.schema_arrow.names  # decoded here, where damage to them is understood
        return parquet
    except (*DAMAGE, UnicodeDecodeError) as error:
        raise SystemExit(
            f"{file} cannot be read as parquet: it is {describe_damage(file)}. ({brief(error)})"
        ) from None


def describe_damage(file: Path) -> str:
    """What a file that cannot be read seems to be, and what to do."""
    try:
        with file.open("rb") as stream:
            head = stream.read(64)
    except OSError:
        return "not to be opened; see its permissions"
    if not head:
        return "empty (0 bytes); fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the data itself; 'git lfs pull' fetches that"
    if head.lstrip().startswith(b"<"):
        return "a web page, not data: the download failed; fetch it again"
    return "broken or cut off; fetch it again"


def brief(words: object) -> str:
    """A library's own words, or those of a damaged file, as one line; a page of metadata may be part of them."""
    return f"{' '.join(str(words).split()):.300}"


def check_content(file: Path) -> None:
    """Raises SystemExit for what lies in the place of a text file: a pointer to it, or a web page instead of JSON."""
    what = describe_damage(file)
    if "pointer" in what or ("web page" in what and kind(file) in (".json", ".jsonl")):
        raise SystemExit(f"{file} cannot be read: it is {what}.")


def count_rows(files: list[Path]) -> int | None:
    """The number of rows where the files say so without being read (parquet), else None."""
    if any(kind(file) != ".parquet" for file in files):
        return None
    return sum(open_parquet(file).metadata.num_rows for file in files)


def identity(file: Path) -> tuple[str, int, int]:
    """What tells a file from others, and from itself after a change: path, bytes, nanoseconds of the last change."""
    status = file.stat()
    return str(file.resolve()), status.st_size, status.st_mtime_ns
