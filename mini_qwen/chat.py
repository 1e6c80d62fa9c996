"""Conversations as tokens: one template for training, evaluation and chat, and no control token out of any text."""

import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from mini_qwen.encoding import encode_text
from mini_qwen.schemas import Turn

TEMPLATE = (Path(__file__).parent / "chatml.jinja").read_text(encoding="utf-8")


class Piece(NamedTuple):
    """A part of a rendered conversation: fixed template text, or the content of turn `turn`."""

    text: str
    turn: int | None
    trained: bool


class TokenRow(NamedTuple):
    ids: np.ndarray  # uint32
    trained: np.ndarray | None = None  # bool, True where the model is to learn to write the token; None: everywhere


@lru_cache(maxsize=256)  # one of 512 turns is 400 kB, and a server's clients choose the roles
def skeleton(template: str, roles: tuple[str, ...], add_generation_prompt: bool) -> list[Piece]:
    """Render the template around placeholders, once for each sequence of roles, and cut it into pieces.

    The placeholders are private-use characters, so that a real conversation's text is never searched or parsed.
    """
    marks = {chr(0xE000 + index): index for index in range(len(roles))}
    turns = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    rendered, spans = render_jinja_template(
        [turns], chat_template=template, return_assistant_tokens_mask=True, add_generation_prompt=add_generation_prompt
    )
    text = rendered[0]
    trained = [False] * len(text)
    for start, end in spans[0]:
        trained[start:end] = [True] * (end - start)
    pieces: list[Piece] = []
    for at, character in enumerate(text):
        if character in marks:
            pieces.append(Piece("", marks[character], trained[at]))
        elif pieces and pieces[-1].turn is None and pieces[-1].trained == trained[at]:
            pieces[-1] = pieces[-1]._replace(text=pieces[-1].text + character)
        else:
            pieces.append(Piece(character, None, trained[at]))
    return pieces


@lru_cache(maxsize=4096)
def encode_template_text(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """Token ids of fixed template text, in which control tokens are meant as such."""
    control_ids = tokenizer.get_added_vocab()
    parts = [part for part in re.split(f"({'|'.join(map(re.escape, control_ids))})", text) if part]
    ids = [[control_ids[part]] if part in control_ids else encode_text(tokenizer, [part])[0] for part in parts]
    return np.concatenate(ids).astype(np.uint32)


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[Turn],
    add_generation_prompt: bool = False,
    contents: list[np.ndarray] | None = None,
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
    pieces = skeleton(template, tuple(turn["role"] for turn in turns), add_generation_prompt)
    parts = [
        encode_template_text(tokenizer, piece.text) if piece.turn is None else contents[piece.turn] for piece in pieces
    ]
    trained = np.repeat([piece.trained for piece in pieces], [len(part) for part in parts])
    return TokenRow(np.concatenate(parts), trained)
