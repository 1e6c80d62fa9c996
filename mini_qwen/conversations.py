"""SFT data: conversations in, rows of tokens out, of which only the answers are trained."""

from bisect import bisect_left
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from mini_qwen.blocks import Blocks
from mini_qwen.cache import Part, Preparation, prepare_parts
from mini_qwen.chat import TokenRow, encode_chat
from mini_qwen.documents import document_preparation
from mini_qwen.encoding import encode_text, spells_control_token
from mini_qwen.ledger import Ledger
from mini_qwen.mixture import Arrangement, MixtureKeys, Phase, arrange, find_sources, read_phases
from mini_qwen.packing import fit, one_each
from mini_qwen.rows import Row, read_rows
from mini_qwen.schemas import CONVERSATION_COLUMNS, CONVERSATIONS, BadRow, Turn, check_order, read_conversation

MIN_PROMPT = 16  # tokens of a question that must be left when its middle is cut out
TOO_LONG, SHORTENED = "answer too long for max_length", "shortened"


@dataclass
class ConversationData(MixtureKeys):
    """Recipe keys of SFT data; docs/data.md lists the schemas. `packing` is done here and hides TRL's own."""

    packing: bool = True  # several conversations in one block, unable to see each other
    long_answers: Literal["drop", "cut"] = "drop"  # what becomes of an answer that alone exceeds max_length
    replay_files: list[str] | None = None  # documents that are trained on in between, against forgetting
    replay_share: float = 0.1  # of all tokens in the blocks


def cut_middle(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, length: int) -> np.ndarray:
    """The first and the last tokens of a text, at most `length` in all, without half characters at the cut."""
    head, tail = (length + 1) // 2, len(ids) - length // 2
    for _ in range(3):  # of a character of 4 bytes, no more tokens lie on one side of a border inside it
        head -= cuts_character(tokenizer, ids, head)
        tail += cuts_character(tokenizer, ids, tail)
    return np.concatenate([ids[:head], ids[tail:]])


def cuts_character(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, at: int) -> bool:
    """Whether the border before token `at` lies inside a character. U+FFFD itself may well be one of the text."""
    before, behind = ids[max(at - 4, 0) : at], ids[at : at + 4]
    whole = tokenizer.decode(np.concatenate([before, behind]))
    return tokenizer.decode(before) + tokenizer.decode(behind) != whole


def fit_turns(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[Turn],
    contents: list[np.ndarray],
    max_length: int,
    add_generation_prompt: bool = False,
) -> TokenRow:
    """The turns as tokens, shortened to `max_length` where that costs least.

    Whole early exchanges go first, then the middle of the last question; never a part of an answer, so that every
    row ends in its stop token. Raises BadRow when the rest does not fit even so.

    Args:
        contents: token ids of the turns' contents.
    """
    num_system = int(turns[0]["role"] == "system")

    def encode_without(exchanges: int) -> TokenRow:
        kept = [*range(num_system), *range(num_system + 2 * exchanges, len(turns))]
        return encode_chat(tokenizer, [turns[at] for at in kept], add_generation_prompt, [contents[at] for at in kept])

    early = range((len(turns) - num_system - 1) // 2)
    dropped = bisect_left(early, True, key=lambda exchanges: len(encode_without(exchanges).ids) <= max_length)
    row = encode_without(dropped)
    turns, contents = (items[:num_system] + items[num_system + 2 * dropped :] for items in (turns, contents))
    excess = len(row.ids) - max_length
    if excess > 0:
        last = max(index for index, turn in enumerate(turns) if turn["role"] == "user")
        if len(contents[last]) - excess < MIN_PROMPT:
            raise BadRow(TOO_LONG)
        question = cut_middle(tokenizer, contents[last], len(contents[last]) - excess)
        row = encode_chat(tokenizer, turns, add_generation_prompt, [*contents[:last], question, *contents[last + 1 :]])
    return row


def fit_conversation(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[Turn],
    contents: list[np.ndarray],
    max_length: int,
    long_answers: str = "drop",
) -> TokenRow:
    """The conversation as tokens, shortened to `max_length`.

    With `long_answers` "cut", a last answer that does not fit even so loses its end, and with that its end token: it
    must not teach where to stop. Raises BadRow when none of it is left, and with "drop" for every such answer.
    """
    try:
        return fit_turns(tokenizer, turns, contents, max_length)
    except BadRow:
        kept = [*range(turns[0]["role"] == "system"), len(turns) - 2, len(turns) - 1]
        row = encode_chat(tokenizer, [turns[index] for index in kept], contents=[contents[index] for index in kept])
        if long_answers == "drop" or not row.trained[:max_length].any():
            raise
        return TokenRow(row.ids[:max_length], row.trained[:max_length])


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, max_length: int, long_answers: str, rows: list[Row]
) -> tuple[list[TokenRow], Ledger]:
    """The token rows of conversations, of which the answers are to be learnt, and what became of the rows."""
    ledger = Ledger()
    token_rows = []
    for row in rows:
        ledger.rows_read += 1
        num_tokens = 0
        try:
            if row.fault:
                raise BadRow(row.fault)
            turns = read_conversation(row.values, row.place)
            texts = [turn["content"] for turn in turns]
            ledger.rows_with_control_text += spells_control_token(tokenizer, texts)
            contents = encode_text(tokenizer, texts)
            fitted = whole = encode_chat(tokenizer, turns, contents=contents)
            num_tokens = len(whole.ids)
            answered = turns[:-1] if turns[-1]["role"] == "user" else turns
            check_order(answered)
            if num_tokens > max_length or len(answered) < len(turns):
                fitted = fit_conversation(tokenizer, answered, contents[: len(answered)], max_length, long_answers)
        except BadRow as reason:
            ledger.drop(str(reason), row.place, num_tokens)
            continue
        ledger.rows_kept += 1
        ledger.tokens_read += num_tokens
        if len(fitted.ids) < num_tokens:
            ledger.rows_shortened += 1
            ledger.tokens_dropped[SHORTENED] += num_tokens - len(fitted.ids)
        token_rows.append(fitted)
    return token_rows, ledger


def conversation_preparation(
    data: ConversationData, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Preparation:
    """How conversations become token rows."""
    return Preparation(
        stage="sft",
        choices=CONVERSATIONS,
        read=lambda file: read_rows([file], CONVERSATION_COLUMNS),
        encode=partial(encode_conversations, tokenizer, max_length, data.long_answers),
        flags=True,
        tokenizer=tokenizer,
        settings={"max_length": max_length, "long_answers": data.long_answers},
    )


def add_replay(
    data: ConversationData, phases: list[Phase], sources: dict[str, list[Part]], tokenizer: PreTrainedTokenizerBase
) -> list[Phase]:
    """Prepare the documents to replay, enter them in `sources`, and return the phases with their share of them."""
    if not 0 < data.replay_share < 1:
        raise SystemExit(f"replay_share is {data.replay_share}; it is a share of all tokens, above 0 and below 1.")
    tokens = {path: sum(part.num_tokens for part in parts) for path, parts in sources.items()}
    files = find_sources([dict.fromkeys(data.replay_files, 1.0)])
    sources |= prepare_parts(data.cache_dir, files, document_preparation(tokenizer))
    available = sum(part.num_tokens for path in files for part in sources[path])
    if not available:
        raise SystemExit(f"There is no text to replay in {', '.join(data.replay_files)}. Name other replay_files.")
    mixed = []
    for phase in phases:
        spoken = sum(tokens[path] * passes for path, passes in phase.items())
        passes = data.replay_share / (1 - data.replay_share) * spoken / available
        mixed.append(phase | dict.fromkeys(files, passes))
    return mixed


def prepare_conversations(
    data: ConversationData, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int
) -> tuple[Blocks, Blocks | None, Ledger]:
    """Training blocks of at most `max_length` tokens, held-out blocks (None when eval_rows is 0), and the ledger."""
    phases = read_phases(data.train_files)
    preparation = conversation_preparation(data, tokenizer, max_length)
    prepared = prepare_parts(data.cache_dir, find_sources(phases), preparation)
    held_out_of = list(prepared)
    if data.replay_files:
        phases = add_replay(data, phases, prepared, tokenizer)
    plan = Arrangement(
        phases=phases,
        eval_rows=data.eval_rows,
        held_out_of=held_out_of,
        packing="best_fit" if data.packing else "none",
        pack=partial(fit, fill=False) if data.packing else one_each,
        block_size=max_length,
        isolate=True,
        seed=seed,
    )
    blocks, eval_blocks, ledger = arrange(data.cache_dir, "sft", prepared, plan)
    ledger.check(data.max_drop_share)
    return blocks, eval_blocks, ledger
