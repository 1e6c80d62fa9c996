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
        # Another process opens the files, and a hash of the blocks reads no tokens.
        return Blocks, (self.folder.absolute(),)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first, count = self.table[index].tolist()
        spans = self.spans[first : first + count]
        pieces = [self.store.read(start, end) for start, end in spans.tolist()]
        ids = np.concatenate([piece for piece, _ in pieces], dtype=np.int64)
        positions, labels = np.arange(len(ids)), ids.copy()
        if self.store.has_flags:
            trained = [np.ones(len(piece), bool) if flags is None else flags for piece, flags in pieces]
            labels[np.concatenate(trained) == 0] = IGNORED
        if self.isolate:
            lengths = lengths_of(spans)
            begins = np.cumsum(lengths) - lengths
            positions -= np.repeat(begins, lengths)
            labels[begins] = IGNORED
        labels[0] = IGNORED
        return {"input_ids": ids, "position_ids": positions, "labels": labels}

    def as_dataset(self) -> datasets.Dataset:
        """The same items as a `datasets.Dataset`, the only kind that TRL's trainers take."""
        dataset = datasets.Dataset.from_dict({"block": range(len(self))}).with_transform(self.fetch)
        dataset.blocks = self
        return dataset

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
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "spans").open("wb") as spans_file, (folder / "table").open("wb") as table_file:

        def write(phase: int, packed: Packed) -> None:
            nonlocal num_spans
            spans_file.write(packed.spans.tobytes())
            firsts = num_spans + np.cumsum(packed.num_spans) - packed.num_spans
            table_file.write(np.stack([firsts, packed.num_spans], axis=1).tobytes())
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

    if len(phase_sizes) > 1 and num_spans:
        table = np.memmap(folder / "table", np.int64, mode="r+").reshape(-1, 2)
        generator = np.random.default_rng(seed)
        for blocks in np.split(table, np.cumsum(list(phase_sizes.values()))[:-1]):
            blocks[:] = generator.permutation(blocks)
        table.flush()
    layout = {"isolate": isolate, "parts": [os.path.relpath(part, folder) for part in store.folders]}
    (folder / "blocks.json").write_text(json.dumps(layout), encoding="utf-8")
    return ledger


def count_blocks(ledger: Ledger, store: TokenStore, packed: Packed, block_size: int, isolate: bool) -> None:
    """Enter blocks in the ledger: their tokens, what is to be learnt of them, and which rows they cut."""
    lengths = lengths_of(packed.spans)
    num_blocks, num_tokens = len(packed.num_spans), int(lengths.sum())
    targets = packed.spans.copy()  # without the tokens that nothing before them predicts
    targets[slice(None) if isolate else np.cumsum(packed.num_spans) - packed.num_spans, 0] += 1
    untrained = sum(len(flags) - int(np.count_nonzero(flags)) for flags in store.flags_of(targets))
    trained = int(lengths_of(targets).sum()) - untrained
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
        flatten: make one row [1, B x L] of the batch, as flash attention needs to keep rows apart, and say where each
            begins and the last ends, `cu_seq_lens_q` [rows + 1] int32, and how long one can be, `max_length_q`.
    """

    def __init__(self, pad_id: int, flatten: bool = False) -> None:
        self.pad_id, self.flatten = pad_id, flatten

    def __call__(self, blocks: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        length = max(len(block["input_ids"]) for block in blocks)
        filled = {"input_ids": self.pad_id, "position_ids": 0, "labels": IGNORED}
        batch = {name: np.full((len(blocks), length), value) for name, value in filled.items()}
        for row, block in enumerate(blocks):
            size = len(block["input_ids"])
            for name, values in block.items():
                batch[name][row, :size] = values
            batch["position_ids"][row, size:] = np.arange(length - size)
        shape = (1, -1) if self.flatten else (len(blocks), length)
        tensors = {name: torch.from_numpy(rows).reshape(shape) for name, rows in batch.items()}
        if not self.flatten:
            return tensors
        begins = np.flatnonzero(batch["position_ids"] == 0)
        borders = torch.from_numpy(np.append(begins, batch["position_ids"].size).astype(np.int32))
        # In the names by which transformers hands them on to each layer; queries and keys are of the same rows.
        lengths = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": length, "max_length_k": length}
        return tensors | lengths
