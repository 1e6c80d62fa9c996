"""Pretraining data: documents in, blocks of tokens out."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from mini_qwen.chat import encode_text
from mini_qwen.ledger import Ledger
from mini_qwen.packing import Blocks, count_cut, cut_blocks
from mini_qwen.rows import DataKeys, Row, check_columns, choose_held_out, count_rows, find_files, read_rows
from mini_qwen.store import StoreWriter, TokenStore, prepare_once


@dataclass
class DocumentData(DataKeys):
    """Recipe keys of pretraining data: rows `{"text": ...}`."""

    eval_rows: int = 0  # rows cut off first, by seed, for the loss on data never trained on
    block_size: int = 1024  # tokens
    isolate_documents: bool = True  # false: plain concatenation, documents of a block see each other


def read_documents(rows: Iterable[Row], ledger: Ledger, held_out: set[int]) -> Iterator[tuple[str, bool]]:
    """Yield (text, is held out) of every row that has text; blank ones are counted and left out.

    Raises SystemExit for a text that is not a string: then the column is not what the recipe takes it for.
    """
    for index, row in enumerate(rows):
        ledger.rows_read += 1
        text = row.values.get("text")
        if text is not None and not isinstance(text, str):
            raise SystemExit(f"{row.place}: 'text' is {text!r:.80}, a {type(text).__name__}. Documents must be text.")
        if text is None or not text.strip():
            ledger.rows_dropped["empty text"] += 1
            continue
        is_held_out = index in held_out
        ledger.rows_held_out += is_held_out
        ledger.rows_kept += not is_held_out
        yield text, is_held_out


def prepare_documents(
    data: DocumentData, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[Blocks, Blocks | None, Ledger]:
    """Training blocks, held-out blocks (None when eval_rows is 0), and the ledger of both.

    Each document is its text's tokens and `<|im_end|>`. Nothing is cut off but the stated tail of the whole corpus.
    """
    files = find_files(data.train_files)
    check_columns(files, [["text"]])
    held_out = choose_held_out(files, data.eval_rows, seed)

    def build(folder: Path) -> Ledger:
        ledger = Ledger(files=len(files))
        writers = {part: StoreWriter(folder / name, flags=False) for part, name in [(False, "train"), (True, "eval")]}
        documents = read_documents(read_rows(files, ["text"]), ledger, held_out)
        progress = tqdm(total=sum(map(count_rows, files)), desc="tokenising", unit="rows")
        while batch := list(islice(documents, 1000)):
            for (_, part), ids in zip(batch, encode_text(tokenizer, [text for text, _ in batch]), strict=True):
                writers[part].add([*ids, tokenizer.eos_token_id])
            progress.update(len(batch))
        progress.close()
        for writer in writers.values():
            writer.close()
        ledger.tokens_read = ledger.tokens_trained = writers[False].starts[-1]
        return ledger

    settings = {"eval_rows": data.eval_rows, "seed": seed}
    folder, ledger = prepare_once(data.cache_dir, "pt", files, tokenizer, settings, build)
    train, held_out_store = TokenStore(folder / "train"), TokenStore(folder / "eval")
    count_cut(train, data.block_size, data.isolate_documents, ledger)
    ledger.check(data.max_drop_share)
    blocks = cut_blocks(train, data.block_size, data.isolate_documents, keep_tail=False)
    if not data.eval_rows:
        return blocks, None, ledger
    return blocks, cut_blocks(held_out_store, data.block_size, data.isolate_documents, keep_tail=True), ledger
