"""DPO data: pairs of answers in, token rows out, both sides ending in their stop token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
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
from mini_qwen.rated import join_rated
from mini_qwen.rows import Row, check_columns, read_rows
from mini_qwen.schemas import PAIR_COLUMNS, PAIRS, BadRow, read_pair
from mini_qwen.shortening import fit_turns
from mini_qwen.store import TokenStore

PAIRS_AT_ONCE = 1000  # held in memory while the pairs are written


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

    @property
    def num_trained(self) -> int:
        return len(self.chosen_ids) + len(self.rejected_ids)

    @property
    def key(self) -> bytes:
        """The same for pairs of the same tokens, and for no others."""
        return b"".join(len(ids).to_bytes(8, "little") + ids.tobytes() for ids in self)

    def side(self, answer: str) -> TokenRow:
        """The prompt and one of the answers, `chosen_ids` or `rejected_ids`, of which the answer is to be learnt."""
        ids = np.concatenate([self.prompt_ids, getattr(self, answer)])
        return TokenRow(ids, np.arange(len(ids)) >= len(self.prompt_ids))


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
        ledger.tokens_trained += pair.num_trained
        ledger.tokens_masked += pair.num_tokens - pair.num_trained
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

    A pair that is also a test pair is not trained on.

    Columns: prompt_ids, chosen_ids, rejected_ids, and `length`, the tokens of the longer side, by which the trainer
    groups pairs. They are a file on disk, so that all processes share one file of reference log-probabilities.
    """
    files = {file.resolve(): file for file in find_files(data.train_files)}
    test_files = find_files(data.test_files or [])
    both = [files[file.resolve()] for file in test_files if file.resolve() in files]
    if both:
        raise SystemExit(f"{both[0]} is below train_files and test_files: no test pair is trained on. Name others.")
    check_columns(test_files, PAIRS)
    train_parts, ledger = prepare_pairs(data, data.train_files, tokenizer, max_length)
    test_parts: list[Path] = []
    if data.test_files:
        test_parts, test_ledger = prepare_pairs(data, data.test_files, tokenizer, max_length)
        ledger.test_rows_read, ledger.test_rows_dropped = test_ledger.rows_read, test_ledger.rows_dropped
    train, left_out = open_pairs(data.cache_dir, train_parts, without=test_parts)
    ledger.add(left_out)
    ledger.check(data.max_drop_share)
    return train, open_pairs(data.cache_dir, test_parts)[0] if test_parts else None, ledger


def prepare_pairs(
    data: PreferenceData, paths: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Path], Ledger]:
    """The folders with the token rows of pairs."""
    sources = find_sources(read_phases(paths))
    prepared = prepare_parts(data.cache_dir, sources, pair_preparation(tokenizer, max_length))
    ledger = sum_ledgers(prepared)
    ledger.check(data.max_drop_share)
    return [part.folder for found in prepared.values() for part in found], ledger


def open_pairs(cache_dir: str, parts: list[Path], without: Sequence[Path] = ()) -> tuple[Dataset, Ledger]:
    """The pairs, but for those that are also `without`, and what to add to the ledger for them."""

    def build(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        held = {pair.key for pair in pairs_of(TokenStore(without))}
        write_pairs(folder / "pairs.arrow", pairs_of(TokenStore(parts)), held).save(folder / "ledger.json")

    key = hash_of([[part.name for part in parts], [part.name for part in without], source_hash()])
    folder = build_once(Path(cache_dir) / f"dpo-pairs-{key}", build)
    return Dataset.from_file(str(folder / "pairs.arrow")), Ledger.load(folder / "ledger.json")


def pairs_of(store: TokenStore) -> Iterator[Pair]:
    for row in range(0, len(store), 3):
        yield Pair(store.row(row), store.row(row + 1), store.row(row + 2))


def write_pairs(file: Path, pairs: Iterator[Pair], held: set[bytes]) -> Ledger:
    """Write pairs but those with a key that is `held`, as an Arrow stream that `datasets` opens memory-mapped."""
    left_out = Ledger()
    ids = pa.list_(pa.uint32())
    schema = pa.schema([("prompt_ids", ids), ("chosen_ids", ids), ("rejected_ids", ids), ("length", pa.int64())])
    with pa.ipc.new_stream(file, schema) as stream:
        while some := list(islice(pairs, PAIRS_AT_ONCE)):
            alike = [pair for pair in some if pair.key in held]
            left_out.rows_like_held_out += len(alike)
            left_out.rows_kept -= len(alike)
            left_out.tokens_like_held_out += sum(pair.num_tokens for pair in alike)
            left_out.tokens_trained -= sum(pair.num_trained for pair in alike)
            left_out.tokens_masked -= sum(pair.num_tokens - pair.num_trained for pair in alike)
            some = [pair for pair in some if pair.key not in held]
            columns: dict[str, list[Any]] = {name: [getattr(pair, name) for pair in some] for name in Pair._fields}
            columns["length"] = [
                len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in some
            ]
            stream.write_batch(pa.RecordBatch.from_pydict(columns, schema=schema))
    return left_out
