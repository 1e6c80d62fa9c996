"""mini_qwen/packing.py: nothing lost, nothing doubled, and no row of a block sees or predicts another."""

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeModel, MakeStore
from datasets.fingerprint import Hasher
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, Trainer

from mini_qwen.ledger import Ledger
from mini_qwen.packing import BlockCollator, Blocks, best_fit, count_cut, cut_blocks, row_blocks
from mini_qwen.training import PTConfig

DOCUMENTS = st.lists(st.lists(st.integers(0, 151_935), min_size=1, max_size=9), min_size=1, max_size=12)


def joined(blocks: Blocks, name: str) -> list[int]:
    return [int(value) for block in blocks for value in block[name]]


def restarts(documents: list[list[int]], block_size: int, num_tokens: int) -> set[int]:
    """Where, in the corpus, a document or a block begins."""
    at, begins = 0, set(range(0, num_tokens, block_size))
    for document in documents:
        begins.add(at)
        at += len(document)
    return begins


@settings(max_examples=80)
@given(documents=DOCUMENTS, block_size=st.integers(1, 12), isolate=st.booleans())
def test_blocks_are_the_corpus_without_its_tail(
    make_store: MakeStore, documents: list[list[int]], block_size: int, isolate: bool
) -> None:
    corpus = [token for document in documents for token in document]
    blocks = cut_blocks(make_store(documents), block_size, isolate, keep_tail=False)
    assert [len(block["input_ids"]) for block in blocks] == [block_size] * (len(corpus) // block_size)
    assert joined(blocks, "input_ids") == corpus[: len(corpus) - len(corpus) % block_size]


@settings(max_examples=80)
@given(documents=DOCUMENTS, block_size=st.integers(1, 12), isolate=st.booleans())
def test_kept_tail_leaves_out_no_target(
    make_store: MakeStore, documents: list[list[int]], block_size: int, isolate: bool
) -> None:
    corpus = [token for document in documents for token in document]
    blocks = cut_blocks(make_store(documents), block_size, isolate, keep_tail=True)
    assert all(len(block["input_ids"]) == block_size for block in list(blocks)[:-1])
    kept = joined(blocks, "input_ids")
    assert kept == corpus[: len(kept)]
    begins = restarts(documents if isolate else [], block_size, len(corpus))
    assert begins >= set(range(len(kept), len(corpus)))  # at most tokens that nothing predicts


@settings(max_examples=80)
@given(documents=DOCUMENTS, block_size=st.integers(1, 12))
def test_isolated_documents_start_at_position_0_and_do_not_predict_each_other(
    make_store: MakeStore, documents: list[list[int]], block_size: int
) -> None:
    blocks = cut_blocks(make_store(documents), block_size, isolate=True, keep_tail=True)
    ids, positions, labels = (joined(blocks, name) for name in ("input_ids", "position_ids", "labels"))
    begins = restarts(documents, block_size, len(ids))
    for at, (token, position, label) in enumerate(zip(ids, positions, labels, strict=True)):
        if at in begins:
            assert (position, label) == (0, -100)
        else:
            assert (position, label) == (positions[at - 1] + 1, token)


@settings(max_examples=40)
@given(documents=DOCUMENTS, block_size=st.integers(1, 12))
def test_plain_concatenation_counts_through_the_block(
    make_store: MakeStore, documents: list[list[int]], block_size: int
) -> None:
    for block in cut_blocks(make_store(documents), block_size, isolate=False, keep_tail=True):
        assert block["position_ids"].tolist() == list(range(len(block["input_ids"])))
        assert block["labels"].tolist() == [-100, *block["input_ids"][1:]]


@settings(max_examples=40)
@given(documents=DOCUMENTS, block_size=st.integers(1, 12), isolate=st.booleans())
def test_ledger_of_a_cut_says_what_the_blocks_hold(
    make_store: MakeStore, documents: list[list[int]], block_size: int, isolate: bool
) -> None:
    store = make_store(documents)
    if store.num_tokens < block_size:
        with pytest.raises(SystemExit, match=rf"\b{store.num_tokens}\b.*\b{block_size}\b"):
            count_cut(store, block_size, isolate, Ledger())
        return
    ledger = Ledger(tokens_read=store.num_tokens, tokens_trained=store.num_tokens)
    count_cut(store, block_size, isolate, ledger)
    labels = joined(cut_blocks(store, block_size, isolate, keep_tail=False), "labels")
    assert ledger.tokens_masked == labels.count(-100)
    assert ledger.tokens_trained == len(labels) - labels.count(-100)
    assert ledger.tokens_dropped.total() == store.num_tokens - len(labels)


def test_first_token_of_a_row_is_not_trained_even_where_flagged(make_store: MakeStore) -> None:
    store = make_store([[7, 8, 9], [5, 6]], trained=[[True, False, True], [True, True]])
    (block,) = row_blocks(store, max_length=5, packing=True)
    assert block["input_ids"].tolist() == [7, 8, 9, 5, 6]
    assert block["position_ids"].tolist() == [0, 1, 2, 0, 1]
    assert block["labels"].tolist() == [-100, -100, 9, -100, 6]


@settings(max_examples=80)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=14), room=st.integers(9, 20), packing=st.booleans())
def test_packing_keeps_every_row_whole_and_once(
    make_store: MakeStore, lengths: list[int], room: int, packing: bool
) -> None:
    rows = [[100 * number + at for at in range(length)] for number, length in enumerate(lengths)]
    flags = [[at % 2 == 1 for at in range(length)] for length in lengths]
    found = []
    for block in row_blocks(make_store(rows, flags), max_length=room, packing=packing):
        assert len(block["input_ids"]) <= room
        begins = np.flatnonzero(block["position_ids"] == 0)
        assert packing or len(begins) == 1
        ids, positions, labels = (
            np.split(block[name], begins[1:]) for name in ("input_ids", "position_ids", "labels")
        )
        for row, position, label in zip(ids, positions, labels, strict=True):
            assert position.tolist() == list(range(len(row)))
            assert label.tolist() == [token if at % 2 == 1 else -100 for at, token in enumerate(row.tolist())]
            found.append(row.tolist())
    assert sorted(found) == rows
    assert packing or found == rows


@settings(max_examples=200)
@given(st.data())
def test_best_fit_fills_bins_of_which_no_two_could_be_one(data: st.DataObject) -> None:
    """A bin is opened only for a row that fits into none before it, so any two hold more than one could."""
    capacity = data.draw(st.integers(1, 40))
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=40))
    bins = best_fit(np.array(lengths, dtype=np.int64), capacity)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    filled = sorted(sum(lengths[row] for row in rows) for rows in bins)
    assert all(total <= capacity for total in filled)
    assert len(filled) < 2 or filled[0] + filled[1] > capacity


def fewest_bins(lengths: list[int], capacity: int) -> int:
    """By trying every way; for a few rows only."""

    def place(row: int, bins: list[int]) -> int:
        if row == len(lengths):
            return len(bins)
        tries = [
            place(row + 1, [*bins[:at], used + lengths[row], *bins[at + 1 :]])
            for at, used in enumerate(bins)
            if used + lengths[row] <= capacity
        ]
        return min([*tries, place(row + 1, [*bins, lengths[row]])])

    return place(0, [])


@settings(max_examples=80)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_best_fit_needs_at_most_half_again_the_fewest_bins(lengths: list[int]) -> None:
    """The bound of best-fit decreasing: Simchi-Levi, New worst-case results for the bin-packing problem, 1994."""
    assert 2 * len(best_fit(np.array(lengths), 12)) <= 3 * fewest_bins(lengths, 12)


def test_a_row_longer_than_a_bin_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="row 1 has 6 tokens"):
        best_fit(np.array([3, 6]), capacity=5)


@pytest.mark.parametrize("flatten", [False, True])
def test_collator_pads_with_a_row_of_its_own(make_store: MakeStore, flatten: bool) -> None:
    blocks = cut_blocks(make_store([[11, 12, 13, 14, 15, 16], [21, 22]]), 5, isolate=True, keep_tail=True)
    batch = BlockCollator(pad_id=99, flatten=flatten)([blocks[0], blocks[1]])
    expected = {
        "input_ids": [[11, 12, 13, 14, 15], [16, 21, 22, 99, 99]],
        "position_ids": [[0, 1, 2, 3, 4], [0, 0, 1, 0, 1]],
        "labels": [[-100, 12, 13, 14, 15], [-100, -100, 22, -100, -100]],
    }
    assert set(batch) == set(expected)  # no attention mask, which would switch the isolation off
    for name, rows in expected.items():
        assert batch[name].dtype == torch.int64
        assert batch[name].tolist() == ([rows[0] + rows[1]] if flatten else rows)


# Documents of 5, 4 and 7 tokens: in blocks of 12, the third is continued in the second block.
LEAKAGE_DOCUMENTS = [[21, 22, 23, 24, 25], [31, 32, 33, 34], [41, 42, 43, 44, 45, 46, 47]]


@torch.no_grad()
def token_logits(model: PreTrainedModel, blocks: Blocks, flatten: bool) -> torch.Tensor:
    """Logits of every token of the corpus, in its order [16, vocab], computed as one batch with its padding."""
    batch = BlockCollator(pad_id=0, flatten=flatten)(list(blocks))
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits.reshape(*labels.shape, -1).flatten(0, 1)
    block_size = max(len(block["input_ids"]) for block in blocks)
    places = [n * block_size + at for n, block in enumerate(blocks) for at in range(len(block["input_ids"]))]
    return logits[places]


@pytest.mark.parametrize("flatten", [False, True], ids=["batch", "flattened"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_isolated_documents_cannot_see_each_other(
    tiny_model: MakeModel, make_store: MakeStore, attention: str, flatten: bool, changed: int
) -> None:
    model = tiny_model(attention=attention)
    others = [list(document) for document in LEAKAGE_DOCUMENTS]
    others[changed] = [token + 100 for token in others[changed]]
    before, after = (
        token_logits(model, cut_blocks(make_store(documents), 12, isolate=True, keep_tail=True), flatten)
        for documents in (LEAKAGE_DOCUMENTS, others)
    )
    moved = (before - after).abs().amax(dim=1)
    owner = torch.tensor([number for number, document in enumerate(LEAKAGE_DOCUMENTS) for _ in document])
    assert moved[owner != changed].max() <= 1e-6
    assert moved[owner == changed].min() > 1e-2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_plainly_concatenated_documents_see_those_before_them(
    tiny_model: MakeModel, make_store: MakeStore, attention: str
) -> None:
    model = tiny_model(attention=attention)
    others = [[121, 122, 123, 124, 125], *LEAKAGE_DOCUMENTS[1:]]
    before, after = (
        token_logits(model, cut_blocks(make_store(documents), 12, isolate=False, keep_tail=True), flatten=False)
        for documents in (LEAKAGE_DOCUMENTS, others)
    )
    moved = (before - after).abs().amax(dim=1)
    assert moved[5:12].min() > 1e-2
    assert moved[12:].max() <= 1e-6  # the next block sees nothing of this one


@torch.no_grad()
def loss_alone(model: PreTrainedModel, rows: list[list[int]]) -> float:
    """The mean over all predicted tokens of all rows, each row computed by itself."""
    total = count = 0.0
    for row in rows:
        ids = torch.tensor([row])
        total += model(input_ids=ids, labels=ids).loss.item() * (len(row) - 1)
        count += len(row) - 1
    return total / count


@pytest.mark.parametrize("flatten", [False, True], ids=["batch", "flattened"])
def test_loss_of_a_block_is_the_mean_over_the_tokens_of_its_documents(
    tiny_model: MakeModel, make_store: MakeStore, flatten: bool
) -> None:
    model = tiny_model()
    rows = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14], [15, 16, 17, 18]]
    blocks = row_blocks(make_store(rows, [[True] * len(row) for row in rows]), max_length=9, packing=True)
    batch = BlockCollator(pad_id=0, flatten=flatten)(list(blocks))
    assert len(blocks) == 2
    with torch.no_grad():
        loss = model(**batch, use_cache=False).loss.item()
    assert loss == pytest.approx(loss_alone(model, rows), rel=1e-5)


def test_trainer_computes_the_same_loss(tiny_model: MakeModel, make_store: MakeStore, tmp_path: Path) -> None:
    """The Trainer must neither drop the position ids nor pass a cache: either would join the documents."""
    model = tiny_model()
    blocks = cut_blocks(make_store(LEAKAGE_DOCUMENTS), 8, isolate=True, keep_tail=False)
    args = PTConfig(output_dir=str(tmp_path), per_device_eval_batch_size=2, report_to=[], disable_tqdm=True)
    trainer = Trainer(model=model, args=args, eval_dataset=blocks, data_collator=BlockCollator(pad_id=0))
    rows = [LEAKAGE_DOCUMENTS[0], LEAKAGE_DOCUMENTS[1][:3], LEAKAGE_DOCUMENTS[2]]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_alone(model, rows), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_held_out_loss_is_a_number_whatever_the_tail(
    tiny_model: MakeModel, make_store: MakeStore, tmp_path: Path, batch_size: int
) -> None:
    """Nine tokens in blocks of four: the first token of a tail of one is no target, and 0/0 would be NaN."""
    blocks = cut_blocks(make_store([[1, 2, 3, 4, 5], [6, 7, 8, 9]]), 4, isolate=True, keep_tail=True)
    args = PTConfig(output_dir=str(tmp_path), per_device_eval_batch_size=batch_size, report_to=[], disable_tqdm=True)
    trainer = Trainer(model=tiny_model(), args=args, eval_dataset=blocks, data_collator=BlockCollator(pad_id=0))
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def make_some(make_store: MakeStore, kind: str) -> Blocks:
    rows = [[number, *range(number % 40 + 1)] for number in range(3000)]
    if kind == "documents":
        return cut_blocks(make_store(rows), 64, isolate=True, keep_tail=False)
    return row_blocks(make_store(rows, [[True] * len(row) for row in rows]), 64, packing=True)


@pytest.mark.parametrize("kind", ["documents", "rows"])
def test_blocks_travel_to_another_process_without_their_tokens(make_store: MakeStore, kind: str) -> None:
    blocks = make_some(make_store, kind)
    carried = pickle.dumps(blocks)
    assert len(carried) < 2000 < blocks.store.ids.nbytes
    again = pickle.loads(carried)
    assert len(again) == len(blocks)
    for one, other in zip(blocks, again, strict=True):
        assert {name: values.tolist() for name, values in one.items()} == {
            name: values.tolist() for name, values in other.items()
        }


@pytest.mark.parametrize("kind", ["documents", "rows"])
def test_as_dataset_has_the_same_items(make_store: MakeStore, kind: str) -> None:
    blocks = make_some(make_store, kind)
    dataset = blocks.as_dataset()
    assert len(dataset) == len(blocks)
    for at in (0, 1, len(blocks) - 1):
        assert {name: list(values) for name, values in dataset[at].items()} == {
            name: list(values) for name, values in blocks[at].items()
        }
    assert [list(values) for values in dataset[1:3]["labels"]] == [list(blocks[at]["labels"]) for at in (1, 2)]


def test_fingerprint_tells_blocks_apart_without_reading_them(make_store: MakeStore) -> None:
    blocks, twin = make_some(make_store, "documents"), make_some(make_store, "documents")
    (blocks.store.folder / "ids.u32").unlink()  # still mapped here; opening it anew would fail
    assert Hasher.hash(blocks) == Hasher.hash(blocks) != Hasher.hash(twin)
    assert len(pickle.dumps(blocks.fetch)) < 2000


@pytest.mark.parametrize("at", [-1, 2])
def test_no_block_beyond_the_last(make_store: MakeStore, at: int) -> None:
    with pytest.raises(IndexError):
        cut_blocks(make_store([[1, 2, 3, 4, 5]]), 2, isolate=True, keep_tail=False)[at]
