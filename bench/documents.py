"""PT: the seed's tokenising and packing through `datasets.map`, and its collator, against ours."""

import statistics
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from bench.measurement import Facts, Work, alternate, medians, ratios
from bench.sources import BLOCK_SIZE, SEED, tokenizer_path, write_texts
from mini_qwen.blocks import BlockCollator, Blocks
from mini_qwen.disk import folder_bytes
from mini_qwen.documents import DocumentData, prepare_documents
from mini_qwen.tokenizer import load_tokenizer

MAP_ROWS, MAP_PROCESSES = 5000, 2
BATCH_SIZE, NUM_BATCHES = 12, 200


def seed_variant(folder: Path, files: list[Path]) -> Work:
    """Reading the parquet files into `datasets`' own format is not measured; in ours it is."""
    tokenizer = load_tokenizer(tokenizer_path())
    dataset = load_dataset("parquet", data_files=list(map(str, files)), split="train", cache_dir=str(folder / "read"))
    (folder / "map").mkdir()

    def preprocess_dataset(examples: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        """The seed's function, but for comments and types."""
        eos_token = "<|im_end|>"
        text_examples = [text + eos_token for text in examples["text"]]
        tokenized_examples = tokenizer(text_examples, add_special_tokens=False)
        concatenated_examples = {k: list(chain(*tokenized_examples[k])) for k in tokenized_examples}
        total_length = len(concatenated_examples[list(concatenated_examples.keys())[0]])
        block_size = 1024
        total_length = (total_length // block_size) * block_size
        result = {
            k: [t[i : i + block_size] for i in range(0, total_length, block_size)]
            for k, t in concatenated_examples.items()
        }
        return result

    def work() -> Facts:
        blocks = dataset.map(
            preprocess_dataset,
            batched=True,
            batch_size=MAP_ROWS,
            num_proc=MAP_PROCESSES,
            remove_columns=dataset.column_names,
            load_from_cache_file=False,
            cache_file_name=str(folder / "map/blocks.arrow"),
        )
        tokens = len(blocks) * BLOCK_SIZE
        return {"tokens": tokens, "disk_bytes_per_token": round(folder_bytes(folder / "map") / tokens, 2)}

    return work


def our_variant(folder: Path, files: list[Path]) -> Work:
    tokenizer = load_tokenizer(tokenizer_path())

    def work() -> Facts:
        tokens = our_blocks(folder, files, tokenizer).store.num_tokens
        return {"tokens": tokens, "disk_bytes_per_token": round(folder_bytes(folder) / tokens, 2)}

    return work


def our_blocks(folder: Path, files: list[Path], tokenizer: PreTrainedTokenizerBase) -> Blocks:
    """Prepared now, or found in the folder."""
    data = DocumentData(train_files=list(map(str, files)), block_size=BLOCK_SIZE, cache_dir=str(folder))
    return prepare_documents(data, tokenizer, SEED)[0]


def our_token_stream(blocks: Blocks) -> np.ndarray:
    """All documents' ids in the order of the files, each document with its end token."""
    return np.concatenate([part["ids"] for part in blocks.store.parts])


def seed_blocks(folder: Path) -> Dataset:
    return concatenate_datasets([Dataset.from_file(str(file)) for file in sorted((folder / "map").glob("*.arrow"))])


def seed_token_stream(blocks: Dataset) -> np.ndarray:
    return np.concatenate([chunk.flatten().to_numpy() for chunk in blocks.data.column("input_ids").chunks])


def without_batch_tails(stream: np.ndarray, end_id: int) -> np.ndarray:
    """Leave out what the seed loses: the tail of every 5,000 documents of each process's half of the data."""
    starts = np.concatenate([[0], np.flatnonzero(stream == end_id) + 1])
    parts = []
    for share in np.array_split(np.arange(len(starts) - 1), MAP_PROCESSES):
        for first in range(share[0], share[-1] + 1, MAP_ROWS):
            low, high = starts[first], starts[min(first + MAP_ROWS, share[-1] + 1)]
            parts.append(stream[low : high - (high - low) % BLOCK_SIZE])
    return np.concatenate(parts)


def batch_milliseconds(dataset: Any, collator: Any) -> float:
    """Median time to read one batch as the Trainer does."""
    torch.manual_seed(SEED)
    loader = torch.utils.data.DataLoader(dataset, BATCH_SIZE, shuffle=True, collate_fn=collator, drop_last=True)
    assert len(loader), f"{len(dataset)} blocks are fewer than a batch of {BATCH_SIZE}"
    times = []
    while len(times) < NUM_BATCHES:
        batches = iter(loader)
        for _ in range(len(loader)):
            started = time.perf_counter()
            next(batches)
            times.append(time.perf_counter() - started)
    return round(statistics.median(times[:NUM_BATCHES]) * 1000, 3)


def compare_documents(folder: Path, megabytes: float, rounds: int) -> Facts:
    files = write_texts(folder / "texts", megabytes)
    measured = alternate({"seed": seed_variant, "ours": our_variant}, rounds, folder, files=files)
    tokenizer = load_tokenizer(tokenizer_path())
    theirs, ours = seed_blocks(folder / "seed"), our_blocks(folder / "ours", files, tokenizer)
    stream = our_token_stream(ours)
    identical = np.array_equal(without_batch_tails(stream, tokenizer.eos_token_id), seed_token_stream(theirs))
    readers = {
        "seed": (theirs, DataCollatorForLanguageModeling(tokenizer, mlm=False)),
        "ours": (ours, BlockCollator(tokenizer.pad_token_id)),
    }
    reading = {name: [] for name in readers}
    for _ in range(rounds):
        for name, reader in readers.items():
            reading[name].append(batch_milliseconds(*reader))
    batch_ms = {name: statistics.median(times) for name, times in reading.items()}
    middle = medians(measured)
    return {
        "data": {
            "megabytes": megabytes,
            "documents": int(np.count_nonzero(stream == tokenizer.eos_token_id)),
            "different_documents": pq.read_metadata(files[0]).num_rows,
            "tokens": len(stream),
        },
        "identical": identical,
        "tokens_lost": {"seed": len(stream) - middle["seed"]["tokens"], "ours": len(stream) - BLOCK_SIZE * len(ours)},
        "medians": middle,
        "ratios": ratios(middle["seed"], middle["ours"]),
        "batch_ms": batch_ms | {"times_faster": round(batch_ms["seed"] / batch_ms["ours"], 1)},
        "rounds": measured,
        "batch_ms_rounds": reading,
    }
