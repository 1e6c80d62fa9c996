"""Prepared once: the token rows of each data file, in a folder named by a hash of all that decides them."""

import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from mini_qwen.chat import TokenRow
from mini_qwen.encoding import text_encoder
from mini_qwen.files import count_rows, identity
from mini_qwen.integrity import hash_files, sync, sync_all
from mini_qwen.ledger import Ledger
from mini_qwen.rows import Row, check_columns
from mini_qwen.store import STATE, StoreWriter

# What decides the tokens of a row, beside the tokenizer, the template and the recipe.
ROW_MODULES = ("cache", "chat", "conversations", "documents", "encoding", "files", "ledger", "preferences")
ROW_MODULES += ("rated", "rows", "schemas", "shortening", "store")
BATCH_SIZE = 200  # rows
BATCH_CHARACTERS = 2_000_000
ROWS_TRIED = 20  # of every file, before the first one is prepared
SECONDS_BETWEEN_COMMITS = 10.0
DIGEST = "digest"  # in a complete folder, of what it holds


class Part(NamedTuple):
    """The prepared rows of one data file."""

    folder: Path
    ledger: Ledger

    @property
    def num_tokens(self) -> int:
        return (self.folder / "ids").stat().st_size // 4


class Preparation(NamedTuple):
    """How a stage makes token rows: pure functions, rows in, token rows and counts out."""

    stage: str
    choices: list[list[str]]  # every file has all columns of one of these
    read: Callable[[Path], Iterable[Row]]
    encode: Callable[[list[Row]], tuple[list[TokenRow], Ledger]]
    flags: bool  # whether some tokens of a row are not to be learnt
    tokenizer: PreTrainedTokenizerBase
    settings: dict[str, Any]  # what `read` and `encode` depend on beside the tokenizer


def hash_of(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def source_hash(modules: tuple[str, ...] = ROW_MODULES) -> str:
    """Of the modules that make rows: an edited function never meets rows that its old version made."""
    files = [Path(__file__).parent / f"{name}.py" for name in modules]
    return hash_of([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of the tokenizer, whatever truncation and padding its last call had."""
    return hash_of(json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None})


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """The folder, complete: built by one process while others wait for it, or found as an earlier run left it.

    `build` fills a folder beside it, which is renamed at the end; what a killed build left there it finds again.
    The others wait for a lock on a file, not in a collective operation, which would time out.
    """
    if folder.exists():
        return folder
    locks = folder.parent / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / folder.name)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print(f"another process is preparing {folder}; waiting for it", flush=True)
        lock.acquire()
    try:
        if not folder.exists():
            unfinished = folder.with_name(folder.name + ".partial")
            build(unfinished)
            seal(unfinished)
            unfinished.rename(folder)
            sync(folder.parent)
    finally:
        lock.release()
    return folder


def seal(folder: Path) -> None:
    """Have all files on the disk before the folder gets its name, and write down a hash of the data in them.

    A ledger or a layout names places, which are no part of the data.
    """
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != DIGEST)
    data = sorted(file for file in files if file.suffix != ".json")
    names = [str(file.relative_to(folder)) for file in data]
    (folder / DIGEST).write_text(hash_of(list(zip(names, hash_files(data), strict=True))), encoding="utf-8")
    sync_all(folder)


def prepare_parts(cache_dir: str, sources: dict[str, list[Path]], preparation: Preparation) -> dict[str, list[Part]]:
    """The prepared rows of each file of each source. Only what no earlier run has left is made."""
    tokenizer = preparation.tokenizer
    common = {
        "tokenizer": tokenizer_hash(tokenizer),
        "template": tokenizer.chat_template,
        "settings": preparation.settings,
        "source": source_hash(),
    }
    files = [file for found in sources.values() for file in found]
    folders = {}
    for file in files:
        key = hash_of(common | {"file": identity(file)})
        folders[file] = Path(cache_dir) / f"{preparation.stage}-{key}"
    missing = [file for file in files if not folders[file].exists()]
    check_columns(missing, preparation.choices)
    for file in missing:  # what is wrong with the beginning of the last file is said now, not hours later
        preparation.encode(list(islice(preparation.read(file), ROWS_TRIED)))
    done = 0
    with tqdm(total=count_rows(missing), desc="tokenising", unit="rows", delay=1) as progress:
        for file in missing:
            build_once(folders[file], partial(prepare_file, file=file, preparation=preparation, progress=progress))
            done += Ledger.load(folders[file] / "ledger.json").rows_read
            progress.update(done - progress.n)
    parts = {file: Part(folder, Ledger.load(folder / "ledger.json")) for file, folder in folders.items()}
    return {source: [parts[file] for file in found] for source, found in sources.items()}


def sum_ledgers(sources: dict[str, list[Part]]) -> Ledger:
    """The counts of all files of all sources."""
    ledger = Ledger()
    for part in (part for parts in sources.values() for part in parts):
        ledger.add(part.ledger)
    return ledger


def prepare_file(folder: Path, file: Path, preparation: Preparation, progress: tqdm) -> None:
    """Write the token rows of one file and their ledger, going on where a killed run has committed."""
    if not (folder / STATE).exists():
        shutil.rmtree(folder, ignore_errors=True)
    text_encoder(preparation.tokenizer)  # made here, before several threads ask for it
    writer = StoreWriter(folder, preparation.flags)
    ledger = Ledger.from_dict(writer.state["ledger"]) if writer.state else Ledger(files=1)
    num_batches = writer.state.get("num_batches", 0)
    batches = batches_of(preparation.read(file))
    committed = time.monotonic()
    for token_rows, counts in map_ahead(preparation.encode, islice(batches, num_batches, None)):
        flags = [row.trained for row in token_rows] if preparation.flags else None
        writer.add([row.ids for row in token_rows], flags)
        ledger.add(counts)
        progress.update(counts.rows_read)
        num_batches += 1
        if time.monotonic() - committed > SECONDS_BETWEEN_COMMITS:
            writer.commit(ledger=ledger.as_dict(), num_batches=num_batches)
            committed = time.monotonic()
    ledger.files_without_rows = int(not ledger.rows_read)
    ledger.save(folder / "ledger.json")
    writer.close()


def batches_of(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows in lists of BATCH_SIZE, and of fewer where documents are long."""
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += sum(len(value) for value in row.values.values() if isinstance(value, str))
        if len(batch) == BATCH_SIZE or size > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def map_ahead(function: Callable, items: Iterable) -> Iterator:
    """`map`, in order, on all cores; a few items are read ahead, so that memory stays small."""
    num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(num_workers) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
