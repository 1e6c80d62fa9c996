"""Shortening: conversations that exceed their length lose what costs least, never the end of an answer."""

from bisect import bisect_left

import numpy as np
from transformers import PreTrainedTokenizerBase

from mini_qwen.chat import TokenRow, encode_chat
from mini_qwen.schemas import BadRow, Turn

MIN_PROMPT = 16  # tokens of a question that must be left when its middle is cut out
TOO_LONG = "answer too long for max_length"


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
