"""mini_qwen/cache.py: each file is prepared once, by one process, and a preparation killed half-way goes on."""

import ast
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WriteRows, toy_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from mini_qwen import cache, mixture
from mini_qwen.cache import Part, Preparation, build_once, map_ahead, prepare_parts
from mini_qwen.conversations import ConversationData, conversation_preparation
from mini_qwen.documents import document_preparation
from mini_qwen.preferences import pair_preparation
from mini_qwen.rows import Row
from mini_qwen.store import STATE, StoreWriter, TokenStore
from mini_qwen.tokenizer import train_tokenizer

TEXTS = toy_texts()
MAX_LENGTH = 60
BATCH_SIZE = 2
processes = multiprocessing.get_context("fork")


@pytest.fixture(scope="module", autouse=True)
def small_batches() -> Iterator[None]:
    """Two rows a batch, and a commit after every one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "BATCH_SIZE", BATCH_SIZE)
        patch.setattr(cache, "SECONDS_BETWEEN_COMMITS", -1.0)
        patch.setattr(cache, "ROWS_TRIED", 0)
        yield


def rows_for(stage: str) -> list[dict[str, Any]]:
    """Twenty-four rows, some of which are dropped, and for DPO some that become one pair with another."""
    if stage == "pt":
        return [{"text": text} for text in [*TEXTS[:10], "", *TEXTS[10:20], None, *TEXTS[20:22]]]
    turns = [[("human", question), ("gpt", answer)] for question, answer in zip(TEXTS, TEXTS[20:], strict=False)]
    if stage == "sft":
        rows = [*turns[:9], [("human", "alone")], *turns[9:], [("gpt", "first")], *turns[:3]]
        return [{"conversations": [{"from": role, "value": text} for role, text in row]} for row in rows]
    rated = [{"prompt": f"{n // 2 % 4}?", "completion": f"answer {n}", "label": n % 2 == 0} for n in range(16)]
    pairs = [{"prompt": text, "chosen": "good", "rejected": "bad" if text != TEXTS[3] else "good"} for text in TEXTS]
    return [row for both in zip(rated, pairs, strict=False) for row in both]


def preparation_for(stage: str, tokenizer: PreTrainedTokenizerBase) -> Preparation:
    if stage == "pt":
        return document_preparation(tokenizer)
    if stage == "sft":
        return conversation_preparation(ConversationData(train_files=[]), tokenizer, MAX_LENGTH)
    return pair_preparation(tokenizer, MAX_LENGTH)


class Watch:
    """A preparation of which every encoded row is remembered by its number, and which may fail on one of them."""

    def __init__(self, inner: Preparation) -> None:
        self.inner = inner
        self.encoded: list[int] = []
        self.fails_at: dict[tuple[str, int], BaseException] = {}

    def fail(self, where: str, number: int) -> None:
        if error := self.fails_at.get((where, number)):
            raise error

    def read(self, file: Path) -> Iterator[Row]:
        for number, row in enumerate(self.inner.read(file)):
            self.fail("read", number)
            yield row

    def encode(self, rows: list[Row]) -> Any:
        for row in rows:
            self.fail("encode", row.number)
        self.encoded += [row.number for row in rows]
        return self.inner.encode(rows)

    @property
    def preparation(self) -> Preparation:
        return self.inner._replace(read=self.read, encode=self.encode)


def prepare(folder: Path, file: Path, preparation: Preparation) -> Part:
    ((part,),) = prepare_parts(str(folder), {"source": [file]}, preparation).values()
    return part


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def committed_rows(folder: Path) -> int:
    """How many rows of the file the unfinished folder has for certain."""
    (unfinished,) = folder.glob("*.partial")
    state = unfinished / STATE
    return BATCH_SIZE * json.loads(state.read_text(encoding="utf-8"))["num_batches"] if state.exists() else 0


STAGES = ("pt", "sft", "dpo")


@pytest.mark.parametrize("stage", STAGES)
def test_prepared_once_and_then_found(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path, stage: str
) -> None:
    file = write_rows("rows.jsonl", rows_for(stage))
    watch = Watch(preparation_for(stage, tokenizer))
    first = prepare(tmp_path / "cache", file, watch.preparation)
    assert len(watch.encoded) >= 20
    watch.encoded.clear()
    again = prepare(tmp_path / "cache", file, watch.preparation)
    assert (again, watch.encoded) == (first, [])
    assert STATE not in contents(first.folder)
    token_rows, ledger = watch.inner.encode(list(watch.inner.read(file)))
    store = TokenStore([first.folder])
    assert [store.row(index).tolist() for index in range(len(store))] == [row.ids.tolist() for row in token_rows]
    assert first.num_tokens == store.num_tokens == sum(len(row.ids) for row in token_rows)
    ledger.files = 1
    assert first.ledger == ledger
    assert ledger.rows_kept and ledger.rows_dropped and ledger.first_places


def test_a_file_without_rows_is_prepared_and_counted(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    part = prepare(tmp_path, write_rows("rows.json", []), document_preparation(tokenizer))
    assert (part.ledger.files, part.ledger.files_without_rows, part.ledger.rows_read, part.num_tokens) == (1, 1, 0, 0)
    assert len(TokenStore([part.folder])) == 0


def test_only_a_file_that_is_new_is_prepared(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    files = [write_rows(f"{number}.jsonl", rows_for("pt")[number:]) for number in range(3)]
    watch = Watch(document_preparation(tokenizer))
    before = prepare_parts(str(tmp_path / "cache"), {"a": files[:1], "b": files[2:]}, watch.preparation)
    watch.encoded.clear()
    after = prepare_parts(str(tmp_path / "cache"), {"a": files[:2], "b": files[2:]}, watch.preparation)
    assert sorted(watch.encoded) == list(range(23))
    assert after == {"a": [before["a"][0], after["a"][1]], "b": before["b"]}
    assert list(after) == ["a", "b"]


def test_the_beginnings_of_all_files_are_tried_before_the_first_is_prepared(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "ROWS_TRIED", 3)
    good = write_rows("a.jsonl", rows_for("pt"))
    bad = write_rows("b.jsonl", [{"text": "a"}, {"text": "b"}, {"text": 3}])
    with pytest.raises(SystemExit, match=r"b\.jsonl, row 2"):
        prepare_parts(str(tmp_path / "cache"), {"a": [good], "b": [bad]}, document_preparation(tokenizer))
    assert not (tmp_path / "cache").exists()


def test_a_missing_column_is_said_before_any_row_is_read(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    watch = Watch(document_preparation(tokenizer))
    files = [write_rows("a.jsonl", rows_for("pt")), write_rows("b.jsonl", [{"content": "a"}])]
    with pytest.raises(SystemExit, match=r"b\.jsonl lacks the column 'text'"):
        prepare_parts(str(tmp_path / "cache"), {"a": files}, watch.preparation)
    assert watch.encoded == []


def test_anything_that_matters_makes_another_folder(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows("rows.jsonl", [{"text": "Anna"}])
    same = document_preparation(tokenizer)

    def prepared(preparation: Preparation = same) -> Path:
        return prepare(tmp_path / "cache", file, preparation).folder

    folders = [prepared(), prepared(same._replace(settings={"max_length": 1}))]
    folders += [prepared(same._replace(settings={"max_length": 2})), prepared(same._replace(stage="other"))]
    folders.append(prepared(document_preparation(train_tokenizer(["x"], 259))))
    times = file.stat()
    write_rows("rows.jsonl", [{"text": "Anne"}])  # as many bytes
    folders.append(prepared())
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    write_rows("rows.jsonl", [{"text": "Annabel"}])
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # another size at the same time
    folders.append(prepared())
    os.utime(file, ns=(0, 0))
    folders.append(prepared())
    file = file.rename(tmp_path / "other.jsonl")
    folders.append(prepared())
    monkeypatch.setattr(tokenizer, "chat_template", "another")
    folders.append(prepared())
    assert len(set(folders)) == len(folders)


def test_the_same_file_by_another_name_is_the_same(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(document_preparation(tokenizer))
    file = write_rows("rows.jsonl", rows_for("pt"))
    first = prepare(tmp_path / "cache", file, watch.preparation)
    monkeypatch.chdir(tmp_path)
    assert prepare(Path("cache"), Path("rows.jsonl"), watch.preparation).folder.name == first.folder.name
    assert len(watch.encoded) == 24


def test_using_the_tokenizer_changes_nothing(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    """Within one run it is used between the preparation of one data set and the next."""
    watch = Watch(document_preparation(tokenizer))
    file = write_rows("rows.jsonl", rows_for("pt"))
    folders = [prepare(tmp_path / "cache", file, watch.preparation).folder]
    tokenizer(["a", "b c d"], split_special_tokens=True)
    folders.append(prepare(tmp_path / "cache", file, watch.preparation).folder)
    tokenizer.pad({"input_ids": [[1], [2, 3]]})
    tokenizer(["a", "b c d"], truncation=True, max_length=2, padding=True)
    folders.append(prepare(tmp_path / "cache", file, watch.preparation).folder)
    tokenizer(["a", "b c d"])  # else the next test would find it cut short
    assert len(set(folders)) == 1
    assert len(watch.encoded) == 24


PACKAGE = Path(cache.__file__).parent


def modules_behind(name: str, found: set[str]) -> set[str]:
    """The modules of the package that this one imports, and those that these import in turn."""
    if name not in found and (PACKAGE / f"{name}.py").exists():
        found.add(name)
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "mini_qwen":
                for alias in node.names:
                    modules_behind(alias.name, found)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mini_qwen."):
                modules_behind(str(node.module).partition(".")[2], found)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    modules_behind(alias.name.removeprefix("mini_qwen."), found)
    return found


def test_every_module_that_makes_rows_or_blocks_is_part_of_their_names() -> None:
    """All that the preparations reach by imports, but for what decides no row.

    That are the order in which a trainer goes through the pairs, and hashes of files.
    """
    found: set[str] = set()
    for name in ("documents", "conversations", "preferences"):
        modules_behind(name, found)
    assert "rows" in found and "mixture" in found
    assert {*cache.ROW_MODULES, *mixture.BLOCK_MODULES} == found - {"sampler", "integrity"}
    assert not set(cache.ROW_MODULES) & set(mixture.BLOCK_MODULES)


@pytest.mark.parametrize("module", cache.ROW_MODULES)
def test_an_edit_of_a_module_that_makes_rows_makes_them_anew(
    tokenizer: PreTrainedTokenizerBase,
    write_rows: WriteRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(cache, "__file__", str(package / "cache.py"))
    for name in cache.ROW_MODULES:
        (package / f"{name}.py").touch()
    file = write_rows("rows.jsonl", [{"text": "Anna"}])
    folders = []
    for content in ("one = 1", "one = 1", "one = 2"):
        (package / f"{module}.py").write_text(content, encoding="utf-8")
        folders.append(prepare(tmp_path / "cache", file, document_preparation(tokenizer)).folder)
    assert folders[0] == folders[1] != folders[2]


@pytest.fixture(scope="module")
def uninterrupted(
    tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[str, bytes]]]:
    """Of each stage a file of rows, and what its preparation leaves in one go."""
    made = {}
    for stage in STAGES:
        folder = tmp_path_factory.mktemp(stage)
        file = folder / "rows.json"
        file.write_text(json.dumps(rows_for(stage)), encoding="utf-8")
        made[stage] = file, contents(prepare(folder / "cache", file, preparation_for(stage, tokenizer)).folder)
    return made


Uninterrupted = dict[str, tuple[Path, dict[str, bytes]]]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("where", ["read", "encode"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_preparation_is_no_complete_one_and_goes_on_from_its_commit(
    tokenizer: PreTrainedTokenizerBase,
    uninterrupted: Uninterrupted,
    tmp_path: Path,
    stage: str,
    where: str,
    error: type[BaseException],
) -> None:
    file, expected = uninterrupted[stage]
    watch = Watch(preparation_for(stage, tokenizer))
    watch.fails_at[where, 17] = error("stopped")
    with pytest.raises(error, match="stopped"):
        prepare(tmp_path, file, watch.preparation)
    committed = committed_rows(tmp_path)
    assert where == "read" or committed >= 12  # the batches before that of row 17, in the order in which they came
    assert [path.suffix for path in tmp_path.iterdir() if path.name != "locks"] == [".partial"]
    watch.fails_at.clear()
    watch.encoded.clear()
    part = prepare(tmp_path, file, watch.preparation)
    every = [row.number for row in watch.inner.read(file)]
    assert sorted(watch.encoded) == sorted(every[committed:])
    assert contents(part.folder) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["locks", part.folder.name])


def run_in_child(target: Callable[..., None], *args: Any) -> Any:
    child = processes.Process(target=target, args=args, daemon=True)
    child.start()
    return child


def kill_at(owner: Any, name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this process is killed, as by `kill -9`, when the function is called for the `number`-th time."""
    function, calls = getattr(owner, name), itertools.count(1)

    def deadly(*args: Any, **keys: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **keys)

    monkeypatch.setattr(owner, name, deadly)


MOMENTS: dict[str, tuple[Any, str]] = {
    "a batch is encoded": (Watch, "encode"),
    "rows are added": (StoreWriter, "add"),
    "a commit begins": (StoreWriter, "commit"),
    "a commit takes effect": (Path, "replace"),
    "the ledger is written": (Path, "write_text"),
    "the store is closed": (StoreWriter, "close"),
    "the folder gets its name": (Path, "rename"),
}


@settings(max_examples=60)
@given(
    stage=st.sampled_from(STAGES),
    kills=st.lists(st.tuples(st.sampled_from(sorted(MOMENTS)), st.integers(1, 14)), min_size=1, max_size=3),
)
def test_a_preparation_killed_at_any_moment_goes_on_to_the_same_rows(
    tokenizer: PreTrainedTokenizerBase,
    uninterrupted: Uninterrupted,
    tmp_path_factory: pytest.TempPathFactory,
    stage: str,
    kills: list[tuple[str, int]],
) -> None:
    """Killed up to three times; a moment that does not come so often is a preparation that is not killed."""
    file, expected = uninterrupted[stage]
    folder = tmp_path_factory.mktemp("killed")

    def prepare_and_die(moment: str, number: int) -> None:
        kill_at(*MOMENTS[moment], number, pytest.MonkeyPatch())
        prepare(folder, file, Watch(preparation_for(stage, tokenizer)).preparation)

    for moment, number in kills:
        child = run_in_child(prepare_and_die, moment, number)
        child.join(timeout=60)
        assert child.exitcode in (-signal.SIGKILL, 0)
        complete = [path for path in folder.glob(f"{stage}-*") if path.suffix != ".partial"]
        assert len(complete) == (child.exitcode == 0)
        if complete:
            assert contents(complete[0]) == expected
            return
    committed = committed_rows(folder) if [*folder.glob("*.partial")] else 0
    watch = Watch(preparation_for(stage, tokenizer))
    part = prepare(folder, file, watch.preparation)
    every = [row.number for row in watch.inner.read(file)]
    assert sorted(watch.encoded) == sorted(every[committed:])
    assert contents(part.folder) == expected
    assert sorted(path.name for path in folder.iterdir()) == sorted(["locks", part.folder.name])


class Slow(Watch):
    """A preparation that takes its time, and writes the numbers of encoded rows to a file for all processes to see."""

    def __init__(self, inner: Preparation, log: Path, seconds: float) -> None:
        super().__init__(inner)
        self.log, self.seconds = log, seconds

    def encode(self, rows: list[Row]) -> Any:
        time.sleep(self.seconds if rows else 0)
        with self.log.open("a", encoding="utf-8") as log:
            log.write("".join(f"{row.number}\n" for row in rows))
        return super().encode(rows)


def wait_for(is_so: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_two_processes_at_once_prepare_once(
    tokenizer: PreTrainedTokenizerBase,
    uninterrupted: Uninterrupted,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    file, expected = uninterrupted["pt"]
    log, found = tmp_path / "log", processes.Queue()
    together = processes.Barrier(2)

    def work() -> None:
        slow = Slow(document_preparation(tokenizer), log, seconds=0.3)  # 12 batches, 1.8 seconds on two cores
        together.wait()
        found.put(prepare(tmp_path / "cache", file, slow.preparation))

    children = [run_in_child(work) for _ in range(2)]
    parts = [found.get(timeout=60) for _ in children]
    for child in children:
        child.join(timeout=60)
        assert child.exitcode == 0
    assert parts[0] == parts[1]
    assert contents(parts[0].folder) == expected
    assert sorted(map(int, log.read_text(encoding="utf-8").split())) == list(range(24))
    if "waiting" in (shown := capfd.readouterr().out):
        assert shown.count(f"another process is preparing {parts[0].folder}; waiting for it") == 1


def test_who_waits_goes_on_where_the_first_was_killed(
    tokenizer: PreTrainedTokenizerBase, uninterrupted: Uninterrupted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, expected = uninterrupted["pt"]
    folder, logs = tmp_path / "cache", [tmp_path / "first", tmp_path / "second"]
    found = processes.Queue()

    def work(log: Path, seconds: float) -> None:
        found.put(prepare(folder, file, Slow(document_preparation(tokenizer), log, seconds).preparation))

    first = run_in_child(work, logs[0], 0.5)
    wait_for(lambda: [*folder.glob("*.partial")])
    second = run_in_child(work, logs[1], 0.0)
    wait_for(lambda: committed_rows(folder))
    shown = ""

    def is_waiting() -> bool:
        nonlocal shown
        shown += capfd.readouterr().out
        return "another process is preparing" in shown

    wait_for(is_waiting)
    assert logs[1].read_text(encoding="utf-8") == ""
    assert first.is_alive()
    first.kill()
    part = found.get(timeout=60)
    second.join(timeout=60)
    encoded = sorted(map(int, logs[1].read_text(encoding="utf-8").split()))
    assert encoded == list(range(encoded[0], 24))
    assert encoded[0] >= 2
    assert contents(part.folder) == expected


def test_a_folder_is_built_once_and_never_half(tmp_path: Path) -> None:
    folder, calls = tmp_path / "new" / "folder", []

    def build(unfinished: Path) -> None:
        calls.append(sorted(path.name for path in unfinished.iterdir()) if unfinished.exists() else None)
        unfinished.mkdir(exist_ok=True)
        (unfinished / f"file {len(calls)}").touch()
        if len(calls) < 3:
            raise OSError("disk full")

    for _ in range(2):
        with pytest.raises(OSError, match="disk full"):
            build_once(folder, build)
        assert not folder.exists()
    assert build_once(folder, build) == build_once(folder, build) == folder
    assert calls == [None, ["file 1"], ["file 1", "file 2"]]  # what the last build left is there for the next
    assert sorted(path.name for path in folder.iterdir()) == ["digest", "file 1", "file 2", "file 3"]


@given(items=st.lists(st.integers(), max_size=40), delays=st.integers(0, 3))
@settings(max_examples=25)
def test_mapped_ahead_is_mapped_in_order(items: list[int], delays: int) -> None:
    def slow(item: int) -> tuple[int, int]:
        time.sleep(item * delays % 7 / 5000)
        return item, threading.get_ident()

    assert [item for item, _ in map_ahead(slow, items)] == items


@pytest.mark.parametrize("where", ["function", "items"])
def test_an_error_comes_out_in_its_turn(where: str) -> None:
    def items() -> Iterator[int]:
        yield from range(50)
        if where == "items":
            raise OSError("broken")
        yield from range(50, 60)

    def function(item: int) -> int:
        if where == "function" and item == 7:
            raise OSError("broken")
        return item

    results = []
    with pytest.raises(OSError, match="broken"):
        for result in map_ahead(function, items()):
            results.append(result)
    assert results == list(range(7)) if where == "function" else results == list(range(len(results)))


def test_only_a_few_items_are_read_ahead() -> None:
    taken = []

    def items() -> Iterable[int]:
        for item in range(100):
            taken.append(item)
            yield item

    num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for done, _ in enumerate(map_ahead(np.sqrt, items())):
        assert len(taken) <= done + 2 * num_workers + 1
    assert len(taken) == 100
