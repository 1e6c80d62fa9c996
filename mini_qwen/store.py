"""Token rows on disk: written once as they come, opened memory-mapped by every run and every process after."""

import contextlib
import hashlib
import json
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mini_qwen.ledger import Ledger

# What decides the tokens of a row, beside the tokenizer and the template.
ROW_MODULES = ("chat", "conversations", "documents", "ledger", "preferences", "rows", "store")


class TokenStore:
    """Rows of token ids, one after the other, in three files of a folder.

        ids.u32       every token id, 4 bytes each (Qwen's ids pass the 65,535 that 2 bytes hold)
        trained.u8    1 where the token is to be learnt; absent when all are
        starts.npy    where each row begins, and where the last one ends

    `ids` and `trained` are memory-mapped: a corpus larger than memory opens in no time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.starts: np.ndarray = np.load(folder / "starts.npy", mmap_mode="r")
        empty = self.starts[-1] == 0  # numpy cannot map an empty file
        self.ids = np.zeros(0, np.uint32) if empty else np.memmap(folder / "ids.u32", dtype=np.uint32, mode="r")
        has_flags = (folder / "trained.u8").exists() and not empty
        self.trained = np.memmap(folder / "trained.u8", dtype=np.uint8, mode="r") if has_flags else None

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return TokenStore, (self.folder,)  # another process maps the files anew

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.starts[-1])

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)


class StoreWriter:
    """Writes a TokenStore row by row, holding only the rows' starts in memory."""

    def __init__(self, folder: Path, flags: bool) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.ids = (folder / "ids.u32").open("wb")
        self.flags = (folder / "trained.u8").open("wb") if flags else None
        self.starts = array("q", [0])

    def add(self, ids: Sequence[int], trained: Sequence[bool] | None = None) -> None:
        self.ids.write(np.asarray(ids, dtype=np.uint32).tobytes())
        if self.flags is not None:
            self.flags.write(np.asarray(trained, dtype=np.uint8).tobytes())
        self.starts.append(self.starts[-1] + len(ids))

    def close(self) -> None:
        self.ids.close()
        if self.flags is not None:
            self.flags.close()
        np.save(self.folder / "starts.npy", np.frombuffer(self.starts, dtype=np.int64))


def prepare_once(
    cache_dir: str,
    stage: str,
    files: Iterable[Path],
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    build: Callable[[Path], Ledger],
) -> tuple[Path, Ledger]:
    """The folder that `build` filled, from an earlier run if nothing that it depends on has changed since.

    The folder's name is a hash of the files (path, size, time of change), the tokenizer, the chat template, the
    `settings` and the source of the modules that make rows, so that an edited function never meets rows that its old
    version made. A folder is complete or absent: `build` fills one of its own, which is renamed at the end.
    """
    source = [Path(__file__).parent / f"{name}.py" for name in ROW_MODULES]
    parts = {
        "files": [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "template": tokenizer.chat_template,
        "settings": settings,
        "source": [hashlib.sha256(file.read_bytes()).hexdigest() for file in source],
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(cache_dir) / f"{stage}-{key}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=folder.name + ".partial-", dir=folder.parent))
        try:
            ledger = build(partial)
            (partial / "ledger.json").write_text(json.dumps(ledger.as_dict(), indent=2), encoding="utf-8")
            with contextlib.suppress(OSError):  # another process may have been faster, with the same rows
                partial.rename(folder)
            assert folder.exists(), folder
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder, Ledger.from_dict(json.loads((folder / "ledger.json").read_text(encoding="utf-8")))
