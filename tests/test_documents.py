"""mini_qwen/documents.py: every document and token is accounted for, and held-out ones are never trained on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WriteRows, toy_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from mini_qwen.chat import encode_text
from mini_qwen.documents import DocumentData, prepare_documents
from mini_qwen.packing import Blocks
from mini_qwen.tokenizer import train_tokenizer

TEXTS = [f"{number}: {text}" for number, text in enumerate(toy_texts())]


def keys(files: list[Path], cache: Path, **changes: Any) -> DocumentData:
    values = {"train_files": [str(file) for file in files], "cache_dir": str(cache), "block_size": 16}
    return DocumentData(**(values | changes))


def texts_in(blocks: Blocks, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The documents of a store, each without its end token, which every one of them must have."""
    store = blocks.store
    rows = [store.ids[store.starts[row] : store.starts[row + 1]].tolist() for row in range(len(store))]
    assert all(row.count(tokenizer.eos_token_id) == 1 and row[-1] == tokenizer.eos_token_id for row in rows)
    return [tokenizer.decode(row[:-1]) for row in rows]


def labels_in(blocks: Blocks) -> np.ndarray:
    return np.concatenate([block["labels"] for block in blocks])


@settings(max_examples=40)
@given(
    rows=st.lists(st.sampled_from([*TEXTS, "", "  \n", None, "<|im_end|>"]), min_size=1, max_size=12),
    block_size=st.integers(2, 40),
    isolate=st.booleans(),
)
def test_ledger_adds_up_to_the_blocks(
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[str | None],
    block_size: int,
    isolate: bool,
) -> None:
    folder = tmp_path_factory.mktemp("documents")
    file = folder / "rows.json"
    file.write_text(json.dumps([{"text": row} for row in rows]), encoding="utf-8")
    kept = [row for row in rows if row is not None and row.strip()]
    num_tokens = sum(len(ids) + 1 for ids in encode_text(tokenizer, kept)) if kept else 0
    data = keys([file], folder, block_size=block_size, isolate_documents=isolate, max_drop_share=1.0)
    if num_tokens < block_size:
        with pytest.raises(SystemExit, match=f"{num_tokens}.*{block_size}"):
            prepare_documents(data, tokenizer, seed=0)
        return
    blocks, held_out, ledger = prepare_documents(data, tokenizer, seed=0)
    labels = labels_in(blocks)
    assert held_out is None
    assert texts_in(blocks, tokenizer) == kept
    assert (ledger.rows_read, ledger.rows_kept, ledger.rows_held_out) == (len(rows), len(kept), 0)
    assert ledger.rows_dropped.total() == len(rows) - len(kept)
    assert ledger.tokens_read == num_tokens
    assert ledger.tokens_trained == (labels != -100).sum()
    assert ledger.tokens_masked == (labels == -100).sum()
    assert ledger.tokens_dropped.total() == num_tokens - len(labels)


def test_held_out_documents_are_never_trained_on(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    files = [write_rows(f"{n}.parquet", [{"text": text} for text in TEXTS[n::3]]) for n in range(3)]
    train, held_out, ledger = prepare_documents(keys(files, tmp_path, eval_rows=7), tokenizer, seed=1)
    assert held_out is not None
    seen, unseen = texts_in(train, tokenizer), texts_in(held_out, tokenizer)
    assert (len(unseen), ledger.rows_held_out, ledger.rows_kept) == (7, 7, len(TEXTS) - 7)
    assert not set(seen) & set(unseen)
    assert sorted(seen + unseen) == sorted(TEXTS)
    # All of the held-out documents is scored, the tail as well.
    assert np.concatenate([block["input_ids"] for block in held_out]).tolist() == held_out.store.ids.tolist()


def test_split_is_a_function_of_the_seed(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    file = write_rows("rows.parquet", [{"text": text} for text in TEXTS])
    splits = []
    for cache, seed in [("a", 1), ("b", 1), ("c", 2)]:
        _, held_out, _ = prepare_documents(keys([file], tmp_path / cache, eval_rows=9), tokenizer, seed)
        assert held_out is not None
        splits.append(texts_in(held_out, tokenizer))
    assert splits[0] == splits[1] != splits[2]


def test_blank_documents_are_counted(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = [{"text": text} for text in [*TEXTS, "", None, " \n\u3000"]]
    file = write_rows("rows.parquet", rows)
    _, _, ledger = prepare_documents(keys([file], tmp_path, max_drop_share=0.1), tokenizer, seed=0)
    assert (ledger.rows_read, ledger.rows_kept) == (len(TEXTS) + 3, len(TEXTS))
    assert ledger.rows_dropped == {"empty text": 3}
    with pytest.raises(SystemExit, match=r"3 of 43 rows.*empty text.*5%.*max_drop_share"):
        prepare_documents(keys([file], tmp_path, max_drop_share=0.05), tokenizer, seed=0)


@pytest.mark.parametrize("value", [5, 2.5, ["text"]])
def test_a_text_that_is_no_text_names_file_row_and_value(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path, value: object
) -> None:
    good = write_rows("a.parquet", [{"text": text} for text in TEXTS])
    bad = write_rows("b.parquet", [{"text": value}] * 2)
    with pytest.raises(SystemExit) as error:
        prepare_documents(keys([good, bad], tmp_path), tokenizer, seed=0)
    assert f"{bad}, row 0" in str(error.value)
    assert repr(value) in str(error.value)


def test_a_corpus_smaller_than_a_block_says_both_sizes(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    file = write_rows("rows.jsonl", [{"text": "猫"}])
    (ids,) = encode_text(tokenizer, ["猫"])
    with pytest.raises(SystemExit, match=rf"\b{len(ids) + 1} tokens.*\b5,000\b"):
        prepare_documents(keys([file], tmp_path, block_size=5000), tokenizer, seed=0)


def test_prepared_rows_are_used_again_until_something_changes(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    file = write_rows("rows.parquet", [{"text": text} for text in TEXTS])
    cache = tmp_path / "cache"

    def prepare(with_tokenizer: PreTrainedTokenizerBase = tokenizer, seed: int = 1, **changes: Any) -> Path:
        blocks, _, _ = prepare_documents(keys([file], cache, eval_rows=2, **changes), with_tokenizer, seed)
        return blocks.store.folder

    first = prepare()
    written = (first / "ids.u32").stat().st_mtime_ns
    assert prepare() == prepare(block_size=32, isolate_documents=False) == first
    assert (first / "ids.u32").stat().st_mtime_ns == written
    folders = [first, prepare(seed=2), prepare(train_tokenizer(TEXTS, 300))]
    write_rows("rows.parquet", [{"text": text} for text in [*TEXTS, "one more"]])
    folders.append(prepare())
    assert len(set(folders)) == len(list(cache.iterdir())) == 4


def test_ledger_is_the_same_from_the_cache(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    file = write_rows("rows.parquet", [{"text": text} for text in [*TEXTS, ""]])
    ledgers = [prepare_documents(keys([file], tmp_path, eval_rows=3), tokenizer, seed=0)[2] for _ in range(2)]
    assert ledgers[0] == ledgers[1]
