"""Blocks: token rows side by side in the sequences that the model trains on, without seeing each other.

Two rows of a block are kept apart by their position ids, which restart at 0 with every row, and by the absence of an
attention mask: then transformers' attention (eager, SDPA, flex, flash) lets a token see its own row only. The first
token of a row is never a target, so that no row predicts the next.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from mini_qwen.ledger import Ledger
from mini_qwen.packing import NO_SPANS, Packed, lengths_of
from mini_qwen.store import TokenStore, map_file

IGNORED = -100  # the label that PyTorch's cross-entropy skips
TAIL = "tail shorter than a block"


class Blocks(torch.utils.data.Dataset):
    """The blocks that `write_blocks` left in a folder; nothing is read before it is asked for.

    Each item has `input_ids`, `position_ids` and `labels`, arrays of equal length. Rows [7, 8, 9] and [5, 6] of which
    all tokens are trained, in one block:

        input_ids      7    8  9     5  6
        position_ids   0    1  2     0  1
        labels      -100    8  9  -100  6

    Without isolation they are one row: positions 0 to 4, labels -100 8 9 5 6.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        layout = json.loads((folder / "blocks.json").read_text(encoding="utf-8"))
        self.store = TokenStore([folder / part for part in layout["parts"]])
        self.isolate = layout["isolate"]
        self.spans = map_file(folder / "spans", np.int64).reshape(-1, 2)
        self.table = map_file(folder / "table", np.int64).reshape(-1, 2)  # of each block: first span, number of spans

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return Blocks, (self.folder,)  # another process opens the files, and a hash of the blocks reads no tokens

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first, count = self.table[index].tolist()
        spans = self.spans[first : first + count].tolist()
        pieces = [self.store.read(start, end) for start, end in spans]
        ids = np.concatenate([ids for ids, _ in pieces]).astype(np.int64)
        positions = np.arange(len(ids))
        labels = ids.copy()
        at = 0
        for (start, end), (_, trained) in zip(spans, pieces, strict=True):
            if trained is not None:
                labels[at : at + end - start][trained == 0] = IGNORED
            if self.isolate:
                positions[at : at + end - start] -= at
                labels[at] = IGNORED
            at += end - start
        labels[0] = IGNORED
        return {"input_ids": ids, "position_ids": positions, "labels": labels}

    def as_dataset(self) -> datasets.Dataset:
        """The same items as a `datasets.Dataset`, the only kind that TRL's trainers take."""
        return datasets.Dataset.from_dict({"block": range(len(self))}).with_transform(self.fetch)

    def fetch(self, batch: dict[str, list[int]]) -> dict[str, list[np.ndarray]]:
        items = [self[index] for index in batch["block"]]
        return {name: [item[name] for item in items] for name in items[0]}


def write_blocks(
    folder: Path,
    store: TokenStore,
    windows: Iterable[tuple[int, np.ndarray]],
    pack: Callable[[np.ndarray], Packed],
    block_size: int,
    isolate: bool = True,
    keep_rest: bool = False,
    seed: int = 0,
) -> Ledger:
    """Pack rows into blocks and write down which spans each has; the ledger says what is trained, masked, left over.

    Args:
        windows: (number of the phase, rows of the store), packed window by window; what fills no block goes on into
            the next. Where there are several phases, the blocks of each are shuffled by `seed`.
        pack: spans [n, 2] -> blocks of at most `block_size` tokens.
        keep_rest: make a shorter last block of what fills none, if it has a token to predict; else it is the tail.
    """
    ledger = Ledger()
    rest, phase_sizes, num_spans = NO_SPANS, {}, 0
    table: list[np.ndarray] = []
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "spans").open("wb") as spans_file:

        def write(phase: int, packed: Packed) -> None:
            nonlocal num_spans
            spans_file.write(packed.spans.tobytes())
            firsts = num_spans + np.cumsum(packed.num_spans) - packed.num_spans
            table.append(np.stack([firsts, packed.num_spans], axis=1))
            phase_sizes[phase] = phase_sizes.get(phase, 0) + len(firsts)
            num_spans += len(packed.spans)
            count_blocks(ledger, store, packed, block_size, isolate)

        phase = 0
        for phase, rows in windows:
            packed = pack(np.concatenate([rest, store.spans(rows)]))
            write(phase, packed)
            rest = packed.rest
        num_left = int(lengths_of(rest).sum())
        if keep_rest and num_left > (len(rest) if isolate else 1):
            write(phase, Packed(rest, np.array([len(rest)]), NO_SPANS))
        elif num_left:
            ledger.tokens_dropped[TAIL] += num_left

    rows = np.concatenate([np.empty((0, 2), np.int64), *table])
    if len(phase_sizes) > 1:
        ends = np.cumsum([phase_sizes[number] for number in sorted(phase_sizes)])
        generator = np.random.default_rng(seed)
        rows = np.concatenate([generator.permutation(part) for part in np.split(rows, ends[:-1])])
    (folder / "table").write_bytes(rows.tobytes())
    layout = {"isolate": isolate, "parts": [os.path.relpath(part, folder) for part in store.folders]}
    (folder / "blocks.json").write_text(json.dumps(layout), encoding="utf-8")
    return ledger


def count_blocks(ledger: Ledger, store: TokenStore, packed: Packed, block_size: int, isolate: bool) -> None:
    """Enter blocks in the ledger: their tokens, what is to be learnt of them, and which rows they cut."""
    lengths = lengths_of(packed.spans)
    num_blocks, num_tokens = len(packed.num_spans), int(lengths.sum())
    trained = num_tokens - (len(lengths) if isolate else num_blocks)
    trained -= sum(len(flags) - 1 - int(np.count_nonzero(flags[1:])) for flags in store.flags_of(packed.spans))
    ledger.blocks += num_blocks
    ledger.tokens_padding += num_blocks * block_size - num_tokens
    ledger.tokens_trained += trained
    ledger.tokens_masked += num_tokens - trained
    row_lengths, begins_row = store.rows_of(packed.spans)
    cut = begins_row & (lengths < row_lengths)
    ledger.rows_cut += int(cut.sum())
    ledger.short_rows_cut += int((cut & (row_lengths <= block_size)).sum())


class BlockCollator:
    """Stack blocks into a batch [B, L]. Shorter blocks are filled up with a row of pads, kept apart like any other.

    Args:
        pad_id: token id to fill up with; its labels are ignored.
        flatten: make one row [1, B x L] of the batch, as flash attention needs to keep rows apart.
    """

    def __init__(self, pad_id: int, flatten: bool = False) -> None:
        self.pad_id, self.flatten = pad_id, flatten

    def __call__(self, blocks: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        length = max(len(block["input_ids"]) for block in blocks)
        batch: dict[str, Any] = {}
        for name, fill in [("input_ids", self.pad_id), ("position_ids", None), ("labels", IGNORED)]:
            rows = []
            for block in blocks:
                short = length - len(block[name])
                padding = np.arange(short) if fill is None else np.full(short, fill)
                rows.append(np.concatenate([block[name], padding]) if short else block[name])
            batch[name] = torch.from_numpy(np.stack(rows))
        return {name: tensor.reshape(1, -1) for name, tensor in batch.items()} if self.flatten else batch
