"""Held-out rows, and their twins: other rows with the same tokens, which would give them away if trained on."""

import random

import numpy as np

from mini_qwen.packing import lengths_of
from mini_qwen.store import TokenStore, windows_of


def choose_held_out(num_rows: int, eval_rows: int, seed: int) -> np.ndarray:
    """The rows to keep away from training, sorted: a function of the seed and the number of rows."""
    if eval_rows and not 0 < eval_rows < num_rows:
        raise SystemExit(f"eval_rows is {eval_rows:,}, but the data has only {num_rows:,} usable rows: choose fewer.")
    return np.array(sorted(random.Random(seed).sample(range(num_rows), eval_rows)), np.int64)


def find_twins(store: TokenStore, held_out: np.ndarray) -> np.ndarray:
    """The rows of the store, without the held-out ones, that have the same tokens as one of these; sorted."""
    if not len(held_out):
        return held_out
    held, wanted = {store.row(row).tobytes() for row in held_out.tolist()}, marks_of(store, held_out)
    twins = []
    for window in windows_of(range(len(store)), held_out):
        alike = window[np.isin(marks_of(store, window), wanted)]
        twins += [row for row in alike.tolist() if store.row(row).tobytes() in held]
    return np.array(twins, np.int64)


def marks_of(store: TokenStore, rows: np.ndarray) -> np.ndarray:
    """Length and three tokens of each row, which tell nearly all apart without reading them; to be compared."""
    spans = store.spans(rows)
    lengths = lengths_of(spans)
    tokens = [store.tokens_at(spans[:, 0] + lengths * number // 4) for number in (1, 2, 3)]
    return np.stack([lengths, *tokens], axis=1).astype(np.int64).view("V32").ravel()
