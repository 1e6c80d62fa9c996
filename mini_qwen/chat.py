"""Conversations as tokens: one template for training, evaluation and chat, and no control token out of any text."""

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

TEMPLATE = (Path(__file__).parent / "chatml.jinja").read_text(encoding="utf-8")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
Turn = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


class Piece(NamedTuple):
    """A part of a rendered conversation: fixed template text, or the content of turn `turn`."""

    text: str
    turn: int | None
    trained: bool


class TokenRow(NamedTuple):
    ids: list[int]
    trained: list[bool]  # True where the model is to learn to write the token


class BadRow(Exception):
    """A row that cannot be trained on and is dropped under this reason."""


def read_turns(value: Any, place: str) -> list[Turn]:
    """Turns in either spelling, `from`/`value` or `role`/`content`, as `role`/`content` with known roles.

    Raises:
        SystemExit: an unknown role: data of another kind must not be trained on by mistake.
        BadRow: no list, no turns, text that is missing or blank.
    """
    if not isinstance(value, list) or not value:
        raise BadRow("no turns")
    turns = []
    for turn in value:
        if not isinstance(turn, dict):
            raise BadRow("malformed turn")
        role = turn.get("from", turn.get("role"))
        content = turn.get("value", turn.get("content"))
        if role not in ROLES:
            raise SystemExit(
                f"{place}: unknown role {role!r}. Known roles are {', '.join(ROLES)}; map or remove this turn first."
            )
        if role == "system" and content in (None, ""):
            continue  # no system turn, written as an empty one
        if not isinstance(content, str) or not content.strip():
            raise BadRow(f"empty {ROLES[role]} turn")
        turns.append({"role": ROLES[role], "content": content})
    if not turns:
        raise BadRow("no turns")
    return turns


@lru_cache(maxsize=4096)
def skeleton(template: str, roles: tuple[str, ...], add_generation_prompt: bool) -> list[Piece]:
    """Render the template around placeholders, once for each sequence of roles, and cut it into pieces.

    The placeholders are private-use characters, so that a real conversation's text is never searched or parsed.
    """
    marks = [chr(0xE000 + index) for index in range(len(roles))]
    turns = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    rendered, spans = render_jinja_template(
        [turns], chat_template=template, return_assistant_tokens_mask=True, add_generation_prompt=add_generation_prompt
    )
    text, trained_spans = rendered[0], spans[0]
    trained = [any(start <= at < end for start, end in trained_spans) for at in range(len(text))]
    pieces: list[Piece] = []
    for at, character in enumerate(text):
        if character in marks:
            pieces.append(Piece("", marks.index(character), trained[at]))
        elif pieces and pieces[-1].turn is None and pieces[-1].trained == trained[at]:
            pieces[-1] = pieces[-1]._replace(text=pieces[-1].text + character)
        else:
            pieces.append(Piece(character, None, trained[at]))
    return pieces


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of plain texts. `<|im_end|>` written in a text comes out as ordinary characters, not as the token."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


@lru_cache(maxsize=4096)
def encode_template_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[Turn],
    add_generation_prompt: bool = False,
    contents: list[list[int]] | None = None,
) -> TokenRow:
    """Token ids of a conversation and which of them are trained: each answer and its `<|im_end|>`, nothing else.

        user: hi, assistant: yes
            <|im_start|> user \\n hi <|im_end|> \\n <|im_start|> assistant \\n yes <|im_end|> \\n
        trained   0        0   0  0      0       0        0           0      0   1       1       0

    Each content is tokenised by itself, so that no token spans the border to the template, and the prompt of a chat
    is always a prefix of the conversation it becomes.

    Args:
        add_generation_prompt: end with the opening of an assistant turn.
        contents: token ids of the turns' contents, where they are known already.
    """
    contents = contents or encode_text(tokenizer, [turn["content"] for turn in turns])
    template = tokenizer.chat_template or TEMPLATE
    ids: list[int] = []
    trained: list[bool] = []
    for piece in skeleton(template, tuple(turn["role"] for turn in turns), add_generation_prompt):
        part = encode_template_text(tokenizer, piece.text) if piece.turn is None else contents[piece.turn]
        ids += part
        trained += [piece.trained] * len(part)
    return TokenRow(ids, trained)
