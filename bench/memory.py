"""Measure how much memory preparing documents takes as the corpus grows, and whether it stays the same.

    python bench/memory.py                           # 200, 600 and 2,000 MB of text: about ten minutes
    python bench/memory.py --megabytes 50 100

Real text is repeated to each size, in files of about 50 MB. Writes bench/results/memory.json.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"

from tabulate import tabulate

from bench.measurement import Facts, Work, measure, processor
from bench.sources import BLOCK_SIZE, tokenizer_path, write_texts
from mini_qwen.circumstances import circumstances
from mini_qwen.disk import folder_bytes
from mini_qwen.documents import DocumentData, prepare_documents
from mini_qwen.encoding import text_encoder
from mini_qwen.tokenizer import load_tokenizer

RESULT = Path(__file__).parent / "results/memory.json"


def prepare(folder: Path, texts: str) -> Work:
    """Prepare the documents below `texts` into `folder`."""
    tokenizer = load_tokenizer(tokenizer_path())
    text_encoder(tokenizer)

    def work() -> Facts:
        data = DocumentData(train_files=[texts], block_size=BLOCK_SIZE, eval_rows=100, cache_dir=str(folder))
        blocks, _, ledger = prepare_documents(data, tokenizer, seed=42)
        return {"rows": ledger.rows_read, "tokens": ledger.tokens_read, "blocks": len(blocks)}

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[200, 600, 2000])
    args = parser.parse_args()
    started = time.time()
    rows = []
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory(prefix="mini_qwen_bench_") as place:
            texts, cache = Path(place) / "texts", Path(place) / "cache"
            write_texts(texts, megabytes)
            before = time.perf_counter()
            memory = measure(prepare, sample_memory=True, folder=cache, texts=str(texts))
            seconds = round(time.perf_counter() - before, 1)
            rows.append({"text_mb": megabytes, **memory, "seconds": seconds, "cache_mb": folder_bytes(cache) // 10**6})
            print(rows[-1])
    print(tabulate(rows, headers="keys", tablefmt="github"))
    record = circumstances(started) | {"processor": processor(), "sizes": rows}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
