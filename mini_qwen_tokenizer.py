"""Stage 0, the tokenizer: byte pairs learnt from the pretraining documents.

    python mini_qwen_tokenizer.py --config recipes/demo/tokenizer.yaml

Reads:  rows {"text": ...} from the recipe's train_files.
Writes: output_dir, a tokenizer that AutoTokenizer loads, with ChatML control tokens and the chat template; and
        tokenizer.json's figures in run.json: bytes per token, beside those of Qwen2.5's tokenizer where that is there.
"""

import json
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from mini_qwen.documents import read_documents
from mini_qwen.ledger import Ledger
from mini_qwen.recipe import parse_recipe
from mini_qwen.rows import DataKeys, check_columns, choose_held_out, find_files, read_rows
from mini_qwen.tokenizer import bytes_per_token, load_tokenizer, train_tokenizer


@dataclass
class TokenizerData(DataKeys):
    """Recipe keys of the tokenizer stage."""

    output_dir: str = "results/tokenizer"
    vocab_size: int = 8192
    max_rows: int = 1_000_000  # documents to learn from
    compare_with: str = "models/Qwen2.5-0.5B-Instruct"
    eval_rows: int = 1000  # documents that it does not learn from, for bytes per token
    seed: int = 42


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_recipe(TokenizerData, argv=argv, default="recipes/tokenizer.yaml")

    files = find_files(args.train_files)
    check_columns(files, [["text"]])
    ledger = Ledger(files=len(files))
    held_out = choose_held_out(files, args.eval_rows, args.seed)
    documents = list(islice(read_documents(read_rows(files, ["text"]), ledger, held_out), args.max_rows))

    tokenizer = train_tokenizer((text for text, is_held_out in documents if not is_held_out), args.vocab_size)

    unseen = [text for text, is_held_out in documents if is_held_out]
    figures = {args.output_dir: bytes_per_token(tokenizer, unseen)}
    if (Path(args.compare_with) / "tokenizer.json").is_file():
        figures[args.compare_with] = bytes_per_token(load_tokenizer(args.compare_with), unseen)

    tokenizer.save_pretrained(args.output_dir)
    record = {"vocab_size": len(tokenizer), "bytes_per_token": figures, "recipe": asdict(args)}
    (Path(args.output_dir) / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {args.output_dir}: {len(tokenizer):,} tokens")
    for name, value in figures.items():
        print(f"  {value:.3f} bytes per token on {len(unseen):,} unseen documents: {name}")


if __name__ == "__main__":
    main()
