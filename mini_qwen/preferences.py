"""DPO data: pairs of answers in, token rows out, both sides ending in their stop token."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer

from mini_qwen.chat import BadRow, Turn, encode_chat, encode_text, read_turns
from mini_qwen.conversations import fit_turns
from mini_qwen.ledger import Ledger
from mini_qwen.rows import DataKeys, Row, check_columns, count_rows, find_files, read_rows
from mini_qwen.store import prepare_once

COLUMNS = ["prompt", "chosen", "rejected"]


@dataclass
class PreferenceData(DataKeys):
    """Recipe keys of DPO data: rows `{"prompt": str or turns, "chosen": turns, "rejected": turns}`."""

    test_files: list[str] | None = None  # never trained on, only scored


class Pair(NamedTuple):
    prompt_ids: list[int]  # ends with the opening of the assistant's turn
    chosen_ids: list[int]  # the answer and <|im_end|>
    rejected_ids: list[int]

    @property
    def num_tokens(self) -> int:
        """Of both sides together, each with the prompt: what the model computes."""
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


def read_answer(value: Any, place: str) -> tuple[list[Turn], str]:
    """The turns before the answer (often none, or the prompt again) and the answer's text."""
    turns = read_turns([{"role": "assistant", "content": value}] if isinstance(value, str) else value, place)
    if turns[-1]["role"] != "assistant":
        raise BadRow("last turn is not an answer")
    return turns[:-1], turns[-1]["content"]


def read_pair(values: dict[str, Any], place: str) -> tuple[list[Turn], str, str]:
    """Prompt turns, chosen answer, rejected answer. The prompt may stand in `prompt`, in both sides, or in all three.

    Raises BadRow: an answer is missing or empty, both are the same, or the sides have different prompts.
    """
    before_chosen, chosen = read_answer(values.get("chosen"), place)
    before_rejected, rejected = read_answer(values.get("rejected"), place)
    if before_chosen != before_rejected:
        raise BadRow("different prompts in chosen and rejected")
    if chosen == rejected:
        raise BadRow("chosen equals rejected")
    prompt = values.get("prompt")
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    turns = before_chosen or read_turns(prompt, place)
    if turns[-1]["role"] != "user":
        raise BadRow("prompt does not end with a question")
    return turns, chosen, rejected


def fit_pair(
    tokenizer: PreTrainedTokenizerBase, turns: list[Turn], chosen: str, rejected: str, max_length: int
) -> tuple[Pair, Pair]:
    """The pair as tokens, whole and with its prompt shortened so that the longer side fits `max_length`.

    Raises BadRow when an answer does not fit even so.
    """
    contents = encode_text(tokenizer, [turn["content"] for turn in turns])
    answers = [[*ids, tokenizer.eos_token_id] for ids in encode_text(tokenizer, [chosen, rejected])]
    room = max_length - max(map(len, answers))
    whole = encode_chat(tokenizer, turns, add_generation_prompt=True, contents=contents)
    fitted = fit_turns(tokenizer, turns, contents, room, add_generation_prompt=True)
    return Pair(whole.ids, *answers), Pair(fitted.ids, *answers)


def preference_rows(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, ledger: Ledger
) -> Iterator[dict[str, list[int]]]:
    """Yield `prompt_ids`, `chosen_ids`, `rejected_ids` of every usable pair; the others are counted by reason."""
    for row in rows:
        ledger.rows_read += 1
        try:
            whole, fitted = fit_pair(tokenizer, *read_pair(row.values, row.place), max_length)
        except BadRow as reason:
            ledger.rows_dropped[str(reason)] += 1
            continue
        ledger.rows_kept += 1
        trained = len(fitted.chosen_ids) + len(fitted.rejected_ids)
        ledger.tokens_read += whole.num_tokens
        ledger.tokens_trained += trained
        ledger.tokens_masked += fitted.num_tokens - trained
        if fitted.num_tokens < whole.num_tokens:
            ledger.rows_shortened += 1
            ledger.tokens_dropped["shortened to max_length"] += whole.num_tokens - fitted.num_tokens
        yield fitted._asdict()


def prepare_preferences(
    data: PreferenceData, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Dataset, Dataset | None, Ledger]:
    """Training pairs, test pairs (None without test_files), and the ledger of the training pairs.

    The pairs are datasets on disk, so that all processes share one file of reference log-probabilities.
    """
    train, ledger = prepare_pairs(data, data.train_files, tokenizer, max_length)
    test = prepare_pairs(data, data.test_files, tokenizer, max_length)[0] if data.test_files else None
    return train, test, ledger


def prepare_pairs(
    data: PreferenceData, paths: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Dataset, Ledger]:
    files = find_files(paths)
    check_columns(files, [COLUMNS, COLUMNS[1:]])

    def build(folder: Path) -> Ledger:
        ledger = Ledger(files=len(files))
        rows = tqdm(read_rows(files, COLUMNS), total=sum(map(count_rows, files)), desc="tokenising", unit="rows")
        pairs = list(preference_rows(rows, tokenizer, max_length, ledger))
        ledger.check(data.max_drop_share)
        Dataset.from_list(pairs).save_to_disk(folder / "pairs")
        return ledger

    folder, ledger = prepare_once(data.cache_dir, "dpo", files, tokenizer, {"max_length": max_length}, build)
    ledger.check(data.max_drop_share)
    return Dataset.load_from_disk(folder / "pairs"), ledger


class PreparedDPOTrainer(DPOTrainer):
    """TRL's DPOTrainer on pairs that are token ids already, of which it would otherwise make texts to tokenise."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset
