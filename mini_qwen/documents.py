"""Pretraining data: documents in, blocks of tokens out."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from mini_qwen.blocks import Blocks
from mini_qwen.cache import Preparation, prepare_parts
from mini_qwen.chat import TokenRow
from mini_qwen.encoding import encode_text, spells_control_token
from mini_qwen.ledger import Ledger
from mini_qwen.mixture import Arrangement, MixtureKeys, arrange, find_sources, read_phases
from mini_qwen.packing import cut, fit
from mini_qwen.rows import Row, read_rows
from mini_qwen.schemas import BadRow, check_unicode

COLUMNS = ["text"]
MAX_CHARACTERS = 1_000_000  # a longer document is split into rows of its own, so that memory stays small


@dataclass
class DocumentData(MixtureKeys):
    """Recipe keys of pretraining data: rows `{"text": ...}`."""

    block_size: int = 1024  # tokens
    packing: Literal["best_fit", "cut"] = "best_fit"  # cut: laid end to end, and cut wherever a block is full
    isolate_documents: bool = True  # false: plain concatenation, documents of a block see each other


def read_document(row: Row) -> str:
    """The text of a row.

    Raises:
        SystemExit: the text is a number or the like: then the column is not what the recipe takes it for.
        BadRow: there is none.
    """
    if row.fault:
        raise BadRow(row.fault)
    text = row.values.get("text")
    if text is not None and not isinstance(text, str):
        raise SystemExit(
            f"{row.place}: 'text' is {text!r:.80}, of type {type(text).__name__}. Documents must be text."
        )
    if text is None or not text.strip():
        raise BadRow("empty text")
    check_unicode(text)
    return text


def split_document(text: str) -> list[str]:
    """Parts of at most MAX_CHARACTERS, cut behind a line break where there is one."""
    parts = []
    while len(text) > MAX_CHARACTERS:
        at = text.rfind("\n", 0, MAX_CHARACTERS) + 1 or MAX_CHARACTERS
        parts.append(text[:at])
        text = text[at:]
    return [*parts, text]


def read_documents(rows: Iterable[Row], ledger: Ledger) -> Iterator[str]:
    """The texts of all rows that have one; the others are counted by reason."""
    for row in rows:
        ledger.rows_read += 1
        try:
            yield read_document(row)
        except BadRow as reason:
            ledger.drop(str(reason), row.place)


def draw(texts: Iterable[str], num_texts: int, seed: int) -> list[str]:
    """At most `num_texts` of the texts, drawn by seed and in no order, each with the same chance.

    Source: Vitter, Random sampling with a reservoir, 1985, algorithm R.
    """
    generator = random.Random(seed)
    drawn: list[str] = []
    for index, text in enumerate(texts):
        if len(drawn) < num_texts:
            drawn.append(text)
        elif (at := generator.randrange(index + 1)) < num_texts:
            drawn[at] = text
    generator.shuffle(drawn)
    return drawn


def encode_documents(tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> tuple[list[TokenRow], Ledger]:
    """The token rows of documents, each ending in `<|im_end|>`, and what became of the rows."""
    ledger = Ledger()
    texts, is_last = [], []
    for text in read_documents(rows, ledger):
        parts = split_document(text)
        texts += parts
        is_last += [False] * (len(parts) - 1) + [True]
        ledger.rows_split_off += len(parts) - 1
        ledger.rows_with_control_text += spells_control_token(tokenizer, [text])
    end = np.array([tokenizer.eos_token_id], np.uint32)
    token_rows = [
        TokenRow(np.concatenate([ids, end]) if last else ids)
        for ids, last in zip(encode_text(tokenizer, texts), is_last, strict=True)
    ]
    ledger.rows_kept = len(token_rows)
    ledger.tokens_read = sum(len(row.ids) for row in token_rows)
    return token_rows, ledger


def document_preparation(tokenizer: PreTrainedTokenizerBase) -> Preparation:
    """How documents become token rows; the same for every recipe with this tokenizer."""
    return Preparation(
        stage="pt",
        choices=[COLUMNS],
        read=lambda file: read_rows([file], COLUMNS),
        encode=partial(encode_documents, tokenizer),
        flags=False,
        tokenizer=tokenizer,
        settings={},
    )


def prepare_documents(
    data: DocumentData, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[Blocks, Blocks | None, Ledger]:
    """Training blocks, held-out blocks (None when eval_rows is 0), and the ledger of both.

    Each document is its text's tokens and `<|im_end|>`. Nothing is cut off but the stated tail of the whole corpus.

    Raises SystemExit when all documents together are shorter than one block.
    """
    if data.block_size < 2:
        raise SystemExit(
            f"block_size is {data.block_size}; a block needs 2 tokens at least, one to predict the other."
        )
    phases = read_phases(data.train_files)
    prepared = prepare_parts(data.cache_dir, find_sources(phases), document_preparation(tokenizer))
    plan = Arrangement(
        phases=phases,
        eval_rows=data.eval_rows,
        held_out_of=list(prepared),
        packing=data.packing,
        pack=partial(fit, fill=True) if data.packing == "best_fit" else cut,
        block_size=data.block_size,
        isolate=data.isolate_documents,
        seed=seed,
    )
    blocks, eval_blocks, ledger = arrange(data.cache_dir, "pt", prepared, plan)
    ledger.check(data.max_drop_share)
    num_tokens = ledger.tokens_trained + ledger.tokens_masked + ledger.tokens_dropped.total()
    if num_tokens < data.block_size:
        raise SystemExit(
            f"All documents together have {num_tokens:,} tokens, fewer than one block of {data.block_size:,}. Use "
            "more data or a smaller block_size."
        )
    return blocks, eval_blocks, ledger
