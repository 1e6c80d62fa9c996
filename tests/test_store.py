"""mini_qwen/store.py: rows come back as written, and a folder of prepared rows is complete or absent."""

import pickle
import tempfile
from pathlib import Path

import pytest
from conftest import MakeStore
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from mini_qwen import store
from mini_qwen.ledger import Ledger
from mini_qwen.store import StoreWriter, TokenStore, prepare_once
from mini_qwen.tokenizer import train_tokenizer

TOKENS = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.booleans()), max_size=8)


def rows_of(opened: TokenStore) -> list[list[int]]:
    return [opened.ids[low:high].tolist() for low, high in zip(opened.starts[:-1], opened.starts[1:], strict=True)]


@settings(max_examples=80)
@given(rows=st.lists(TOKENS, max_size=8), flags=st.booleans())
def test_rows_come_back_as_written(rows: list[list[tuple[int, bool]]], flags: bool) -> None:
    with tempfile.TemporaryDirectory() as parent:
        writer = StoreWriter(Path(parent) / "new" / "folder", flags)
        for row in rows:
            trained = [flag for _, flag in row]
            writer.add([token for token, _ in row], trained if flags else None)
        writer.close()
        opened = TokenStore(Path(parent) / "new" / "folder")
        assert rows_of(opened) == [[token for token, _ in row] for row in rows]
        assert len(opened) == len(rows)
        assert opened.lengths.tolist() == [len(row) for row in rows]
        assert opened.num_tokens == sum(map(len, rows))
        if flags and opened.num_tokens:
            assert opened.trained is not None
            assert opened.trained.tolist() == [flag for row in rows for _, flag in row]
        else:
            assert opened.trained is None


def test_a_store_travels_as_its_folders_name(make_store: MakeStore) -> None:
    carried = pickle.dumps(make_store([list(range(5000))]))
    assert len(carried) < 1000
    assert rows_of(pickle.loads(carried)) == [list(range(5000))]


class Builder:
    """Fills a folder with one number, and counts how often it was asked to."""

    def __init__(self, number: int = 7) -> None:
        self.number, self.num_calls = number, 0

    def __call__(self, folder: Path) -> Ledger:
        self.num_calls += 1
        writer = StoreWriter(folder / "train", flags=False)
        writer.add([self.number])
        writer.close()
        return Ledger(rows_read=1, rows_kept=1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n", encoding="utf-8")
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_built_once_and_then_found(tokenizer: PreTrainedTokenizerBase, cache: Path, source: Path) -> None:
    build = Builder()
    first, ledger = prepare_once(str(cache), "pt", [source], tokenizer, {"a": 1}, build)
    again, same_ledger = prepare_once(str(cache), "pt", [source], tokenizer, {"a": 1}, build)
    assert build.num_calls == 1
    assert first == again
    assert ledger == same_ledger == Ledger(rows_read=1, rows_kept=1)
    assert rows_of(TokenStore(first / "train")) == [[7]]
    assert list(cache.iterdir()) == [first]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
def test_an_interrupted_build_does_not_pass_for_complete(
    tokenizer: PreTrainedTokenizerBase, cache: Path, source: Path, error: type[BaseException]
) -> None:
    def interrupted(folder: Path) -> Ledger:
        Builder(number=666)(folder)
        (folder / "left over").write_text("x", encoding="utf-8")
        raise error("stopped")

    build = Builder()
    complete, _ = prepare_once(str(cache / "other"), "pt", [source], tokenizer, {}, build)
    with pytest.raises(error):
        prepare_once(str(cache), "pt", [source], tokenizer, {}, interrupted)
    assert not (cache / complete.name).exists()
    folder, _ = prepare_once(str(cache), "pt", [source], tokenizer, {}, build)
    assert (build.num_calls, folder) == (2, cache / complete.name)
    assert rows_of(TokenStore(folder / "train")) == [[7]]
    assert sorted(file.name for file in folder.iterdir()) == sorted(file.name for file in complete.iterdir())
    assert [path.name for path in cache.iterdir() if path.name != "other"] == [folder.name]


def test_anything_that_matters_makes_another_folder(
    tokenizer: PreTrainedTokenizerBase, cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Builder()

    def prepare(stage: str = "pt", with_tokenizer: PreTrainedTokenizerBase = tokenizer, **settings: object) -> Path:
        return prepare_once(str(cache), stage, [source], with_tokenizer, settings, build)[0]

    folders = [prepare(), prepare(a=1), prepare(a=2), prepare(stage="sft"), prepare("pt", train_tokenizer(["x"], 259))]
    source.write_text('{"a": 1}\n', encoding="utf-8")
    folders.append(prepare())
    monkeypatch.setattr(tokenizer, "chat_template", "another")
    folders.append(prepare())
    assert len(set(folders)) == len(folders) == build.num_calls


def test_an_edit_of_the_package_makes_another_folder(
    tokenizer: PreTrainedTokenizerBase, cache: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(store, "__file__", str(package / "store.py"))
    build = Builder()
    for name in store.ROW_MODULES:
        (package / f"{name}.py").write_text("", encoding="utf-8")
    for content in ("one = 1", "one = 1", "one = 2"):
        (package / "chat.py").write_text(content, encoding="utf-8")
        prepare_once(str(cache), "pt", [source], tokenizer, {}, build)
    assert build.num_calls == 2


def test_using_the_tokenizer_changes_nothing(tokenizer: PreTrainedTokenizerBase, cache: Path, source: Path) -> None:
    """Within one run it is used between the preparation of one data set and the next."""
    build = Builder()
    prepare_once(str(cache), "pt", [source], tokenizer, {}, build)
    tokenizer(["a", "b c d"], split_special_tokens=True)
    tokenizer.pad({"input_ids": [[1], [2, 3]]})
    prepare_once(str(cache), "pt", [source], tokenizer, {}, build)
    assert build.num_calls == 1
