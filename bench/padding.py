"""Padding: the share of computed tokens that are pads, in PT, SFT and DPO."""

import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from bench.conversations import our_blocks
from bench.documents import our_blocks as our_document_blocks
from bench.measurement import Facts
from bench.sources import (
    MAX_LENGTH,
    SEED,
    read_turns,
    sample_files,
    tokenizer_path,
    write_conversations,
    write_texts,
)
from mini_qwen.blocks import Blocks
from mini_qwen.preferences import PreferenceData, prepare_preferences
from mini_qwen.sampler import ByLength
from mini_qwen.tokenizer import load_tokenizer

NUM_ORDERS = 20  # orders, one a seed, of which the mean is taken
PT_MEGABYTES = 2
MIXTURE = {"sft/7M": 2100, "sft/Gen": 400}  # rows drawn from Infinity-Instruct's parts: 84:16, as in the real sets
MICRO_BATCH, PAIRS_MICRO_BATCH = 12, 4  # the seed's

Row = tuple[int, ...]  # tokens of its one sequence, or of a pair's two sides
MakeOrder = Callable[[Sequence[Row], int, int], list[int]]  # rows, micro-batch, seed -> indices of the rows


def pad_share(rows: Sequence[Row], order: Sequence[int], micro_batch: int) -> float:
    """Share of pads when batches of `micro_batch` rows, in this order, are filled up to their longest sequence.

    >>> pad_share([(4,), (1,), (3,)], order=[0, 2, 1], micro_batch=2)
    0.1111111111111111
    """
    tokens = computed = 0
    for first in range(0, len(order), micro_batch):
        sequences = [length for index in order[first : first + micro_batch] for length in rows[index]]
        tokens += sum(sequences)
        computed += max(sequences) * len(sequences)
    return 1 - tokens / computed


def random_order(rows: Sequence[Row], micro_batch: int, seed: int) -> list[int]:
    return random.Random(seed).sample(range(len(rows)), len(rows))


def order_by_length(rows: Sequence[Row], micro_batch: int, seed: int) -> list[int]:
    return list(ByLength([max(row) for row in rows], micro_batch, seed))


def mean_pad_share(rows: Sequence[Row], micro_batch: int, make_order: MakeOrder = random_order) -> float:
    orders = [make_order(rows, micro_batch, seed) for seed in range(NUM_ORDERS)]
    return round(statistics.mean(pad_share(rows, order, micro_batch) for order in orders), 4)


def block_lengths(blocks: Blocks) -> list[Row]:
    return [(len(block["input_ids"]),) for block in blocks]


def preference_lengths(tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[Row]:
    """Tokens of the chosen and of the rejected side, each with the prompt."""
    files = [str(file) for file in sample_files("dpo", "train*.parquet")]
    data = PreferenceData(train_files=files, cache_dir=str(folder / "dpo"), max_drop_share=1.0)
    pairs = prepare_preferences(data, tokenizer, MAX_LENGTH)[0]
    return [
        (len(pair["prompt_ids"]) + len(pair["chosen_ids"]), len(pair["prompt_ids"]) + len(pair["rejected_ids"]))
        for pair in pairs
    ]


def measure_padding(folder: Path) -> Facts:
    """`sft_padded` is the seed's way, with the rows as we shorten them; it had only the last exchange of each."""
    tokenizer = load_tokenizer(tokenizer_path())
    documents = our_document_blocks(folder / "pt", write_texts(folder / "texts", PT_MEGABYTES), tokenizer)
    drawn = [random.Random(SEED).choices(read_turns(sample_files(part)), k=rows) for part, rows in MIXTURE.items()]
    file = write_conversations([turns for part in drawn for turns in part], folder / "messages.jsonl")
    padded, packed = (block_lengths(our_blocks(folder, file, tokenizer, packing)) for packing in (False, True))
    pairs = preference_lengths(tokenizer, folder)
    return {
        "data": {"pt_blocks": len(documents), "sft_rows": len(padded), "dpo_pairs": len(pairs)},
        "pt_ours": mean_pad_share(block_lengths(documents), MICRO_BATCH),
        "sft_padded": mean_pad_share(padded, MICRO_BATCH),
        "sft_ours": mean_pad_share(packed, MICRO_BATCH),
        "dpo_random_order": mean_pad_share(pairs, PAIRS_MICRO_BATCH),
        "dpo_ours": mean_pad_share(pairs, PAIRS_MICRO_BATCH, order_by_length),
    }
