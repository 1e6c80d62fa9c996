"""mini_qwen/documents.py: every document and token is accounted for, and held-out ones are never trained on."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WriteRows, toy_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from mini_qwen import documents
from mini_qwen.blocks import TAIL, Blocks
from mini_qwen.documents import DocumentData, draw, encode_documents, prepare_documents, split_document
from mini_qwen.encoding import encode_text
from mini_qwen.rows import Row
from mini_qwen.tokenizer import CONTROL_TOKENS, train_tokenizer

TEXTS = [f"{number}: {text}" for number, text in enumerate(toy_texts())]
WHOLE = 64  # tokens; more than any of the texts has


def keys(files: list[Path], cache: Path, **changes: Any) -> DocumentData:
    values = {"train_files": [str(file) for file in files], "cache_dir": str(cache), "block_size": 16}
    return DocumentData(**(values | changes))


def texts_in(blocks: Blocks, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The documents of blocks that cut none, each without its end token, which every one of them must have."""
    texts = []
    for block in blocks:
        begins = [*np.flatnonzero(block["position_ids"] == 0).tolist(), len(block["input_ids"])]
        for low, high in itertools.pairwise(begins):
            row = block["input_ids"][low:high].tolist()
            assert row.count(tokenizer.eos_token_id) == 1 and row[-1] == tokenizer.eos_token_id
            texts.append(tokenizer.decode(row[:-1]))
    return texts


def joined(blocks: Blocks, name: str) -> list[int]:
    return [int(value) for block in blocks for value in block[name]]


@settings(max_examples=60)
@given(
    rows=st.lists(st.sampled_from([*TEXTS, "", "  \n", None, "<|im_end|>"]), min_size=1, max_size=12),
    block_size=st.integers(2, 40),
    isolate=st.booleans(),
    packing=st.sampled_from(["best_fit", "cut"]),
)
def test_ledger_adds_up_to_the_blocks(
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[str | None],
    block_size: int,
    isolate: bool,
    packing: str,
) -> None:
    folder = tmp_path_factory.mktemp("documents")
    file = folder / "rows.json"
    file.write_text(json.dumps([{"text": row} for row in rows]), encoding="utf-8")
    kept = [row for row in rows if row is not None and row.strip()]
    corpus = [token for ids in encode_text(tokenizer, kept) for token in [*ids.tolist(), tokenizer.eos_token_id]]
    options = {"block_size": block_size, "isolate_documents": isolate, "packing": packing, "max_drop_share": 1.0}
    data = keys([file], folder, **options)
    if len(corpus) < block_size:
        message = f"{len(corpus)} tokens.*{block_size}" if kept else f"No row is left.*{len(rows)} empty text"
        with pytest.raises(SystemExit, match=message):
            prepare_documents(data, tokenizer, seed=0)
        return
    blocks, held_out, ledger = prepare_documents(data, tokenizer, seed=0)
    ids, labels = joined(blocks, "input_ids"), joined(blocks, "labels")
    assert held_out is None
    assert packing != "cut" or ids == corpus[: len(ids)]
    assert Counter(ids) <= Counter(corpus)
    assert (ledger.files, ledger.rows_read, ledger.rows_kept) == (1, len(rows), len(kept))
    assert ledger.rows_dropped == ({"empty text": len(rows) - len(kept)} if len(kept) < len(rows) else {})
    assert ledger.rows_with_control_text == kept.count("<|im_end|>")
    assert ledger.tokens_read == len(corpus)
    assert ledger.tokens_trained == len(labels) - labels.count(-100)
    assert ledger.tokens_masked == labels.count(-100)
    assert ledger.tokens_dropped == ({TAIL: len(corpus) - len(ids)} if len(ids) < len(corpus) else {})
    assert ledger.tokens_dropped.total() < block_size
    assert ledger.tokens_padding == len(blocks) * block_size - len(ids)
    assert packing == "cut" or ledger.short_rows_cut == 0
    assert ledger.tokens_by_source == {str(file): len(ids)}


def test_held_out_documents_are_never_trained_on(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    files = [write_rows(f"{n}.parquet", [{"text": text} for text in TEXTS[n::3]]) for n in range(3)]
    data = keys(files, tmp_path, eval_rows=7, block_size=WHOLE)
    train, held_out, ledger = prepare_documents(data, tokenizer, seed=1)
    assert held_out is not None
    seen, unseen = texts_in(train, tokenizer), texts_in(held_out, tokenizer)
    assert (len(unseen), ledger.rows_held_out, ledger.rows_kept) == (7, 7, len(TEXTS) - 7)
    assert not set(seen) & set(unseen)
    assert sorted(seen + unseen) == sorted(TEXTS)


@pytest.mark.parametrize("packing", ["best_fit", "cut"])
def test_all_of_the_held_out_documents_is_scored_the_tail_as_well(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path, packing: str
) -> None:
    file = write_rows("rows.parquet", [{"text": text} for text in TEXTS])
    _, held_out, ledger = prepare_documents(keys([file], tmp_path, eval_rows=8, packing=packing), tokenizer, seed=1)
    assert held_out is not None
    assert ledger.tokens_held_out % 16 > 1  # there is a tail, and it has a token to predict
    assert len(joined(held_out, "input_ids")) == ledger.tokens_held_out


def test_split_is_a_function_of_the_seed(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    file = write_rows("rows.parquet", [{"text": text} for text in TEXTS])
    splits = []
    for cache, seed in [("a", 1), ("b", 1), ("c", 2)]:
        data = keys([file], tmp_path / cache, eval_rows=9, block_size=WHOLE)
        _, held_out, _ = prepare_documents(data, tokenizer, seed)
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
    assert ledger.first_places == {"empty text": f"{file}, row {len(TEXTS)}"}
    with pytest.raises(SystemExit, match=r"3 of 43 rows.*empty text.*row 40.*5%.*max_drop_share"):
        prepare_documents(keys([file], tmp_path, max_drop_share=0.05), tokenizer, seed=0)


def test_rows_that_cannot_be_read_are_counted_by_reason(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    file = write_rows("rows.jsonl", [{"text": text} for text in TEXTS])
    with file.open("ab") as stream:
        stream.write(b'{"text": "cut\n' + b'{"text": "\xff"}\n' + b'{"text": "\\ud800"}\n' + b"[1]\n")
    _, _, ledger = prepare_documents(keys([file], tmp_path, max_drop_share=0.1), tokenizer, seed=0)
    assert (ledger.rows_read, ledger.rows_kept, ledger.rows_dropped.total()) == (len(TEXTS) + 4, len(TEXTS), 4)
    assert sorted(ledger.first_places.values()) == [f"{file}, row {number}" for number in range(40, 44)]
    assert ledger.rows_dropped["not valid Unicode"] == ledger.rows_dropped["not valid UTF-8"] == 1


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
    for packing in ("best_fit", "cut"):
        with pytest.raises(SystemExit, match=rf"\b{len(ids) + 1} tokens.*\b5,000\b"):
            prepare_documents(keys([file], tmp_path, block_size=5000, packing=packing), tokenizer, seed=0)


@pytest.mark.parametrize("block_size", [1, 0, -5])
def test_a_block_without_a_token_to_predict_is_refused(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path, block_size: int
) -> None:
    file = write_rows("rows.jsonl", [{"text": text} for text in TEXTS])
    with pytest.raises(SystemExit, match=rf"block_size is {block_size};.*2 tokens"):
        prepare_documents(keys([file], tmp_path, block_size=block_size), tokenizer, seed=0)


def test_prepared_rows_are_used_again_until_something_changes(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    file = write_rows("rows.parquet", [{"text": text} for text in TEXTS])
    cache = tmp_path / "cache"

    def prepare(with_tokenizer: PreTrainedTokenizerBase = tokenizer, seed: int = 1, **changes: Any) -> Path:
        blocks, _, _ = prepare_documents(keys([file], cache, eval_rows=2, **changes), with_tokenizer, seed)
        (folder,) = blocks.store.folders
        return folder.resolve()

    first = prepare()
    written = (first / "ids").stat().st_mtime_ns
    assert prepare(seed=2) == prepare(block_size=32, isolate_documents=False) == prepare(packing="cut") == first
    assert (first / "ids").stat().st_mtime_ns == written
    folders = [first, prepare(train_tokenizer(TEXTS, 300))]
    write_rows("rows.parquet", [{"text": text} for text in [*TEXTS, "one more"]])
    folders.append(prepare())
    assert len(set(folders)) == len([path for path in cache.iterdir() if re.fullmatch("pt-[0-9a-f]+", path.name)]) == 3


def test_ledger_is_the_same_from_the_cache(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    file = write_rows("rows.parquet", [{"text": text} for text in [*TEXTS, ""]])
    ledgers = [prepare_documents(keys([file], tmp_path, eval_rows=3), tokenizer, seed=0)[2] for _ in range(2)]
    assert ledgers[0] == ledgers[1]


@settings(max_examples=150)
@given(text=st.text("ab\n", max_size=60), size=st.integers(1, 12))
def test_parts_of_a_huge_document_are_all_of_it_and_end_at_line_breaks(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "MAX_CHARACTERS", size)
        parts = split_document(text)
    assert "".join(parts) == text
    assert len(parts) == 1 or all(parts)
    for part in parts[:-1]:
        assert len(part) <= size
        assert part.endswith("\n") or (len(part) == size and "\n" not in part)
    assert len(parts[-1]) <= size


def test_a_huge_document_becomes_several_rows_of_which_the_last_has_its_end(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write_rows: WriteRows
) -> None:
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 60)
    huge = "\n".join(TEXTS[:10]) + " <|im_start|>"
    parts = split_document(huge)
    texts = ["short", huge, "also short"]
    token_rows, ledger = encode_documents(
        tokenizer, [Row(Path("f"), n, {"text": text}) for n, text in enumerate(texts)]
    )
    decoded = [tokenizer.decode(row.ids) for row in token_rows]
    assert len(parts) > 5
    assert decoded == ["short<|im_end|>", *parts[:-1], parts[-1] + "<|im_end|>", "also short<|im_end|>"]
    assert (ledger.rows_read, ledger.rows_split_off, ledger.rows_kept) == (3, len(parts) - 1, len(parts) + 2)
    assert ledger.rows_with_control_text == 1  # a document, in however many parts
    assert ledger.tokens_read == sum(len(row.ids) for row in token_rows)

    file = write_rows("rows.jsonl", [{"text": text} for text in texts])
    blocks, _, ledger = prepare_documents(keys([file], tmp_path / "cache", packing="cut"), tokenizer, seed=0)
    every = [token for row in token_rows for token in row.ids.tolist()]
    assert joined(blocks, "input_ids") == every[: len(every) // 16 * 16]
    assert f"3 read + {len(parts) - 1} split off" in ledger.summary()


def test_text_that_spells_a_control_token_is_text_and_counted(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    spelled = [f"before {token} after {token}" for token in CONTROL_TOKENS]
    file = write_rows("rows.jsonl", [{"text": text} for text in [*spelled, *TEXTS, "a < b | c > d", "<|im_end"]])
    blocks, _, ledger = prepare_documents(keys([file], tmp_path, block_size=WHOLE), tokenizer, seed=0)
    assert ledger.rows_with_control_text == len(CONTROL_TOKENS)
    control_ids = tokenizer.convert_tokens_to_ids(CONTROL_TOKENS)
    found = Counter(token for token in joined(blocks, "input_ids") if token in control_ids)
    assert found == {tokenizer.eos_token_id: ledger.rows_kept}
    assert set(spelled) <= set(texts_in(blocks, tokenizer))


def test_best_fit_cuts_no_document_that_a_block_can_hold_and_the_plain_cut_does(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    """With one document long enough to fill all gaps, both leave no padding."""
    file = write_rows("rows.jsonl", [{"text": text} for text in [*TEXTS, " ".join(TEXTS * 2)]])
    ledgers = {}
    for packing in ("best_fit", "cut"):
        data = keys([file], tmp_path, block_size=WHOLE, packing=packing)
        blocks, _, ledgers[packing] = prepare_documents(data, tokenizer, seed=0)
        assert {len(block["input_ids"]) for block in blocks} == {WHOLE}
        assert ledgers[packing].tokens_padding == 0
    assert (ledgers["best_fit"].rows_cut, ledgers["best_fit"].short_rows_cut) == (1, 0)
    assert ledgers["cut"].short_rows_cut >= 10
    assert ledgers["cut"].rows_cut == ledgers["cut"].short_rows_cut + 1


def test_documents_that_are_not_isolated_count_through_the_block(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    file = write_rows("rows.jsonl", [{"text": text} for text in TEXTS])
    blocks, _, ledger = prepare_documents(keys([file], tmp_path, isolate_documents=False), tokenizer, seed=0)
    assert all((np.diff(block["position_ids"]) == 1).all() for block in blocks)
    assert ledger.tokens_masked == len(blocks)


def test_sources_are_mixed_by_weight_and_in_phases(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    web = write_rows("web/a.parquet", [{"text": text} for text in TEXTS[:20]])
    books = write_rows("books.jsonl", [{"text": text} for text in TEXTS[20:]])
    mixtures: list[dict[str, float]] = [{str(web.parent): 1.0}, {str(books): 2.0, str(web.parent): 0.5}]
    data = keys([], tmp_path / "cache", train_files=mixtures, block_size=WHOLE)
    blocks, _, ledger = prepare_documents(data, tokenizer, seed=0)
    times = Counter(texts_in(blocks, tokenizer))
    assert {text: times[text] for text in TEXTS[20:]} == dict.fromkeys(TEXTS[20:], 2)
    assert {times[text] for text in TEXTS[:20]} == {1, 2}
    first_phase = [text for text in TEXTS[:20] if times[text] == 1]
    assert ledger.rows_kept == 40
    lengths = dict(zip(TEXTS, [len(ids) + 1 for ids in encode_text(tokenizer, TEXTS)], strict=True))
    by_source = {str(web.parent): sum(lengths[text] * times[text] for text in TEXTS[:20])}
    assert ledger.tokens_by_source == by_source | {str(books): 2 * sum(lengths[text] for text in TEXTS[20:])}
    order = texts_in(blocks, tokenizer)
    last_of_first_phase = max(order.index(text) for text in first_phase)
    assert last_of_first_phase < min(order.index(text) for text in TEXTS[20:])


@given(texts=st.lists(st.text(max_size=3), max_size=30), num_texts=st.integers(0, 40), seed=st.integers(0, 2**32))
def test_drawn_texts_are_some_of_the_given_by_seed(texts: list[str], num_texts: int, seed: int) -> None:
    drawn = draw(iter(texts), num_texts, seed)
    assert len(drawn) == min(num_texts, len(texts))
    assert Counter(drawn) <= Counter(texts)
    assert drawn == draw(iter(texts), num_texts, seed)


def test_every_text_is_drawn_as_often_as_any_other_and_anywhere() -> None:
    """3 of 12 in 4,000 draws: each text 1,000 times and first 333 times, give or take 5 standard deviations."""
    texts = list("abcdefghijkl")
    draws = [draw(texts, 3, seed) for seed in range(4000)]
    drawn, first = Counter(itertools.chain(*draws)), Counter(texts[0] for texts in draws)
    assert all(abs(drawn[text] - 1000) < 140 for text in texts)
    assert all(abs(first[text] - 333) < 90 for text in texts)
