"""Held-out documents: how many bits a checkpoint needs for text that it never trained on."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_qwen.chat import TokenRow
from mini_qwen.encoding import encode_text
from mini_qwen.files import find_files
from mini_qwen.metrics import Unigram, bits_per_byte, bits_per_character, perplexity
from mini_qwen.rows import read_rows
from mini_qwen.scoring import score_rows
from mini_qwen.tokenizer import count_bytes, count_characters

MASK = "every token of a document but its first, which has nothing before it; the end token is scored"


def score_documents(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, files: list[str], unigram_files: list[str], length: int
) -> dict[str, Any]:
    """Loss in nats a token, perplexity, bits per byte; bits per character of the Chinese documents among them.

    And bits per byte of a unigram model of the same tokens, where `unigram_files` name the rows to count. The first
    token of a document has nothing before it: neither its bits nor its bytes count. Documents longer than `length`
    tokens lose their end.
    """
    texts, num_empty = read_texts(files)
    rows = document_rows(tokenizer, texts, length)
    scores = score_rows(model, rows, "documents")
    total, count = sum(score.sum_log_prob for score in scores), sum(score.num_tokens for score in scores)
    num_bytes = sum(count_bytes(tokenizer, row.ids[1:].tolist()) for row in rows)
    figures: dict[str, Any] = {
        "loss": -total / count,
        "perplexity": perplexity(total, count),
        "bits_per_byte": bits_per_byte(total, num_bytes),
        "scored_tokens": count,
        "scored_bytes": num_bytes,
        "num_documents": len(rows),
        "num_documents_cut": sum(int(row.ids[-1]) != tokenizer.eos_token_id for row in rows),
        "num_rows_empty": num_empty,
    }
    chinese = [at for at, text in enumerate(texts) if is_chinese(text)]
    num_characters = sum(count_characters(tokenizer, rows[at].ids[1:].tolist()) for at in chinese)
    if num_characters:
        log_prob = sum(scores[at].sum_log_prob for at in chinese)
        figures |= {
            "chinese_bits_per_character": bits_per_character(log_prob, num_characters),
            "chinese_characters": num_characters,
            "chinese_tokens": sum(scores[at].num_tokens for at in chinese),
        }
    if unigram_files:
        training_rows = document_rows(tokenizer, read_texts(unigram_files)[0], length)
        unigram = Unigram((row.ids.tolist() for row in training_rows), len(tokenizer))
        total = sum(unigram.sum_log_prob(row.ids[1:].tolist()) for row in rows)
        figures["unigram_bits_per_byte"] = bits_per_byte(total, num_bytes)
    return figures


def document_rows(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], length: int) -> list[TokenRow]:
    """Documents as in pretraining, with their end token; those that are longer lose their end."""
    end = np.uint32(tokenizer.eos_token_id)
    return [TokenRow(np.append(ids, end)[:length]) for ids in encode_text(tokenizer, list(texts))]


def read_texts(files: list[str]) -> tuple[list[str], int]:
    """The texts of all rows, and how many rows have none or a blank one, which pretraining drops as well.

    Raises SystemExit when there is none, and for one that is no text.
    """
    texts, empty = [], []
    for row in read_rows(find_files(files), ["text"]):
        value = row.values.get("text")
        if value is None or (isinstance(value, str) and not value.strip()):
            empty.append(f"{row.place} ({row.fault or 'no text'})")
        else:
            texts.append(row.text("text"))
    if not texts:
        raise SystemExit(f"There is no text in {', '.join(files)}: no row has anything under 'text'.")
    if empty:
        print(f"documents: {len(empty):,} rows without a text are left out, the first {empty[0]}")
    return texts, len(empty)


def is_chinese(text: str) -> bool:
    """Whether most of the letters are Chinese characters (CJK unified ideographs).

    >>> is_chinese("小明 lives 在北京。")  # five letters of ten are no more than half
    False
    """
    letters = [letter for letter in text if letter.isalpha()]
    return 2 * sum("\u4e00" <= letter <= "\u9fff" for letter in letters) > len(letters)
