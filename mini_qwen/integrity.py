"""Integrity: hashes of files, and files that are on the disk before anything counts on them."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HASHED_AT_ONCE = 4  # files; hashing leaves Python's lock to other threads


def hash_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_files(files: Iterable[Path]) -> list[str]:
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        return list(pool.map(hash_file, files))


def sync(path: Path) -> None:
    """Have the machine write a file, or a folder's list of names, to the disk: a power cut does not undo it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """The same for a folder and all that is in it."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
