"""mini_qwen/mixture.py: sources are taken exactly as often as asked, held-out rows never, and the ledger says so."""

import math
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_qwen import cache, mixture, store
from mini_qwen.blocks import Blocks
from mini_qwen.cache import Part
from mini_qwen.ledger import Ledger
from mini_qwen.mixture import (
    Arrangement,
    Phase,
    arrange,
    find_sources,
    phase_rows,
    progress_of,
    read_phases,
    times_taken,
    uniform,
)
from mini_qwen.packing import cut, fit, one_each
from mini_qwen.store import StoreWriter, TokenStore
from mini_qwen.twins import choose_held_out, find_twins

PASSES = st.one_of(st.sampled_from([0.1, 0.2, 0.5, 0.9, 1.0, 2.0, 2.5]), st.floats(1e-6, 4.0))
PHASES = st.lists(st.dictionaries(st.sampled_from("abc"), PASSES, min_size=1), min_size=1, max_size=3)
SEEDS = st.integers(0, 2**32 - 1)
PACKERS = {"cut": cut, "best_fit": partial(fit, fill=True), "none": one_each}


@given(seed=SEEDS, rows=st.lists(st.integers(0, 2**40), max_size=20))
def test_a_rows_place_is_a_function_of_the_row_and_the_seed(seed: int, rows: list[int]) -> None:
    places = uniform(np.array(rows, np.int64), seed)
    assert ((places >= 0) & (places < 1)).all()
    assert places.tolist() == [float(uniform(np.array([row]), seed)[0]) for row in rows]
    assert not set(places.tolist()) & set(uniform(np.array(rows, np.int64), seed + 1).tolist())


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_places_are_spread_evenly_and_say_nothing_of_each_other(seed: int) -> None:
    """100,000 numbers: a tenth of them in each tenth, give or take 5 standard deviations of 95."""
    places = uniform(np.arange(100_000), seed)
    assert np.abs(np.histogram(places, 10, (0, 1))[0] - 10_000).max() < 475
    for others in (uniform(np.arange(1, 100_001), seed), uniform(np.arange(100_000), seed + 1)):
        assert abs(np.corrcoef(places, others)[0, 1]) < 5 / math.sqrt(100_000)


@settings(max_examples=200)
@given(seed=SEEDS, edges=st.lists(st.floats(0, 6), min_size=2, max_size=6).map(sorted))
def test_what_is_taken_in_parts_is_what_is_taken_at_once(seed: int, edges: list[float]) -> None:
    rows = np.arange(300)
    parts = [times_taken(rows, seed, before, after) for before, after in pairwise(edges)]
    assert all((part >= 0).all() for part in parts)
    assert sum(parts).tolist() == times_taken(rows, seed, edges[0], edges[-1]).tolist()


@given(seed=SEEDS, share=st.floats(0, 1), passes=st.integers(1, 4))
def test_a_share_of_a_source_and_its_complement_are_all_of_it_and_disjoint(
    seed: int, share: float, passes: int
) -> None:
    rows = np.arange(300)
    first, second = times_taken(rows, seed, 0.0, share), times_taken(rows, seed, share, 1.0)
    assert (first + second).tolist() == [1] * 300
    assert times_taken(rows, seed, 0.0, passes).tolist() == [passes] * 300


@given(seed=SEEDS, passes=st.floats(0, 5))
def test_no_row_is_taken_more_than_once_more_than_another(seed: int, passes: float) -> None:
    times = times_taken(np.arange(300), seed, 0.0, passes)
    assert set(times.tolist()) <= {math.floor(passes), math.floor(passes) + 1}


def test_shares_are_what_they_say() -> None:
    """Of 100,000 rows, give or take 5 standard deviations of at most 158."""
    rows = np.arange(100_000)
    for share in (0.01, 0.5, 0.9):
        assert abs(times_taken(rows, 1, 0.0, share).sum() - share * 100_000) < 790
    twice_and_half = Counter(times_taken(rows, 1, 0.0, 2.5).tolist())
    assert set(twice_and_half) == {2, 3}
    assert abs(twice_and_half[3] - 50_000) < 790


def test_progress_is_free_of_rounding_errors() -> None:
    assert progress_of("a", [{"a": 0.7}, {"b": 1.0}, {"a": 0.2}, {"a": 0.1}]) == [0.0, 0.7, 0.7, 0.9, 1.0]
    assert progress_of("a", [{"a": 0.1}, {"a": 0.7}]) == [0.0, 0.1, 0.8]  # 0.1 + 0.7 is 0.7999999999999999
    assert progress_of("a", [{"a": 0.12345678}]) == [0.0, 0.12345678]


@pytest.mark.parametrize(
    ("given_as", "phases"),
    [
        (["a", "b", "a"], [{"a": 1.0, "b": 1.0}]),
        ({"a": 0.5, "b": 2}, [{"a": 0.5, "b": 2}]),
        ([{"a": 0.9}, {"a": 0.1, "b": 1}], [{"a": 0.9}, {"a": 0.1, "b": 1}]),
    ],
)
def test_the_three_forms_of_train_files(given_as: Any, phases: list[Phase]) -> None:
    assert read_phases(given_as) == phases


@pytest.mark.parametrize("passes", [0, -1.5, math.nan, math.inf])
@pytest.mark.parametrize("several", [False, True])
def test_a_weight_that_is_none_names_path_value_and_cure(passes: float, several: bool) -> None:
    bad = {"data/good": 1.0, "data/bad": passes}
    with pytest.raises(SystemExit) as error:
        read_phases([{"a": 1.0}, bad] if several else bad)
    assert "'data/bad'" in str(error.value)
    assert f"{passes} times" in str(error.value)
    assert "above 0" in str(error.value)


@pytest.mark.parametrize("nothing", [[], {}, [{}], [{"a": 1.0}, {}]])
def test_an_empty_mixture_is_refused(nothing: Any) -> None:
    with pytest.raises(SystemExit, match="train_files.*empty"):
        read_phases(nothing)


def test_a_file_below_two_paths_belongs_to_the_first(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a/1.jsonl", "a/b/2.jsonl", "a/b/3.jsonl", "c/4.jsonl")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    inner, outer, single = str(tmp_path / "a/b"), str(tmp_path / "a"), str(files[3])
    sources = find_sources([{inner: 2.0}, {single: 1.0, outer: 1.0, inner: 0.5}])
    assert sources == {inner: files[1:3], single: [files[3]], outer: [files[0]]}
    assert list(sources) == [inner, single, outer]


def test_a_file_by_another_name_is_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a/1.jsonl").touch()
    (tmp_path / "b/2.jsonl").touch()
    (tmp_path / "b/link.jsonl").symlink_to(tmp_path / "a/1.jsonl")
    first, second = f"{tmp_path}/b/../a", str(tmp_path / "b")
    assert find_sources([{first: 1.0, second: 1.0}])[second] == [tmp_path / "b/2.jsonl"]


def test_a_path_that_has_no_file_of_its_own_is_refused(tmp_path: Path) -> None:
    """Else its weight would be ignored."""
    (tmp_path / "good").mkdir()
    (tmp_path / "good/1.jsonl").touch()
    with pytest.raises(SystemExit, match=r"All files of '.*/good'.*before"):
        find_sources([{str(tmp_path): 1.0, str(tmp_path / "good"): 2.0}])


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no data at '.*nowhere'"):
        find_sources([{str(tmp_path / "nowhere"): 1.0}])


@given(num_rows=st.integers(1, 200), data=st.data(), seed=SEEDS)
def test_held_out_rows_are_distinct_and_as_many_as_asked(num_rows: int, data: st.DataObject, seed: int) -> None:
    eval_rows = data.draw(st.integers(0, num_rows - 1))
    held_out = choose_held_out(num_rows, eval_rows, seed).tolist()
    assert len(held_out) == len(set(held_out)) == eval_rows
    assert held_out == sorted(held_out)
    assert set(held_out) <= set(range(num_rows))
    assert choose_held_out(num_rows, eval_rows, seed).tolist() == held_out


def test_another_seed_holds_out_other_rows() -> None:
    assert len({tuple(choose_held_out(1000, 10, seed).tolist()) for seed in range(20)}) == 20
    drawn = Counter(row for seed in range(500) for row in choose_held_out(10, 3, seed).tolist())
    assert set(drawn) == set(range(10))
    assert min(drawn.values()) > 100  # each 150 times, give or take 5 standard deviations of 10


@pytest.mark.parametrize(("num_rows", "eval_rows"), [(10, 10), (10, 11), (0, 1), (10, -1)])
def test_holding_out_all_rows_or_more_is_refused_with_both_numbers(num_rows: int, eval_rows: int) -> None:
    with pytest.raises(SystemExit, match=rf"eval_rows is {eval_rows}\b.*\b{num_rows} usable"):
        choose_held_out(num_rows, eval_rows, seed=0)


def test_nothing_is_held_out_of_nothing() -> None:
    assert choose_held_out(0, 0, seed=0).tolist() == []


@settings(max_examples=150)
@given(
    phases=PHASES,
    num_rows=st.lists(st.integers(0, 40), min_size=3, max_size=3),
    share_out=st.floats(0, 0.5),
    seed=SEEDS,
    window=st.integers(1, 50),
)
def test_each_phase_takes_its_sources_and_all_phases_together_take_what_was_asked(
    phases: list[Phase], num_rows: list[int], share_out: float, seed: int, window: int
) -> None:
    ends = np.cumsum([0, *num_rows]).tolist()
    source_rows = {path: range(*pair) for path, pair in zip("abc", pairwise(ends), strict=True)}
    held_out = choose_held_out(ends[-1] + 1, int(share_out * ends[-1]), seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "WINDOW", window)
        windows = list(phase_rows(phases, source_rows, held_out, seed))
    assert [number for number, _ in windows] == sorted(number for number, _ in windows)
    for number, rows in windows:
        assert len(rows) <= window
        assert rows.tolist() == sorted(set(rows.tolist()))  # no row twice
        assert all(any(row in source_rows[path] for path in phases[number]) for row in rows.tolist())
    taken = Counter(row for _, rows in windows for row in rows.tolist())
    assert not set(taken) & set(held_out.tolist())
    for path, rows in source_rows.items():
        asked = round(sum(phase.get(path, 0.0) for phase in phases), 9)
        free = set(rows) - set(held_out.tolist())
        assert {taken[row] for row in free} <= {math.floor(asked), math.ceil(asked)}


def test_windows_do_not_change_what_is_taken() -> None:
    phases = [{"a": 0.5, "b": 1.0}, {"a": 1.7}]
    taken = []
    for window in (3, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "WINDOW", window)
            windows = phase_rows(phases, {"a": range(100), "b": range(100, 130)}, np.array([4, 99, 100]), 1)
            taken.append(Counter((number, row) for number, rows in windows for row in rows.tolist()))
    assert taken[0] == taken[1]


# Sources of several files, whose tokens tell their row and place: 100 x row + place.
Lengths = dict[str, list[list[int]]]
LENGTHS = st.fixed_dictionaries(
    {path: st.lists(st.lists(st.integers(1, 20), max_size=6), min_size=1, max_size=2) for path in "abc"}
)


def write_parts(folder: Path, lengths: Lengths) -> tuple[dict[str, list[Part]], list[tuple[str, list[int]]]]:
    """The prepared files of each source, and the source and tokens of every row."""
    sources: dict[str, list[Part]] = {}
    rows: list[tuple[str, list[int]]] = []
    for path, files in lengths.items():
        for number, file in enumerate(files):
            writer = StoreWriter(folder / f"pt-{path}{number}", flags=False)
            made = [list(range(100 * (len(rows) + at), 100 * (len(rows) + at) + n)) for at, n in enumerate(file)]
            writer.add([np.array(row) for row in made])
            writer.close()
            rows += [(path, row) for row in made]
            ledger = Ledger(files=1, rows_read=len(file) + 1, rows_kept=len(file), tokens_read=sum(file))
            ledger.rows_dropped["empty text"] += 1
            sources.setdefault(path, []).append(Part(folder / f"pt-{path}{number}", ledger))
    return sources, rows


def plan_of(phases: list[Phase], sources: dict[str, list[Part]], **changes: Any) -> Arrangement:
    packing = changes.pop("packing", "cut")
    values = {"eval_rows": 0, "held_out_of": list(sources), "block_size": 7, "isolate": True, "seed": 1} | changes
    return Arrangement(phases=phases, packing=packing, pack=PACKERS[packing], **values)


def tokens_of(blocks: Blocks) -> list[int]:
    return [int(token) for block in blocks for token in block["input_ids"]]


@settings(max_examples=120)
@given(
    lengths=LENGTHS,
    phases=PHASES,
    eval_rows=st.integers(0, 4),
    first_source_only=st.booleans(),
    packing=st.sampled_from(sorted(PACKERS)),
    block_size=st.integers(2, 12),
    isolate=st.booleans(),
    seed=SEEDS,
)
def test_blocks_and_ledger_are_what_was_asked_for(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: Lengths,
    phases: list[Phase],
    eval_rows: int,
    first_source_only: bool,
    packing: str,
    block_size: int,
    isolate: bool,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    sources, rows = write_parts(folder, lengths)
    held_out_of = list(sources)[:1] if first_source_only else list(sources)
    eval_rows = min(eval_rows, max(0, sum(path in held_out_of for path, _ in rows) - 1))
    options = {"eval_rows": eval_rows, "held_out_of": held_out_of, "packing": packing}
    plan = plan_of(phases, sources, **options, block_size=block_size, isolate=isolate, seed=seed)
    train, held, ledger = arrange(str(folder), "pt", sources, plan)

    # What the blocks hold: of each row, every token equally often but those of the stated tail.
    found = Counter(tokens_of(train))
    unseen = set(tokens_of(held)) if held is not None else set()
    tail = ledger.tokens_dropped.total()
    assert (held is None) == (eval_rows == 0)
    assert not unseen & set(found)
    assert {token // 100 for token in unseen} <= {n for n, (path, _) in enumerate(rows) if path in held_out_of}
    asked = {path: progress_of(path, phases)[-1] for path in "abc"}
    held_rows = set(choose_held_out(sum(path in held_out_of for path, _ in rows), eval_rows, seed).tolist())
    expected = Counter()
    for number, (path, row) in enumerate(rows):
        if number not in held_rows:
            (times,) = times_taken(np.array([number]), seed, 0.0, asked[path]).tolist()
            assert times in (math.floor(asked[path]), math.ceil(asked[path]))
            expected.update(dict.fromkeys(row, times))
    assert found <= expected
    assert (expected - found).total() == tail < block_size
    assert packing != "none" or tail == 0

    # What the ledger says of it.
    labels = np.concatenate([block["labels"] for block in train]) if len(train) else np.empty(0)
    kept_rows = {number for number, (_, row) in enumerate(rows) if expected[row[0]] > 0}
    assert ledger.blocks == len(train)
    assert ledger.tokens_trained == (labels != -100).sum()
    assert ledger.tokens_masked == (labels == -100).sum()
    assert ledger.rows_kept == len(kept_rows)
    assert ledger.rows_held_out == len(held_rows) == eval_rows
    assert ledger.rows_unused == len(rows) - len(kept_rows) - len(held_rows)
    assert ledger.tokens_held_out == sum(len(rows[number][1]) for number in held_rows)
    assert ledger.tokens_read == sum(len(row) for _, row in rows)
    assert ledger.tokens_repeated == sum(times - 1 for times in expected.values() if times)
    assert ledger.files == ledger.rows_dropped["empty text"] == sum(len(files) for files in lengths.values())
    by_source = Counter()
    for token, times in found.items():
        by_source[rows[token // 100][0]] += times
    assert ledger.tokens_by_source == by_source
    if ledger.rows_kept:
        ledger.check(max_drop_share=1.0)


@given(
    parts=st.lists(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=4), max_size=8), min_size=1, max_size=3),
    draws=st.sets(st.integers(0, 23)),
    window=st.sampled_from([3, 100]),
)
def test_twins_are_the_rows_with_the_tokens_of_a_held_out_one(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[list[int]]], draws: set[int], window: int
) -> None:
    folder = tmp_path_factory.mktemp("store")
    for number, rows in enumerate(parts):
        writer = StoreWriter(folder / str(number), flags=False)
        writer.add([np.array(row) for row in rows])
        writer.close()
    everything = [tuple(row) for rows in parts for row in rows]
    held_out = np.array(sorted(draw for draw in draws if draw < len(everything)), np.int64)
    held = {everything[number] for number in held_out.tolist()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "WINDOW", window)
        found = find_twins(TokenStore([folder / str(number) for number in range(len(parts))]), held_out).tolist()
    expected = [number for number, row in enumerate(everything) if row in held and number not in held_out]
    assert found == expected


def test_twins_of_held_out_rows_are_not_trained_on(tmp_path: Path) -> None:
    """In whichever source they are, and counted."""
    texts = [[1, 2, 3], [4, 5], [1, 2, 3], [6, 7, 8, 9], [4, 5]]
    sources = {}
    for path in "ab":
        writer = StoreWriter(tmp_path / f"pt-{path}", flags=False)
        writer.add([np.array(text) for text in texts])
        writer.close()
        ledger = Ledger(files=1, rows_read=5, rows_kept=5, tokens_read=14)
        sources[path] = [Part(tmp_path / f"pt-{path}", ledger)]
    plan = plan_of([{"a": 1.0, "b": 2.0}], sources, eval_rows=1, packing="none", block_size=9)
    train, held, ledger = arrange(str(tmp_path), "pt", sources, plan)
    (row,) = [block["input_ids"].tolist() for block in held]
    assert row not in [block["input_ids"].tolist() for block in train]
    num_twins = 2 * texts.count(row) - 1
    assert ledger.rows_like_held_out == num_twins and ledger.tokens_like_held_out == num_twins * len(row)
    assert ledger.rows_kept == 10 - 1 - num_twins
    ledger.check(max_drop_share=0.0)


def test_rows_that_only_just_miss_a_share_are_counted_as_they_are_taken(tmp_path: Path) -> None:
    """A share with more digits than are kept: the ledger must round it as the selection does."""
    sources, rows = write_parts(tmp_path, {"a": [[5] * 40]})
    places = sorted(uniform(np.arange(len(rows)), 1).tolist())
    for place in places[1:]:
        share = place + 1e-12 if round(place, 9) < place else place - 1e-12
        assert (share < place) != (round(share, 9) < place)
        plan = plan_of([{"a": share}], sources, packing="none")
        train, _, ledger = arrange(str(tmp_path), "pt", sources, plan)
        ledger.check(max_drop_share=1.0)
        assert ledger.rows_kept == len({token // 100 for token in tokens_of(train)})


def test_no_block_is_full_of_one_row_that_is_taken_many_times(tmp_path: Path) -> None:
    sources, _ = write_parts(tmp_path, {"a": [[3] * 20]})
    plan = plan_of([{"a": 4.0}], sources, packing="best_fit", block_size=9)
    blocks, _, _ = arrange(str(tmp_path), "pt", sources, plan)
    assert len(tokens_of(blocks)) == 4 * 20 * 3
    for block in blocks:
        tokens = block["input_ids"].tolist()
        assert len(set(tokens)) == len(tokens)


def test_order_is_a_function_of_the_seed_alone(tmp_path: Path) -> None:
    sources, _ = write_parts(tmp_path, {"a": [[5, 6, 7] * 6], "b": [[4] * 20]})
    phases = [{"a": 1.0, "b": 0.5}, {"b": 1.0, "a": 0.5}]
    turned = [{"a": 1.0, "b": 0.5}, {"a": 0.5, "b": 1.0}]  # the same mixtures, written in another order
    orders = [
        tokens_of(
            arrange(str(tmp_path / cache_dir), "pt", sources, plan_of(mixed, sources, eval_rows=2, seed=seed))[0]
        )
        for cache_dir, mixed, seed in [
            ("one", phases, 1),
            ("two", phases, 1),
            ("three", turned, 1),
            ("one", phases, 2),
        ]
    ]
    assert orders[0] == orders[1] == orders[2] != orders[3]


def test_blocks_are_made_once_until_something_changes(tmp_path: Path) -> None:
    sources, _ = write_parts(tmp_path, {"a": [[5] * 20], "b": [[4] * 20]})
    fewer = {"a": sources["a"]}
    first = arrange(str(tmp_path), "pt", sources, plan_of([{"a": 1.0, "b": 1.0}], sources))
    made = (first[0].folder / "table").stat().st_mtime_ns
    again = arrange(str(tmp_path), "pt", sources, plan_of([{"a": 1.0, "b": 1.0}], sources))
    assert again[0].folder == first[0].folder
    assert again[2] == first[2]
    assert (first[0].folder / "table").stat().st_mtime_ns == made
    folders = [first[0].folder]
    changes = [{"seed": 2}, {"eval_rows": 1}, {"block_size": 8}, {"isolate": False}, {"packing": "none"}]
    for options in changes:
        plan = plan_of([{"a": 1.0, "b": 1.0}], sources, **options)
        folders.append(arrange(str(tmp_path), "pt", sources, plan)[0].folder)
    for phases in ([{"a": 1.0, "b": 2.0}], [{"a": 1.0}, {"b": 1.0}], [{"b": 1.0}, {"a": 1.0}]):
        folders.append(arrange(str(tmp_path), "pt", sources, plan_of(phases, sources))[0].folder)
    folders.append(arrange(str(tmp_path), "pt", fewer, plan_of([{"a": 1.0}], fewer))[0].folder)
    folders.append(arrange(str(tmp_path), "sft", sources, plan_of([{"a": 1.0, "b": 1.0}], sources))[0].folder)
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("module", mixture.BLOCK_MODULES)
def test_an_edit_of_a_module_that_makes_blocks_makes_them_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(cache, "__file__", str(package / "cache.py"))
    for name in mixture.BLOCK_MODULES:
        (package / f"{name}.py").touch()
    sources, _ = write_parts(tmp_path, {"a": [[5] * 20]})
    folders = []
    for content in ("one = 1", "one = 1", "one = 2"):
        (package / f"{module}.py").write_text(content, encoding="utf-8")
        folders.append(arrange(str(tmp_path), "pt", sources, plan_of([{"a": 1.0}], sources))[0].folder)
    assert folders[0] == folders[1] != folders[2]
