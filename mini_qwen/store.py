"""Token rows on disk: written as they come, opened memory-mapped by every run and every process after."""

import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FILES = {"ids": np.uint32, "starts": np.int64, "trained": np.uint8}
WINDOW = 1 << 20  # rows that are packed, or looked at, together; bounds the memory that this takes
STATE = "state.json"  # of a folder that is being written; absent from a complete one


class StoreWriter:
    """Writes a folder of token rows, one after the other, in files that only grow.

        ids       every token id, 4 bytes each (Qwen's ids pass the 65,535 that 2 bytes hold)
        starts    where each row begins, counted in tokens, and where the last one ends; 8 bytes each
        trained   1 where the token is to be learnt; absent when all are

    What has been committed survives a kill: a new writer on the folder cuts the files back to that and goes on.
    """

    def __init__(self, folder: Path, flags: bool) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        state_file = folder / STATE
        self.state: dict[str, Any] = json.loads(state_file.read_text()) if state_file.exists() else {}
        sizes = self.state.get("sizes", {})
        names = [name for name in FILES if flags or name != "trained"]
        self.streams = {name: (folder / name).open("r+b" if name in sizes else "wb") for name in names}
        for name, stream in self.streams.items():
            stream.truncate(sizes.get(name, 0))
            stream.seek(0, 2)
        self.num_tokens = self.streams["ids"].tell() // 4
        if not sizes:
            self.streams["starts"].write(np.int64(0).tobytes())

    def add(self, ids: list[np.ndarray], trained: list[np.ndarray] | None = None) -> None:
        """Append rows of at least one token; `trained` flags their tokens, where the folder has flags."""
        assert all(len(row) for row in ids), "a row without tokens"
        if ids:
            self.streams["ids"].write(np.concatenate(ids).astype(np.uint32, copy=False).data)
            self.streams["starts"].write((self.num_tokens + np.cumsum([len(row) for row in ids], dtype=np.int64)).data)
            self.num_tokens += sum(map(len, ids))
        if ids and trained is not None:
            self.streams["trained"].write(np.concatenate(trained).astype(np.uint8, copy=False).data)

    def commit(self, **state: Any) -> None:
        """Make all that was added last, with a `state` to go on from."""
        for stream in self.streams.values():
            stream.flush()
            os.fsync(stream.fileno())  # else a machine that loses power may keep the state and lose the rows
        self.state = state | {"sizes": {name: stream.tell() for name, stream in self.streams.items()}}
        fresh = self.folder / f"{STATE}.new"
        fresh.write_text(json.dumps(self.state))
        fresh.replace(self.folder / STATE)

    def close(self) -> None:
        for stream in self.streams.values():
            stream.close()
        (self.folder / STATE).unlink(missing_ok=True)


class TokenStore:
    """The token rows of one or more folders, one folder after the other, opened without reading them.

    Rows and tokens are counted through all folders. A row lies in one folder, a stretch of tokens to be read too.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = list(folders)
        self.parts = [
            {name: map_file(folder / name, dtype) for name, dtype in FILES.items() if (folder / name).exists()}
            for folder in self.folders
        ]
        self.has_flags = any("trained" in part for part in self.parts)
        # Row and token at which each part begins; one more for the end.
        self.row_offsets = np.cumsum([0, *(len(part["starts"]) - 1 for part in self.parts)])
        self.token_offsets = np.cumsum([0, *(int(part["starts"][-1]) for part in self.parts)])
        self._token_offsets = self.token_offsets.tolist()

    def __len__(self) -> int:
        return int(self.row_offsets[-1])

    @property
    def num_tokens(self) -> int:
        return int(self.token_offsets[-1])

    def spans(self, rows: np.ndarray) -> np.ndarray:
        """First and one past the last token of each of the `rows`, int64 [n, 2]."""
        result = np.empty((len(rows), 2), np.int64)
        owners = np.searchsorted(self.row_offsets, rows, side="right") - 1
        for number in np.unique(owners):
            mine = owners == number
            starts, local = self.parts[number]["starts"], rows[mine] - self.row_offsets[number]
            result[mine] = np.stack([starts[local], starts[local + 1]], axis=1) + self.token_offsets[number]
        return result

    def rows_of(self, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each span, the length of the row that it is a stretch of, and whether it begins that row."""
        row_lengths, begins_row = np.empty(len(spans), np.int64), np.empty(len(spans), bool)
        owners = self.parts_of(spans[:, 0])
        for number in np.unique(owners):
            mine = owners == number
            starts, local = self.parts[number]["starts"], spans[mine, 0] - self.token_offsets[number]
            row = np.searchsorted(starts, local, side="right") - 1
            row_lengths[mine], begins_row[mine] = starts[row + 1] - starts[row], starts[row] == local
        return row_lengths, begins_row

    def tokens_at(self, places: np.ndarray) -> np.ndarray:
        """The ids of single tokens."""
        ids = np.empty(len(places), np.uint32)
        owners = self.parts_of(places)
        for number in np.unique(owners):
            mine = owners == number
            ids[mine] = self.parts[number]["ids"][places[mine] - self.token_offsets[number]]
        return ids

    def parts_of(self, places: np.ndarray) -> np.ndarray:
        """The number of the folder that each token lies in."""
        return np.searchsorted(self.token_offsets, places, side="right") - 1

    def flags_of(self, spans: np.ndarray) -> Iterator[np.ndarray]:
        """The flags of the spans that have any."""
        flagged = [number for number, part in enumerate(self.parts) if "trained" in part]
        for start, end in spans[np.isin(self.parts_of(spans[:, 0]), flagged)].tolist():
            yield self.read(start, end)[1]

    def read(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Ids of a stretch of tokens and their flags, None where all are to be learnt."""
        number = bisect_right(self._token_offsets, start) - 1
        part, offset = self.parts[number], self._token_offsets[number]
        flags = part.get("trained")
        return part["ids"][start - offset : end - offset], None if flags is None else flags[
            start - offset : end - offset
        ]

    def row(self, index: int) -> np.ndarray:
        """The ids of one row."""
        ((start, end),) = self.spans(np.array([index])).tolist()
        return self.read(start, end)[0]


def windows_of(rows: range, without: np.ndarray) -> Iterator[np.ndarray]:
    """The numbers of rows but for some, at most WINDOW at a time."""
    for start in range(rows.start, rows.stop, WINDOW):
        yield np.setdiff1d(np.arange(start, min(start + WINDOW, rows.stop)), without, assume_unique=True)


def map_file(file: Path, dtype: type) -> np.ndarray:
    # As a plain array: slices of the subclass np.memmap take several times as long.
    return np.asarray(np.memmap(file, dtype=dtype, mode="r")) if file.stat().st_size else np.zeros(0, dtype)
