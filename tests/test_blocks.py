"""mini_qwen/blocks.py: no row of a block sees or predicts another, and the ledger says what the blocks hold."""

import itertools
import math
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeBlocks, MakeModel, MakeStore
from datasets.fingerprint import Hasher
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, Trainer

from mini_qwen.blocks import TAIL, BlockCollator, Blocks, write_blocks
from mini_qwen.ledger import Ledger
from mini_qwen.packing import Packed, cut, fit, one_each
from mini_qwen.store import TokenStore
from mini_qwen.training import PTConfig

Rows = list[list[int]]
PACKERS: dict[str, Callable[..., Packed]] = {
    "cut": cut,
    "fit": partial(fit, fill=False),
    "fill": partial(fit, fill=True),
    "one_each": one_each,
}
LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=14)
SIZES = st.integers(1, 12)
DOCUMENTS = st.lists(st.lists(st.integers(0, 151_935), min_size=1, max_size=9), min_size=1, max_size=12)


def numbered(lengths: list[int], first: int = 0) -> Rows:
    """Rows of which every token tells its row and its place: 100 x row + place."""
    return [[100 * (first + number) + at for at in range(length)] for number, length in enumerate(lengths)]


def is_learnt(token: int) -> bool:
    return token % 3 > 0


def flags_for(rows: Rows) -> list[list[bool]]:
    return [[is_learnt(token) for token in row] for row in rows]


def pieces_of(ids: list[int]) -> Rows:
    """The stretches of rows in a block of numbered rows."""
    pieces: Rows = []
    for token in ids:
        if pieces and token == pieces[-1][-1] + 1 and token % 100:
            pieces[-1].append(token)
        else:
            pieces.append([token])
    return pieces


def joined(blocks: Blocks, name: str) -> list[int]:
    return [int(value) for block in blocks for value in block[name]]


@settings(max_examples=60)
@given(documents=DOCUMENTS, block_size=SIZES, isolate=st.booleans())
def test_cut_blocks_are_the_corpus_without_its_tail(
    make_blocks: MakeBlocks, documents: Rows, block_size: int, isolate: bool
) -> None:
    corpus = [token for document in documents for token in document]
    blocks = make_blocks(documents, block_size, isolate=isolate)
    assert [len(block["input_ids"]) for block in blocks] == [block_size] * (len(corpus) // block_size)
    assert joined(blocks, "input_ids") == corpus[: len(corpus) - len(corpus) % block_size]


@pytest.mark.parametrize("packer", PACKERS)
@settings(max_examples=40)
@given(lengths=LENGTHS, block_size=SIZES, flagged=st.booleans())
def test_isolated_rows_start_at_position_0_and_do_not_predict_each_other(
    make_blocks: MakeBlocks, packer: str, lengths: list[int], block_size: int, flagged: bool
) -> None:
    rows = numbered(lengths)
    flags = flags_for(rows) if flagged else None
    for block in make_blocks(rows, block_size, PACKERS[packer], flags, keep_rest=True):
        ids, positions, labels = (block[name].tolist() for name in ("input_ids", "position_ids", "labels"))
        assert 0 < len(ids) <= block_size
        begins = [at for at, position in enumerate(positions) if position == 0]
        pieces = [ids[low:high] for low, high in itertools.pairwise([*begins, len(ids)])]
        assert packer != "one_each" or len(pieces) == 1
        assert all(piece == list(range(piece[0], piece[0] + len(piece))) for piece in pieces)
        assert all(piece[0] // 100 == piece[-1] // 100 for piece in pieces)
        assert positions == [at for piece in pieces for at in range(len(piece))]
        assert labels == [
            token if at and (is_learnt(token) or not flagged) else -100
            for piece in pieces
            for at, token in enumerate(piece)
        ]


@pytest.mark.parametrize("packer", PACKERS)
@settings(max_examples=40)
@given(lengths=LENGTHS, block_size=SIZES, flagged=st.booleans())
def test_plain_concatenation_counts_through_the_block(
    make_blocks: MakeBlocks, packer: str, lengths: list[int], block_size: int, flagged: bool
) -> None:
    rows = numbered(lengths)
    flags = flags_for(rows) if flagged else None
    for block in make_blocks(rows, block_size, PACKERS[packer], flags, isolate=False):
        ids, positions, labels = (block[name].tolist() for name in ("input_ids", "position_ids", "labels"))
        assert positions == list(range(len(ids)))
        assert labels == [-100, *(token if is_learnt(token) or not flagged else -100 for token in ids[1:])]


def test_first_token_of_a_row_is_not_trained_even_where_flagged(make_blocks: MakeBlocks) -> None:
    flags = [[True, False, True], [True, True]]
    (block,) = make_blocks([[7, 8, 9], [5, 6]], 5, PACKERS["fit"], flags)
    assert block["input_ids"].tolist() == [7, 8, 9, 5, 6]
    assert block["position_ids"].tolist() == [0, 1, 2, 0, 1]
    assert block["labels"].tolist() == [-100, -100, 9, -100, 6]


@settings(max_examples=80)
@given(
    parts=st.lists(st.tuples(LENGTHS, st.booleans()), min_size=1, max_size=3),
    packer=st.sampled_from(sorted(PACKERS)),
    block_size=SIZES,
    isolate=st.booleans(),
    keep_rest=st.booleans(),
    rows_at_once=st.integers(1, 20),
)
def test_ledger_says_what_the_blocks_hold(
    make_store: MakeStore,
    tmp_path_factory: pytest.TempPathFactory,
    parts: list[tuple[list[int], bool]],
    packer: str,
    block_size: int,
    isolate: bool,
    keep_rest: bool,
    rows_at_once: int,
) -> None:
    """Of several folders, some with flags, packed some rows at a time."""
    firsts = [sum(len(lengths) for lengths, _ in parts[:number]) for number in range(len(parts))]
    part_rows = [numbered(lengths, first) for first, (lengths, _) in zip(firsts, parts, strict=True)]
    made = [
        make_store(rows, flags_for(rows) if flags else None) for rows, (_, flags) in zip(part_rows, parts, strict=True)
    ]
    store = TokenStore([folder for one in made for folder in one.folders])
    rows = [row for rows in part_rows for row in rows]
    windows = [(0, np.arange(at, min(at + rows_at_once, len(rows)))) for at in range(0, len(rows), rows_at_once)]
    folder = tmp_path_factory.mktemp("blocks")
    pack = partial(PACKERS[packer], size=block_size)
    ledger = write_blocks(folder, store, windows, pack, block_size, isolate, keep_rest)

    blocks = Blocks(folder)
    ids, labels = joined(blocks, "input_ids"), joined(blocks, "labels")
    corpus = [token for row in rows for token in row]
    assert len(set(ids)) == len(ids) and set(ids) <= set(corpus)
    assert ledger.blocks == len(blocks)
    assert ledger.tokens_masked == labels.count(-100)
    assert ledger.tokens_trained == len(labels) - labels.count(-100)
    assert ledger.tokens_padding == len(blocks) * block_size - len(ids)
    assert ledger.tokens_dropped == ({TAIL: len(corpus) - len(ids)} if len(ids) < len(corpus) else {})
    assert ledger.tokens_dropped.total() < block_size

    pieces = [piece for block in blocks for piece in pieces_of(block["input_ids"].tolist())]
    opened_with = {piece[0] // 100: len(piece) for piece in pieces if piece[0] % 100 == 0}
    cut_rows = [number for number, length in opened_with.items() if length < len(rows[number])]
    assert ledger.rows_cut == len(cut_rows)
    assert ledger.short_rows_cut == sum(len(rows[number]) <= block_size for number in cut_rows)
    assert packer == "cut" or ledger.short_rows_cut == 0
    # Nothing else is counted here: the rest of the ledger belongs to whoever chose the rows.
    counted = (
        "blocks",
        "tokens_masked",
        "tokens_trained",
        "tokens_padding",
        "tokens_dropped",
        "rows_cut",
        "short_rows_cut",
    )
    assert {name: value for name, value in vars(ledger).items() if value} == {
        name: getattr(ledger, name) for name in counted if getattr(ledger, name)
    }


@pytest.mark.parametrize("packer", ["cut", "fill"])
@settings(max_examples=100)
@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=14), block_size=SIZES, isolate=st.booleans())
@example(lengths=[3, 1, 1], block_size=3, isolate=False)
def test_kept_rest_leaves_out_no_target(
    make_blocks: MakeBlocks, packer: str, lengths: list[int], block_size: int, isolate: bool
) -> None:
    """Rows of one token as well, which only an unisolated block can predict."""
    rows = numbered(lengths)
    kept = joined(make_blocks(rows, block_size, PACKERS[packer], isolate=isolate, keep_rest=True), "input_ids")
    lost = sorted({token for row in rows for token in row} - set(kept))
    if isolate:
        assert all(after != before + 1 or after % 100 == 0 for before, after in itertools.pairwise(lost))
    else:
        assert len(lost) <= 1


@settings(max_examples=60)
@given(lengths=LENGTHS, block_size=SIZES, isolate=st.booleans())
def test_every_last_block_kept_has_something_to_predict(
    make_blocks: MakeBlocks, lengths: list[int], block_size: int, isolate: bool
) -> None:
    blocks = make_blocks(numbered(lengths), block_size, isolate=isolate, keep_rest=True)
    assert all(len(block["input_ids"]) == block_size for block in list(blocks)[:-1])
    if len(blocks) and len(blocks[len(blocks) - 1]["labels"]) < block_size:
        assert (blocks[len(blocks) - 1]["labels"] != -100).any()


def write_phases(folder: Path, store: TokenStore, windows: list[tuple[int, np.ndarray]], seed: int) -> Blocks:
    write_blocks(folder, store, windows, partial(cut, size=4), 4, seed=seed)
    return Blocks(folder)


def ids_of(blocks: Blocks) -> list[tuple[int, ...]]:
    return [tuple(block["input_ids"].tolist()) for block in blocks]


def test_phases_follow_each_other_and_are_shuffled_inside_by_seed(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(numbered([7] * 60))
    windows = [(0, np.arange(0, 20)), (0, np.arange(20, 31)), (1, np.arange(31, 60))]
    first = ids_of(write_phases(tmp_path / "first phase", store, windows[:2], seed=1))
    again, same, other = (
        ids_of(write_phases(tmp_path / name, store, windows, seed)) for name, seed in [("a", 1), ("b", 1), ("c", 2)]
    )
    assert again == same != other
    assert sorted(again) == sorted(other)
    for order in (again, other):
        # 31 rows of 7 tokens are 54 blocks and one token, which goes on into the second phase.
        assert set(order[: len(first)]) == set(first)
        assert order[: len(first)] != first
        assert order[len(first) :] != sorted(order[len(first) :])
    assert len(first) == 54
    assert len(again) == 60 * 7 // 4


def test_blocks_of_one_phase_are_left_in_the_order_of_packing(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(numbered([7] * 60))
    blocks = write_phases(tmp_path, store, [(3, np.arange(30)), (3, np.arange(30, 60))], seed=1)
    assert ids_of(blocks) == sorted(ids_of(blocks))


def test_no_rows_make_no_blocks(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store([[1, 2, 3]])
    ledger = write_blocks(tmp_path, store, [], partial(cut, size=4), 4, keep_rest=True)
    assert ledger == Ledger()
    assert len(Blocks(tmp_path)) == 0


def test_blocks_move_with_the_cache_they_are_in(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(numbered([5, 6]))
    cache = tmp_path / "cache"
    (cache / "blocks.partial").mkdir(parents=True)
    store.folders[0].rename(cache / "rows")
    moved = TokenStore([cache / "rows"])
    write_blocks(cache / "blocks.partial" / "train", moved, [(0, np.arange(2))], partial(cut, size=4), 4)
    (cache / "blocks.partial").rename(cache / "blocks")
    before = ids_of(Blocks(cache / "blocks" / "train"))
    cache.rename(tmp_path / "elsewhere")
    assert ids_of(Blocks(tmp_path / "elsewhere" / "blocks" / "train")) == before == [(0, 1, 2, 3), (4, 100, 101, 102)]


@pytest.mark.parametrize("flatten", [False, True])
def test_collator_pads_with_a_row_of_its_own(make_blocks: MakeBlocks, flatten: bool) -> None:
    blocks = make_blocks([[11, 12, 13, 14, 15, 16], [21, 22]], 5, keep_rest=True)
    batch = BlockCollator(pad_id=99, flatten=flatten)([blocks[0], blocks[1]])
    expected = {
        "input_ids": [[11, 12, 13, 14, 15], [16, 21, 22, 99, 99]],
        "position_ids": [[0, 1, 2, 3, 4], [0, 0, 1, 0, 1]],
        "labels": [[-100, 12, 13, 14, 15], [-100, -100, 22, -100, -100]],
    }
    if flatten:  # where the five rows begin and the last ends, and how long one can be
        borders, length = [0, 5, 6, 8, 10], 5
        for side in ("q", "k"):
            assert batch.pop(f"cu_seq_lens_{side}").tolist() == borders
            assert batch.pop(f"max_length_{side}") == length
    assert set(batch) == set(expected)  # no attention mask, which would switch the isolation off
    for name, rows in expected.items():
        assert batch[name].dtype == torch.int64
        assert batch[name].tolist() == ([rows[0] + rows[1]] if flatten else rows)


def test_a_batch_is_a_copy(make_blocks: MakeBlocks) -> None:
    """The files are open for reading only: a batch that shared their memory could not be written to."""
    blocks = make_blocks([[1, 2, 3, 4]], 4)
    BlockCollator(pad_id=0)([blocks[0]])["input_ids"].fill_(9)
    assert blocks[0]["input_ids"].tolist() == [1, 2, 3, 4]


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


def assert_isolated(model: PreTrainedModel, make_blocks: MakeBlocks, flatten: bool, changed: int) -> None:
    """Another text in one document moves all logits of that document and none of the others."""
    others = [list(document) for document in LEAKAGE_DOCUMENTS]
    others[changed] = [token + 100 for token in others[changed]]
    before, after = (
        token_logits(model, make_blocks(documents, 12, keep_rest=True), flatten)
        for documents in (LEAKAGE_DOCUMENTS, others)
    )
    moved = (before - after).abs().amax(dim=1)
    owner = torch.tensor([number for number, document in enumerate(LEAKAGE_DOCUMENTS) for _ in document])
    assert moved[owner != changed].max() <= 1e-6
    assert moved[owner == changed].min() > 1e-2


# Flex attention is compiled for half a minute on a CPU; uncompiled it applies the same mask.
ATTENTIONS = ["eager", "sdpa", "flex_attention"]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("flatten", [False, True], ids=["batch", "flattened"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_isolated_documents_cannot_see_each_other(
    tiny_model: MakeModel, make_blocks: MakeBlocks, attention: str, flatten: bool, changed: int
) -> None:
    with torch.compiler.set_stance("force_eager"):
        assert_isolated(tiny_model(attention=attention), make_blocks, flatten, changed)


@pytest.mark.slow
def test_documents_cannot_see_each_other_through_compiled_flex_attention(
    tiny_model: MakeModel, make_blocks: MakeBlocks
) -> None:
    assert_isolated(tiny_model(attention="flex_attention"), make_blocks, flatten=False, changed=1)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_plainly_concatenated_documents_see_those_before_them(
    tiny_model: MakeModel, make_blocks: MakeBlocks, attention: str
) -> None:
    model = tiny_model(attention=attention)
    others = [[121, 122, 123, 124, 125], *LEAKAGE_DOCUMENTS[1:]]
    with torch.compiler.set_stance("force_eager"):
        before, after = (
            token_logits(model, make_blocks(documents, 12, isolate=False, keep_rest=True), flatten=False)
            for documents in (LEAKAGE_DOCUMENTS, others)
        )
    moved = (before - after).abs().amax(dim=1)
    assert moved[5:12].min() > 1e-2
    assert moved[12:].max() <= 1e-6  # the next block sees nothing of this one


@torch.no_grad()
def loss_alone(model: PreTrainedModel, rows: Rows) -> float:
    """The mean over all predicted tokens of all rows, each row computed by itself."""
    total = count = 0.0
    for row in rows:
        ids = torch.tensor([row])
        total += model(input_ids=ids, labels=ids).loss.item() * (len(row) - 1)
        count += len(row) - 1
    return total / count


@pytest.mark.parametrize("flatten", [False, True], ids=["batch", "flattened"])
def test_loss_of_a_block_is_the_mean_over_the_tokens_of_its_documents(
    tiny_model: MakeModel, make_blocks: MakeBlocks, flatten: bool
) -> None:
    model = tiny_model()
    rows = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14], [15, 16, 17, 18]]
    blocks = make_blocks(rows, 9, PACKERS["fit"], [[True] * len(row) for row in rows])
    batch = BlockCollator(pad_id=0, flatten=flatten)(list(blocks))
    assert len(blocks) == 2
    with torch.no_grad():
        loss = model(**batch, use_cache=False).loss.item()
    assert loss == pytest.approx(loss_alone(model, rows), rel=1e-5)


def evaluate(model: PreTrainedModel, blocks: Blocks, folder: Path, batch_size: int) -> float:
    args = PTConfig(output_dir=str(folder), per_device_eval_batch_size=batch_size, report_to=[], disable_tqdm=True)
    trainer = Trainer(model=model, args=args, eval_dataset=blocks, data_collator=BlockCollator(pad_id=0))
    return trainer.evaluate()["eval_loss"]


def test_trainer_computes_the_same_loss(tiny_model: MakeModel, make_blocks: MakeBlocks, tmp_path: Path) -> None:
    """The Trainer must neither drop the position ids nor pass a cache: either would join the documents."""
    model = tiny_model()
    rows = [LEAKAGE_DOCUMENTS[0], LEAKAGE_DOCUMENTS[1][:3], LEAKAGE_DOCUMENTS[2]]
    loss = evaluate(model, make_blocks(LEAKAGE_DOCUMENTS, 8), tmp_path, batch_size=2)
    assert loss == pytest.approx(loss_alone(model, rows), rel=1e-5)


@pytest.mark.parametrize("packer", ["cut", "fill"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_held_out_loss_is_a_number_whatever_the_tail(
    tiny_model: MakeModel, make_blocks: MakeBlocks, tmp_path: Path, batch_size: int, packer: str
) -> None:
    """Nine tokens in blocks of four: the first token of a tail of one is no target, and 0/0 would be NaN."""
    blocks = make_blocks([[1, 2, 3, 4, 5], [6, 7, 8, 9]], 4, PACKERS[packer], keep_rest=True)
    assert math.isfinite(evaluate(tiny_model(), blocks, tmp_path, batch_size))


KINDS = {"documents": cut, "rows": PACKERS["fit"]}


def make_some(make_blocks: MakeBlocks, kind: str) -> Blocks:
    rows = [[number, *range(number % 40 + 1)] for number in range(3000)]
    return make_blocks(rows, 64, KINDS[kind], flags_for(rows) if kind == "rows" else None)


def as_lists(item: dict[str, np.ndarray]) -> dict[str, list[int]]:
    return {name: list(values) for name, values in item.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_travel_to_another_process_without_their_tokens(make_blocks: MakeBlocks, kind: str) -> None:
    blocks = make_some(make_blocks, kind)
    carried = pickle.dumps(blocks)
    assert len(carried) < 2000 < 4 * blocks.store.num_tokens
    again = pickle.loads(carried)
    assert len(again) == len(blocks)
    assert all(as_lists(one) == as_lists(other) for one, other in zip(blocks, again, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_as_dataset_has_the_same_items(make_blocks: MakeBlocks, kind: str) -> None:
    blocks = make_some(make_blocks, kind)
    dataset = blocks.as_dataset()
    assert len(dataset) == len(blocks)
    for at in (0, 1, len(blocks) - 1):
        assert as_lists(dataset[at]) == as_lists(blocks[at])
    assert [list(values) for values in dataset[1:3]["labels"]] == [list(blocks[at]["labels"]) for at in (1, 2)]


def test_fingerprint_tells_blocks_apart_without_reading_them(make_blocks: MakeBlocks) -> None:
    blocks, twin = make_some(make_blocks, "documents"), make_some(make_blocks, "documents")
    (blocks.store.folders[0] / "ids").unlink()  # still mapped here; opening it anew would fail
    assert Hasher.hash(blocks) == Hasher.hash(blocks) != Hasher.hash(twin)
    assert len(pickle.dumps(blocks.fetch)) < 2000


@pytest.mark.parametrize("at", [-1, 2])
def test_no_block_beyond_the_last(make_blocks: MakeBlocks, at: int) -> None:
    with pytest.raises(IndexError):
        make_blocks([[1, 2, 3, 4, 5]], 2)[at]
