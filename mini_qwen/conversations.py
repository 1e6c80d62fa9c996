"""SFT data: conversations in, rows of tokens out, of which only the answers are trained."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from mini_qwen.chat import BadRow, TokenRow, Turn, encode_chat, encode_text, read_turns
from mini_qwen.ledger import Ledger
from mini_qwen.packing import Blocks, row_blocks
from mini_qwen.rows import DataKeys, Row, check_columns, choose_held_out, count_rows, find_files, read_rows
from mini_qwen.store import StoreWriter, TokenStore, prepare_once

COLUMNS = [["conversations"], ["messages"], ["prompt", "completion"]]
MIN_PROMPT = 16  # tokens of a question that must be left when its middle is cut out


@dataclass
class ConversationData(DataKeys):
    """Recipe keys of SFT data: rows `{"conversations": [{"from": "human"|"gpt"|"system", "value": str}, ...]}`.

    TRL's `messages` and `prompt`/`completion` are read as well. `packing` is done here and hides TRL's own.
    """

    eval_rows: int = 0  # rows cut off first, by seed, for the loss on data never trained on
    packing: bool = True  # several conversations in one block, unable to see each other


def read_conversation(values: dict[str, Any], place: str) -> tuple[list[Turn], bool]:
    """The turns of a row, (system), user, assistant, user, assistant ..., and whether a last question was left out.

    Raises BadRow for turns in another order and for a row without an answer; see also `read_turns`.
    """
    if "completion" in values:
        parts = [values.get("prompt"), values["completion"]]
        roles = ["user", "assistant"]
        value: Any = [
            turn
            for part, role in zip(parts, roles, strict=True)
            for turn in ([{"role": role, "content": part}] if not isinstance(part, list) else part)
        ]
    else:
        value = values.get("conversations", values.get("messages"))
    turns = read_turns(value, place)
    shortened = turns[-1]["role"] == "user"
    turns = turns[:-1] if shortened else turns
    spoken = [turn["role"] for turn in turns if turn["role"] != "system"]
    if not spoken or spoken[-1] != "assistant":
        raise BadRow("no answer")
    if spoken != ["user", "assistant"] * (len(spoken) // 2) or any(turn["role"] == "system" for turn in turns[1:]):
        raise BadRow("turns out of order")
    return turns, shortened


def cut_middle(tokenizer: PreTrainedTokenizerBase, ids: list[int], length: int) -> list[int]:
    """The first and the last tokens of a text, at most `length` in all, without half characters at the cut."""
    head, tail = ids[: (length + 1) // 2], ids[len(ids) - length // 2 :]
    while head and tokenizer.decode(head).endswith("\ufffd"):
        head.pop()
    while tail and tokenizer.decode(tail).startswith("\ufffd"):
        tail.pop(0)
    return head + tail


def fit_turns(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[Turn],
    contents: list[list[int]],
    max_length: int,
    add_generation_prompt: bool = False,
) -> TokenRow:
    """The turns as tokens, shortened to `max_length` where that costs least.

    Whole early exchanges go first, then the middle of the last question; never a part of an answer, so that every
    row ends in its stop token. Raises BadRow when the rest does not fit even so.

    Args:
        contents: token ids of the turns' contents.
    """
    num_system = turns[0]["role"] == "system"
    row = encode_chat(tokenizer, turns, add_generation_prompt, contents)
    while len(row.ids) > max_length and len(turns) - num_system > 2:
        turns = turns[:num_system] + turns[num_system + 2 :]
        contents = contents[:num_system] + contents[num_system + 2 :]
        row = encode_chat(tokenizer, turns, add_generation_prompt, contents)
    excess = len(row.ids) - max_length
    if excess > 0:
        last = max(index for index, turn in enumerate(turns) if turn["role"] == "user")
        if len(contents[last]) - excess < MIN_PROMPT:
            raise BadRow("answer too long for max_length")
        question = cut_middle(tokenizer, contents[last], len(contents[last]) - excess)
        row = encode_chat(tokenizer, turns, add_generation_prompt, [*contents[:last], question, *contents[last + 1 :]])
    return row


def fit_conversation(
    tokenizer: PreTrainedTokenizerBase, turns: list[Turn], max_length: int
) -> tuple[TokenRow, TokenRow]:
    """The conversation as tokens, whole and shortened; raises BadRow when its last answer does not fit."""
    contents = encode_text(tokenizer, [turn["content"] for turn in turns])
    whole = encode_chat(tokenizer, turns, contents=contents)
    return whole, fit_turns(tokenizer, turns, contents, max_length)


def conversation_rows(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, ledger: Ledger, held_out: set[int]
) -> Iterator[tuple[TokenRow, bool]]:
    """Yield (token row, is held out) of every row that can be trained on; the others are counted by reason."""
    for index, row in enumerate(rows):
        ledger.rows_read += 1
        try:
            turns, shortened = read_conversation(row.values, row.place)
            whole, fitted = fit_conversation(tokenizer, turns, max_length)
        except BadRow as reason:
            ledger.rows_dropped[str(reason)] += 1
            continue
        if index in held_out:
            ledger.rows_held_out += 1
            yield fitted, True
            continue
        ledger.rows_kept += 1
        ledger.rows_shortened += shortened or len(fitted.ids) < len(whole.ids)
        ledger.tokens_read += len(whole.ids)
        ledger.tokens_trained += sum(fitted.trained)
        ledger.tokens_masked += len(fitted.ids) - sum(fitted.trained)
        if len(whole.ids) > len(fitted.ids):
            ledger.tokens_dropped["shortened to max_length"] += len(whole.ids) - len(fitted.ids)
        yield fitted, False


def prepare_conversations(
    data: ConversationData, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int
) -> tuple[Blocks, Blocks | None, Ledger]:
    """Training blocks of at most `max_length` tokens, held-out blocks (None when eval_rows is 0), and the ledger."""
    files = find_files(data.train_files)
    check_columns(files, COLUMNS)
    held_out = choose_held_out(files, data.eval_rows, seed)

    def build(folder: Path) -> Ledger:
        ledger = Ledger(files=len(files))
        writers = {part: StoreWriter(folder / name, flags=True) for part, name in [(False, "train"), (True, "eval")]}
        rows = read_rows(files, [name for choice in COLUMNS for name in choice])
        rows = tqdm(rows, total=sum(map(count_rows, files)), desc="tokenising", unit="rows")
        for row, part in conversation_rows(rows, tokenizer, max_length, ledger, held_out):
            writers[part].add(row.ids, row.trained)
        for writer in writers.values():
            writer.close()
        return ledger

    settings = {"eval_rows": data.eval_rows, "seed": seed, "max_length": max_length}
    folder, ledger = prepare_once(data.cache_dir, "sft", files, tokenizer, settings, build)
    ledger.check(data.max_drop_share)
    train = row_blocks(TokenStore(folder / "train"), max_length, data.packing)
    held_out_blocks = row_blocks(TokenStore(folder / "eval"), max_length, data.packing) if data.eval_rows else None
    return train, held_out_blocks, ledger
