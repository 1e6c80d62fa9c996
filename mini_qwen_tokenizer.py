"""Stage 0, the tokenizer: byte pairs learnt from the pretraining documents.

    python mini_qwen_tokenizer.py --config recipes/demo/tokenizer.yaml

Reads:  rows {"text": ...} from the recipe's train_files.
Writes: output_dir, a tokenizer that AutoTokenizer loads, with ChatML control tokens and the chat template; and
        run.json with its bytes per token, beside those of Qwen2.5's tokenizer where that is there.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from mini_qwen.circumstances import circumstances
from mini_qwen.documents import draw, read_documents
from mini_qwen.files import find_files
from mini_qwen.ledger import Ledger
from mini_qwen.recipe import parse_recipe
from mini_qwen.rows import check_columns, read_rows
from mini_qwen.tokenizer import bytes_per_token, load_tokenizer, train_tokenizer
from mini_qwen.watch import call_when_orphaned, end_as_orphan


@dataclass
class TokenizerData:
    """Recipe keys of the tokenizer stage."""

    train_files: list[str]  # files or folders of documents
    output_dir: str = "results/tokenizer"
    vocab_size: int = 8192
    max_rows: int = 300_000  # documents to learn from, drawn from all of them by seed
    eval_rows: int = 1000  # others, not learnt from, for bytes per token
    compare_with: str = "models/Qwen2.5-0.5B-Instruct"
    seed: int = 42


def main(argv: list[str] | None = None) -> None:
    call_when_orphaned(end_as_orphan)
    started = time.time()
    (args,) = parse_recipe(TokenizerData, argv=argv, default="recipes/tokenizer.yaml")

    for name, least in (("max_rows", 1), ("eval_rows", 0)):
        if (number := getattr(args, name)) < least:
            raise SystemExit(f"{name} is {number:,}; it is a number of documents, {least} or more.")
    files = find_files(args.train_files)
    check_columns(files, [["text"]])
    ledger = Ledger(files=len(files))
    texts = read_documents(read_rows(files, ["text"]), ledger)
    drawn = draw(texts, args.max_rows + args.eval_rows, args.seed)
    unseen, learnt = drawn[: args.eval_rows], drawn[args.eval_rows :]
    if ledger.rows_dropped:
        print(f"of {ledger.rows_read:,} rows, left out: {dict(ledger.rows_dropped)}")

    if not learnt:
        raise SystemExit(
            f"eval_rows is {args.eval_rows:,}, but {len(drawn):,} documents are all there are: none is left to learn "
            "from. Choose fewer, or name more data in train_files."
        )
    tokenizer = train_tokenizer(learnt, args.vocab_size)

    figures = {}
    if unseen:
        figures[args.output_dir] = bytes_per_token(tokenizer, unseen)
    if unseen and (Path(args.compare_with) / "tokenizer.json").is_file():
        figures[args.compare_with] = bytes_per_token(load_tokenizer(args.compare_with), unseen)

    tokenizer.save_pretrained(args.output_dir)
    record = circumstances(started)
    record |= {"vocab_size": len(tokenizer), "bytes_per_token": figures, "recipe": asdict(args)}
    (Path(args.output_dir) / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {args.output_dir}: {len(tokenizer):,} tokens, learnt from {len(learnt):,} documents")
    for name, value in figures.items():
        print(f"  {value:.3f} bytes per token on {len(unseen):,} unseen documents: {name}")


if __name__ == "__main__":
    main()
