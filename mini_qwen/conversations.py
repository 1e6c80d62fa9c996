"""SFT data: conversations in, rows of tokens out, of which only the answers are trained."""

from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from mini_qwen.blocks import Blocks
from mini_qwen.cache import Part, Preparation, prepare_parts, sum_ledgers
from mini_qwen.chat import TokenRow, encode_chat
from mini_qwen.documents import COLUMNS, document_preparation
from mini_qwen.encoding import encode_text, spells_control_token
from mini_qwen.ledger import Ledger
from mini_qwen.mixture import Arrangement, MixtureKeys, Phase, arrange, find_sources, read_phases
from mini_qwen.packing import fit, one_each
from mini_qwen.rows import Row, check_columns, read_rows
from mini_qwen.schemas import CONVERSATION_COLUMNS, CONVERSATIONS, BadRow, Turn, check_order, read_conversation
from mini_qwen.shortening import fit_conversation


@dataclass
class ConversationData(MixtureKeys):
    """Recipe keys of SFT data; docs/data.md lists the schemas. `packing` is done here and hides TRL's own."""

    packing: bool = True  # several conversations in one block, unable to see each other
    long_answers: Literal["drop", "cut"] = "drop"  # what becomes of an answer that alone exceeds max_length
    replay_files: list[str] | None = None  # documents that are trained on in between, against forgetting
    replay_share: float = 0.1  # of all tokens in the blocks


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, max_length: int, long_answers: str, rows: list[Row]
) -> tuple[list[TokenRow], Ledger]:
    """The token rows of conversations, of which the answers are to be learnt, and what became of the rows."""
    ledger = Ledger(rows_read=len(rows))
    read: list[tuple[Row, list[Turn]]] = []
    for row in rows:
        try:
            if row.fault:
                raise BadRow(row.fault)
            read.append((row, read_conversation(row.values, row.place)))
        except BadRow as reason:
            ledger.drop(str(reason), row.place)
    texts = [[turn["content"] for turn in turns] for _, turns in read]
    ids = iter(encode_text(tokenizer, [text for conversation in texts for text in conversation]))
    token_rows = []
    for (row, turns), conversation in zip(read, texts, strict=True):
        ledger.rows_with_control_text += spells_control_token(tokenizer, conversation)
        contents = list(islice(ids, len(turns)))
        fitted = whole = encode_chat(tokenizer, turns, contents=contents)
        answered = turns[:-1] if turns[-1]["role"] == "user" else turns
        try:
            check_order(answered)
            if len(whole.ids) > max_length or len(answered) < len(turns):
                fitted = fit_conversation(tokenizer, answered, contents[: len(answered)], max_length, long_answers)
        except BadRow as reason:
            ledger.drop(str(reason), row.place, len(whole.ids))
            continue
        ledger.keep(len(whole.ids), len(whole.ids) - len(fitted.ids))
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


def find_replay(data: ConversationData) -> dict[str, list[Path]]:
    """The files of each path that is replayed. Raises SystemExit for what `replay_files` and its share cannot be."""
    if not 0 < data.replay_share < 1:
        raise SystemExit(f"replay_share is {data.replay_share}; it is a share of all tokens, above 0 and below 1.")
    sources = find_sources(read_phases(data.replay_files))
    both = set(sources) & {path for phase in read_phases(data.train_files) for path in phase}
    if both:
        raise SystemExit(f"'{min(both)}' is in train_files and in replay_files. Leave it in one of them.")
    check_columns([file for files in sources.values() for file in files], [COLUMNS])
    return sources


def add_replay(
    data: ConversationData, phases: list[Phase], sources: dict[str, list[Part]], replayed: dict[str, list[Part]]
) -> list[Phase]:
    """The phases with their share of the documents to replay."""
    tokens = {path: sum(part.num_tokens for part in parts) for path, parts in sources.items()}
    # What is held out is not trained on. Nearly: which rows these are, and which equal them, is not known yet.
    num_rows = sum(part.ledger.rows_kept for parts in sources.values() for part in parts)
    trained_share = max(0.0, 1 - data.eval_rows / max(1, num_rows))
    available = sum(part.num_tokens for parts in replayed.values() for part in parts)
    if not available:
        raise SystemExit(f"There is no text to replay in {', '.join(data.replay_files)}. Name other replay_files.")
    mixed = []
    for phase in phases:
        spoken = sum(tokens[path] * passes for path, passes in phase.items())
        passes = data.replay_share / (1 - data.replay_share) * spoken * trained_share / available
        mixed.append(phase | dict.fromkeys(replayed, passes))
    return mixed


def prepare_conversations(
    data: ConversationData, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int
) -> tuple[Blocks, Blocks | None, Ledger]:
    """Training blocks of at most `max_length` tokens, held-out blocks (None when eval_rows is 0), and the ledger."""
    phases = read_phases(data.train_files)
    replay_sources = find_replay(data) if data.replay_files else {}  # looked at before hours of tokenising
    preparation = conversation_preparation(data, tokenizer, max_length)
    prepared = prepare_parts(data.cache_dir, find_sources(phases), preparation)
    sum_ledgers(prepared).check_drops(data.max_drop_share)  # before documents to replay are among the rows
    held_out_of = list(prepared)
    if replay_sources:
        replayed = prepare_parts(data.cache_dir, replay_sources, document_preparation(tokenizer))
        phases = add_replay(data, phases, prepared, replayed)
        prepared |= replayed
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
