"""Compare our data preparation with what it replaces: speed, memory, tokens, and the share of padding.

    python bench/data.py                                            # 100 MB of text, 50,000 conversations
    python bench/data.py --megabytes 5 --rows 2000 --rounds 1       # a look, in two minutes
    python bench/data.py --only padding

The variants run in turn, each in a fresh process, so that a busy machine slows both; medians and their ratios count.
One more round before those is for the memory. Writes bench/results/data.json, or data_PART.json with --only.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Read when the libraries are imported, hence before them, here and in the child processes.
os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

from tabulate import tabulate
from transformers.utils import logging

from bench.conversations import compare_conversations
from bench.documents import compare_documents
from bench.measurement import Facts, processor
from bench.padding import measure_padding
from mini_qwen.circumstances import circumstances

RESULTS = Path(__file__).parent / "results"


def in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {in_words(entry)}" for key, entry in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def show(record: dict[str, Facts]) -> None:
    variants = [
        {"": f"{part}: {name}", **{key.replace("_", " "): f"{value:,}" for key, value in facts.items()}}
        for part in record
        for name, facts in record[part].get("medians", {}).items()
    ]
    if variants:
        print(tabulate(variants, headers="keys", tablefmt="github", disable_numparse=True))
    for part, facts in record.items():
        lines = [line for line in facts.items() if line[0] not in ("medians", "rounds", "batch_ms_rounds")]
        print(f"\n{part}")
        print(tabulate([(key.replace("_", " "), in_words(value)) for key, value in lines], tablefmt="plain"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100, help="text for PT, UTF-8")
    parser.add_argument("--rows", type=int, default=50_000, help="conversations for SFT")
    parser.add_argument("--rounds", type=int, default=3, help="times that each variant runs")
    parser.add_argument("--only", choices=["pt", "sft", "padding"])
    args = parser.parse_args()
    logging.set_verbosity_error()
    started, load = time.time(), os.getloadavg()[0]
    parts = {
        "pt": lambda folder: compare_documents(folder, args.megabytes, args.rounds),
        "sft": lambda folder: compare_conversations(folder, args.rows, args.rounds),
        "padding": measure_padding,
    }
    record: dict[str, Facts] = {}
    for part in [args.only] if args.only else parts:
        with tempfile.TemporaryDirectory(prefix="mini_qwen_bench_") as folder:
            record[part] = parts[part](Path(folder))
    show(record)
    target = RESULTS / (f"data_{args.only}.json" if args.only else "data.json")
    target.parent.mkdir(exist_ok=True)
    machine = {
        "processor": processor(),
        "load_before": load,
        "memory_is": "Pss_Anon + Pss_Shmem of the process and its children, every 20 ms, above that before the work",
    }
    target.write_text(json.dumps({**circumstances(started), **machine, **record}, indent=2) + "\n", encoding="utf-8")
    print(f"\nwrote {target}")


if __name__ == "__main__":
    main()
