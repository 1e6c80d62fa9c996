"""Mixtures: how much of each source is trained on, and when. Which rows, the seed alone decides."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mini_qwen.blocks import Blocks, write_blocks
from mini_qwen.cache import Part, build_once, hash_of, source_hash, sum_ledgers
from mini_qwen.files import DataKeys, find_files
from mini_qwen.ledger import Ledger
from mini_qwen.packing import Packed, lengths_of
from mini_qwen.store import WINDOW, TokenStore, windows_of
from mini_qwen.twins import choose_held_out, find_twins

BLOCK_MODULES = ("blocks", "mixture", "packing", "twins")  # what decides the blocks, beside the rows and the recipe

# Recipe value of `train_files`: files and folders, each taken once; or how many times each is taken, such as 0.5 or 2;
# or a list of such mixtures, trained on one after the other.
Mixture = list[str] | dict[str, float] | list[dict[str, float]]
Phase = dict[str, float]


@dataclass
class MixtureKeys(DataKeys):
    """Recipe keys of data that may be mixed."""

    train_files: Mixture
    eval_rows: int = 0  # rows cut off first, by seed, for the loss on data never trained on; their twins go too


def read_phases(train_files: Mixture) -> list[Phase]:
    """The mixtures to train on, one after the other, each {path: how many times its rows are taken}."""
    if isinstance(train_files, dict):
        phases = [train_files]
    elif all(isinstance(item, str) for item in train_files):
        phases = [dict.fromkeys(train_files, 1.0)]
    else:
        phases = train_files
    if not all(phases):
        raise SystemExit("train_files, or one of its mixtures, is empty. Name files or folders to train on.")
    for path, passes in (item for phase in phases for item in phase.items()):
        if not 0 < passes < math.inf:
            raise SystemExit(f"train_files takes '{path}' {passes} times. Give it a number above 0, or leave it out.")
    return phases


def find_sources(phases: list[Phase]) -> dict[str, list[Path]]:
    """The files of each path that the phases name. A file below two paths belongs to the first."""
    sources: dict[str, list[Path]] = {}
    seen: set[Path] = set()
    for path in dict.fromkeys(path for phase in phases for path in phase):
        sources[path] = [file for file in find_files([path]) if file.resolve() not in seen]
        seen.update(file.resolve() for file in sources[path])
        if not sources[path]:
            raise SystemExit(f"All files of '{path}' are in paths named before it. Name it first, or leave it out.")
    return sources


def uniform(rows: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each row, a function of the row's number and the seed: SplitMix64.

    Source: Steele, Lea, Flood, Fast splittable pseudorandom number generators, 2014.
    """
    start = (seed * 0xD1B54A32D192ED03 + 0x9E3779B97F4A7C15) % 2**64
    state = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((state ^ (state >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def times_taken(rows: np.ndarray, seed: int, before: float, after: float) -> np.ndarray:
    """How often each row is taken while its source is gone through, from `before` times in all to `after` times.

    Each row has its place in a pass, by the seed. So 0.9 of a source and then 0.1 of it share no row and together
    are all of it; 2.5 are all rows twice, and half of them a third time.
    """
    place = uniform(rows, seed)
    return (np.floor(after - place) - np.floor(before - place)).astype(np.int64)


def progress_of(path: str, phases: list[Phase]) -> list[float]:
    """How many times the path has been gone through before the first phase, and after each."""
    return np.round(np.cumsum([0.0, *(phase.get(path, 0.0) for phase in phases)]), 9).tolist()


class Arrangement(NamedTuple):
    """How prepared rows become blocks."""

    phases: list[Phase]
    eval_rows: int  # cut off from the rows of the paths in `held_out_of`
    held_out_of: list[str]
    packing: str  # the name of `pack`
    pack: Callable[..., Packed]  # (spans, size)
    block_size: int
    isolate: bool
    seed: int


def arrange(
    cache_dir: str, stage: str, sources: dict[str, list[Part]], plan: Arrangement
) -> tuple[Blocks, Blocks | None, Ledger]:
    """Training blocks, held-out blocks (None when eval_rows is 0), and the ledger of both; made once, like the rows.

    Args:
        sources: of each path, its prepared files; those that rows are held out of come first.
    """
    every_part = [part for parts in sources.values() for part in parts]
    key = hash_of([[part.folder.name for part in every_part], plan._replace(pack=None), source_hash(BLOCK_MODULES)])

    def build(folder: Path) -> None:
        store = TokenStore([part.folder for part in every_part])
        rows, first = {}, 0
        for path, parts in sources.items():
            rows[path] = range(first, first + sum(part.ledger.rows_kept for part in parts))
            first = rows[path].stop
        num_rows = sum(len(rows[path]) for path in plan.held_out_of)
        held_out = choose_held_out(num_rows, plan.eval_rows if num_rows else 0, plan.seed)  # if none, the ledger stops
        twins = find_twins(store, held_out)
        away = np.union1d(held_out, twins)
        ledger = sum_ledgers(sources)
        count_away(ledger, store, held_out, twins)
        count_taken(ledger, store, plan, rows, away)

        windows = phase_rows(plan.phases, rows, away, plan.seed)
        block_size, isolate, pack = plan.block_size, plan.isolate, partial(plan.pack, size=plan.block_size)
        ledger.add(write_blocks(folder / "train", store, windows, pack, block_size, isolate, seed=plan.seed))
        count_sources(ledger, Blocks(folder / "train"), rows)
        if plan.eval_rows:
            write_blocks(folder / "eval", store, [(0, held_out)], pack, block_size, isolate, keep_rest=True)
        ledger.save(folder / "ledger.json")

    folder = build_once(Path(cache_dir) / f"{stage}-blocks-{key}", build)
    eval_blocks = Blocks(folder / "eval") if plan.eval_rows else None
    return Blocks(folder / "train"), eval_blocks, Ledger.load(folder / "ledger.json")


def count_away(ledger: Ledger, store: TokenStore, held_out: np.ndarray, twins: np.ndarray) -> None:
    """Enter in the ledger which rows are held out, or like one that is."""
    ledger.rows_held_out += len(held_out)
    ledger.tokens_held_out += int(lengths_of(store.spans(held_out)).sum())
    ledger.rows_like_held_out += len(twins)
    ledger.tokens_like_held_out += int(lengths_of(store.spans(twins)).sum())
    ledger.rows_kept -= len(held_out) + len(twins)


def count_taken(
    ledger: Ledger, store: TokenStore, plan: Arrangement, rows: dict[str, range], away: np.ndarray
) -> None:
    """Enter in the ledger which of the rows that are not kept away are never taken, or more than once."""
    for path, numbers in rows.items():
        passes = progress_of(path, plan.phases)[-1]
        for window in windows_of(numbers, away):
            times = times_taken(window, plan.seed, 0.0, passes)
            lengths = lengths_of(store.spans(window))
            ledger.rows_unused += int((times == 0).sum())
            ledger.tokens_unused += int(lengths[times == 0].sum())
            ledger.tokens_repeated += int((lengths * np.maximum(times - 1, 0)).sum())
    ledger.rows_kept -= ledger.rows_unused


def count_sources(ledger: Ledger, blocks: Blocks, rows: dict[str, range]) -> None:
    """Enter in the ledger how many of the blocks' tokens come from each source."""
    parts = np.searchsorted(blocks.store.row_offsets, [numbers.stop for numbers in rows.values()])
    for start in range(0, len(blocks.spans), WINDOW):
        spans = np.asarray(blocks.spans[start : start + WINDOW])
        owners = np.searchsorted(blocks.store.token_offsets[parts], spans[:, 0], side="right")
        totals = np.bincount(owners, lengths_of(spans), len(rows)).astype(np.int64)
        ledger.tokens_by_source.update(dict(zip(rows, totals.tolist(), strict=True)))


def phase_rows(
    phases: list[Phase], source_rows: dict[str, range], without: np.ndarray, seed: int
) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of each phase in the store's order, window by window, each with the number of its phase.

    A row that is taken more than once comes in another window each time, so that no block is full of it.

    Args:
        source_rows: the numbers of each source's rows in the store.
        without: rows never to be taken, sorted.
    """
    for number, phase in enumerate(phases):
        for path in (path for path in source_rows if path in phase):
            before, after = progress_of(path, phases)[number : number + 2]
            for low, high in pairwise([before, *range(int(before) + 1, math.ceil(after)), after]):
                for window in windows_of(source_rows[path], without):
                    yield number, window[times_taken(window, seed, low, high) > 0]
