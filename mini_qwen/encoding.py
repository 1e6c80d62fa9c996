"""Text as token ids: exactly those of the tokenizer, several times as fast, and never a control token."""

import json
import unicodedata
from functools import cached_property, lru_cache
from itertools import count, pairwise
from typing import Any

import numpy as np
import tiktoken
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase

CHECKED_SHARE = 100  # of so many texts one is encoded by the tokenizer as well, and compared
BORDER = "\ufdd0\ufdd1"  # between texts that are encoded together: two code points that Unicode gives to no text
MANY_BLANKS = 50_000  # tiktoken splits text by a regular expression that runs out of stack at 1,000,000 blanks


@lru_cache(maxsize=8)
def text_encoder(tokenizer: PreTrainedTokenizerBase) -> "TextEncoder":
    return TextEncoder(tokenizer)


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    """Token ids of plain texts, uint32. `<|im_end|>` written in a text comes out as characters, not as the token."""
    return text_encoder(tokenizer)(texts)


def spells_control_token(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> bool:
    """Whether a text contains what looks like a control token; it is tokenised as ordinary characters."""
    control_tokens = text_encoder(tokenizer).control_tokens
    return any("<" in text and any(token in text for token in control_tokens) for text in texts)


class TextEncoder:
    """Encodes with tiktoken where that gives the same ids as the tokenizer, else with the tokenizer itself.

    Both are byte-pair encoders. They agree where the tokenizer is a byte-level BPE with one splitting pattern whose
    merges have rising ids, as Qwen2.5's and the ones that mini_qwen trains: on all Unicode code points and on 64,593
    documents (tests/test_encoding.py, bench/results/data.json). One text in a hundred is encoded by both all the same.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.backend = tokenizer.backend_tokenizer
        layout = json.loads(self.backend.to_str())
        self.control_tokens = [token["content"] for token in layout["added_tokens"]]
        self.normalizer = self.backend.normalizer
        self.fast = make_fast(layout)
        self.counter = count()

    @cached_property
    def plain(self) -> Tokenizer:
        """The tokenizer without its control tokens, so that none comes out of a text."""
        layout = json.loads(self.backend.to_str())
        return Tokenizer.from_str(json.dumps(layout | {"added_tokens": [], "truncation": None, "padding": None}))

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        if self.fast is None:
            return [
                np.array(encoding.ids, np.uint32)
                for encoding in self.plain.encode_batch_fast(texts, add_special_tokens=False)
            ]
        joinable = [not has_many_blanks(text) and BORDER not in text for text in texts]
        quick = iter(self.encode_joined([text for text, joins in zip(texts, joinable, strict=True) if joins]))
        return [next(quick) if joins else self.encode_plain(text) for text, joins in zip(texts, joinable, strict=True)]

    def encode_joined(self, texts: list[str]) -> list[np.ndarray]:
        """All texts in one call, which leaves Python's lock to other threads for longer than many short calls do."""
        if not texts:
            return []
        whole = BORDER.join(self.normalize(text) for text in texts)
        ids = self.fast.encode_to_numpy(whole, allowed_special={BORDER}, disallowed_special=())
        borders = np.flatnonzero(ids == self.fast.encode_single_token(BORDER)).tolist()
        pieces = [ids[low + 1 : high] for low, high in pairwise([-1, *borders, len(ids)])]
        for text, piece in zip(texts, pieces, strict=True):
            if next(self.counter) % CHECKED_SHARE == 0 and not np.array_equal(piece, self.encode_plain(text)):
                raise SystemExit(
                    f"tiktoken and the tokenizer disagree on the text {text[:200]!r}. Install the versions that were "
                    "tested together: pip install -c constraints.txt -e ."
                )
        return pieces

    def normalize(self, text: str) -> str:
        if self.normalizer is None or unicodedata.is_normalized("NFC", text):
            return text
        return self.normalizer.normalize_str(text)

    def encode_plain(self, text: str) -> np.ndarray:
        """By the tokenizer; a second one is only made for a text that spells a control token.

        Or where the tokenizer would cut texts off or fill them up, as its last user told it to.
        """
        as_it_is = self.backend.truncation is None and self.backend.padding is None
        spells = any(token in text for token in self.control_tokens)
        tokenizer = self.backend if as_it_is and not spells else self.plain
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)


def has_many_blanks(text: str) -> bool:
    """True for every text with 2 x MANY_BLANKS blanks in a row: of those, MANY_BLANKS begin at a multiple of it."""
    starts = range(0, len(text) - MANY_BLANKS + 1, MANY_BLANKS)
    return any(text[at : at + MANY_BLANKS].isspace() for at in starts)


def make_fast(layout: dict[str, Any]) -> tiktoken.Encoding | None:
    """A tiktoken encoding with the same ids as the tokenizer of this layout (tokenizer.json), or None.

    tiktoken merges the pair whose joint bytes have the lowest id. That is the same as going by the list of merges
    when the n-th merge makes the n-th id after the bytes.
    """
    model, splitter = layout["model"], layout["pre_tokenizer"] or {}
    pattern = split_pattern(splitter)
    plain_bpe = model["type"] == "BPE" and not any(
        model.get(key)
        for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
        + ("byte_fallback", "ignore_merges")
    )
    if pattern is None or not plain_bpe or (layout["normalizer"] or {}).get("type", "NFC") != "NFC":
        return None
    vocab, merges = (
        model["vocab"],
        [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]],
    )
    merged = [vocab["".join(merge)] for merge in merges]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if merged != sorted(set(merged)) or len(vocab) != len(merged) + 256 or not set(alphabet) <= set(vocab):
        return None
    byte_of = byte_of_character()
    ranks = {bytes(byte_of[character] for character in token): id_ for token, id_ in vocab.items()}
    return tiktoken.Encoding("text", pat_str=pattern, mergeable_ranks=ranks, special_tokens={BORDER: len(ranks)})


def split_pattern(splitter: dict[str, Any]) -> str | None:
    """The regular expression of a pre-tokenizer that splits by it alone and then goes by bytes; else None."""
    parts = splitter.get("pretokenizers", [])
    if [part["type"] for part in parts] != ["Split", "ByteLevel"] or "Regex" not in parts[0]["pattern"]:
        return None
    simple = parts[0]["behavior"] == "Isolated" and not parts[0]["invert"]
    bytes_only = not parts[1]["add_prefix_space"] and not parts[1]["use_regex"]
    return parts[0]["pattern"]["Regex"] if simple and bytes_only else None


def byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes each byte as one character: printable Latin-1 as itself, the others from U+0100 on.

    Source: bytes_to_unicode of GPT-2.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}
