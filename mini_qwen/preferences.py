"""DPO data: pairs of answers in, token rows out, both sides ending in their stop token."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from mini_qwen.cache import Preparation, build_once, hash_of, prepare_parts, source_hash, sum_ledgers
from mini_qwen.chat import TokenRow, encode_chat
from mini_qwen.encoding import encode_text, spells_control_token
from mini_qwen.files import DataKeys, find_files
from mini_qwen.ledger import Ledger
from mini_qwen.mixture import find_sources, read_phases
from mini_qwen.rows import Row, check_columns, read_rows
from mini_qwen.schemas import PAIR_COLUMNS, PAIRS, BadRow, read_pair
from mini_qwen.shortening import fit_turns
from mini_qwen.store import TokenStore

PAIRS_AT_ONCE = 1000  # held in memory while the pairs are written
LABELS = {"true": True, "1": True, "false": False, "0": False}  # as csv spells them


@dataclass
class PreferenceData(DataKeys):
    """Recipe keys of DPO data; docs/data.md lists the schemas."""

    test_files: list[str] | None = None  # never trained on, only scored


class Pair(NamedTuple):
    """Token ids of a pair: three rows of the store, one after the other."""

    prompt_ids: np.ndarray  # ends with the opening of the assistant's turn
    chosen_ids: np.ndarray  # the answer and <|im_end|>
    rejected_ids: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Of both sides together, each with the prompt: what the model computes."""
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)

    def side(self, answer: str) -> TokenRow:
        """The prompt and one of the answers, `chosen_ids` or `rejected_ids`, of which the answer is to be learnt."""
        ids = np.concatenate([self.prompt_ids, getattr(self, answer)])
        return TokenRow(ids, np.arange(len(ids)) >= len(self.prompt_ids))


def read_label(value: Any) -> bool | None:
    """Whether an answer is rated good; None for what is no rating."""
    if isinstance(value, str):
        return LABELS.get(value.strip().lower())
    return bool(value) if value in (True, False) else None


def join_rated(rows: Iterable[Row]) -> Iterator[Row]:
    """Make pairs of rated answers, `label` true or false, to one prompt (the form of KTO); other rows pass unchanged.

    An answer waits in memory for one of the other label; those for which none comes are passed on at the end, with
    that fault.
    """
    waiting: dict[str, list[Row]] = {}
    for row in rows:
        label = read_label(row.values.get("label"))
        if row.fault or "chosen" in row.values or label is None:
            yield row
            continue
        prompt, answer = row.values.get("prompt"), row.values.get("completion")
        if answer is None and isinstance(row.values.get("messages"), list):
            prompt, answer = row.values["messages"][:-1], row.values["messages"][-1:]
        row = row._replace(values={**row.values, "messages": None, "prompt": prompt, "completion": answer})
        same = waiting.setdefault(json.dumps([prompt, row.values.get("system")], sort_keys=True, default=str), [])
        if not same or read_label(same[0].values["label"]) == label:
            same.append(row)
            continue
        other = same.pop(0)
        chosen, rejected = (row, other) if label else (other, row)
        sides = {"chosen": chosen.values["completion"], "rejected": rejected.values["completion"]}
        yield row._replace(values={"joined": True, "prompt": prompt, "system": row.values.get("system"), **sides})
    for row in (row for same in waiting.values() for row in same):
        yield row._replace(fault="no answer of the other label in its file")


def read_preferences(
    rows: Iterator[Row] | list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, ledger: Ledger
) -> Iterator[Pair]:
    """The pairs that can be trained on, their prompts shortened to `max_length`; the others are counted by reason."""
    for row in rows:
        joined = bool(row.values.get("joined"))
        ledger.rows_read += 1 + joined
        ledger.rows_joined += joined
        num_tokens = 0
        try:
            if row.fault:
                raise BadRow(row.fault)
            turns, chosen, rejected = read_pair(row.values, row.place)
            texts = [turn["content"] for turn in turns]
            ledger.rows_with_control_text += spells_control_token(tokenizer, [*texts, chosen, rejected])
            contents = encode_text(tokenizer, texts)
            end = np.uint32(tokenizer.eos_token_id)
            answers = [np.append(ids, end) for ids in encode_text(tokenizer, [chosen, rejected])]
            if np.array_equal(*answers):  # texts that differ, as é in one character and in two
                raise BadRow("chosen equals rejected")
            pair = Pair(encode_chat(tokenizer, turns, add_generation_prompt=True, contents=contents).ids, *answers)
            num_tokens = pair.num_tokens
            room = max_length - max(map(len, answers))
            if len(pair.prompt_ids) > room:
                prompt = fit_turns(tokenizer, turns, contents, room, add_generation_prompt=True)
                pair = pair._replace(prompt_ids=prompt.ids)
        except BadRow as reason:
            ledger.drop(str(reason), row.place, num_tokens)
            continue
        ledger.keep(num_tokens, num_tokens - pair.num_tokens)
        trained = len(pair.chosen_ids) + len(pair.rejected_ids)
        ledger.tokens_trained += trained
        ledger.tokens_masked += pair.num_tokens - trained
        yield pair


def encode_preferences(
    tokenizer: PreTrainedTokenizerBase, max_length: int, rows: list[Row]
) -> tuple[list[TokenRow], Ledger]:
    """The token rows of pairs, three of each, and what became of the rows."""
    ledger = Ledger()
    pairs = read_preferences(rows, tokenizer, max_length, ledger)
    return [TokenRow(ids) for pair in pairs for ids in pair], ledger


def pair_preparation(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Preparation:
    """How pairs become token rows."""
    return Preparation(
        stage="dpo",
        choices=PAIRS,
        read=lambda file: join_rated(read_rows([file], PAIR_COLUMNS)),
        encode=partial(encode_preferences, tokenizer, max_length),
        flags=False,
        tokenizer=tokenizer,
        settings={"max_length": max_length},
    )


def prepare_preferences(
    data: PreferenceData, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Dataset, Dataset | None, Ledger]:
    """Training pairs, test pairs (None without test_files), and the ledger of the training pairs.

    Columns: prompt_ids, chosen_ids, rejected_ids, and `length`, the tokens of the longer side, by which the trainer
    groups pairs. They are a file on disk, so that all processes share one file of reference log-probabilities.
    """
    files = {file.resolve(): file for file in find_files(data.train_files)}
    test_files = find_files(data.test_files or [])
    both = [files[file.resolve()] for file in test_files if file.resolve() in files]
    if both:
        raise SystemExit(f"{both[0]} is below train_files and test_files: no test pair is trained on. Name others.")
    check_columns(test_files, PAIRS)
    train, ledger = prepare_pairs(data, data.train_files, tokenizer, max_length)
    if not data.test_files:
        return train, None, ledger
    test, test_ledger = prepare_pairs(data, data.test_files, tokenizer, max_length)
    ledger.test_rows_read, ledger.test_rows_dropped = test_ledger.rows_read, test_ledger.rows_dropped
    return train, test, ledger


def prepare_pairs(
    data: PreferenceData, paths: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Dataset, Ledger]:
    sources = find_sources(read_phases(paths))
    prepared = prepare_parts(data.cache_dir, sources, pair_preparation(tokenizer, max_length))
    parts = [part for found in prepared.values() for part in found]
    ledger = sum_ledgers(prepared)
    ledger.check(data.max_drop_share)

    def build(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        write_pairs(folder / "pairs.arrow", TokenStore([part.folder for part in parts]))

    key = hash_of([[part.folder.name for part in parts], source_hash()])
    folder = build_once(Path(data.cache_dir) / f"dpo-pairs-{key}", build)
    return Dataset.from_file(str(folder / "pairs.arrow")), ledger


def write_pairs(file: Path, store: TokenStore) -> None:
    """Write the rows of the store, three to a pair, as an Arrow stream that `datasets` opens memory-mapped."""
    ids = pa.list_(pa.uint32())
    schema = pa.schema([("prompt_ids", ids), ("chosen_ids", ids), ("rejected_ids", ids), ("length", pa.int64())])
    with pa.ipc.new_stream(file, schema) as stream:
        for start in range(0, len(store), 3 * PAIRS_AT_ONCE):
            rows = [store.row(row) for row in range(start, min(start + 3 * PAIRS_AT_ONCE, len(store)))]
            pairs = [Pair(*rows[at : at + 3]) for at in range(0, len(rows), 3)]
            columns: dict[str, list[Any]] = {name: [getattr(pair, name) for pair in pairs] for name in Pair._fields}
            columns["length"] = [
                len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs
            ]
            stream.write_batch(pa.RecordBatch.from_pydict(columns, schema=schema))
