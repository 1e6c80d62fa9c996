"""The decoding grid of a study, asked in batches and prompt by prompt: the same answers, in a share of the time.

    bash run.sh demo && python bench/generation.py                  # some minutes on two cores
    python bench/generation.py --checkpoints results/sft --rounds 1

Both variants load each checkpoint once and keep keys and values in a cache; they differ in the batch alone. The grid
is that of recipes/demo/eval.yaml, with two samples instead of four. Writes bench/results/generation.json.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"

from tabulate import tabulate
from transformers.utils import logging

from bench.measurement import Facts, Work, alternate, medians, processor, ratios
from mini_qwen.cache import hash_of
from mini_qwen.circumstances import circumstances
from mini_qwen.decoding import run_grid
from mini_qwen.evaluation import EvalData, load_checkpoint
from mini_qwen.recipe import parse_recipe

RESULTS = Path(__file__).parent / "results" / "generation.json"
RECIPE = "recipes/demo/eval.yaml"


def study(batch_size: int, folder: Path, checkpoints: list[str]) -> Work:
    """The grid for every checkpoint; the fact `answers` is a hash of all figures."""
    logging.set_verbosity_error()
    (args,) = parse_recipe(EvalData, argv=[], default=RECIPE)
    args.decoding.samples = 2

    def work() -> Facts:
        cells = []
        for checkpoint in checkpoints:
            cells += run_grid(*load_checkpoint(checkpoint), args.prompts, args.decoding, batch_size)
        (folder / "cells.json").write_text(json.dumps(cells), encoding="utf-8")
        return {"num_answers": sum(cell["num_answers"] for cell in cells), "answers": int(hash_of(cells), 16) % 10**9}

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folders = [f"demo_results/{stage}" for stage in ("pt", "sft", "dpo")]
    parser.add_argument("--checkpoints", nargs="+", default=folders, help="folders; those of the demo")
    parser.add_argument("--rounds", type=int, default=2, help="timed rounds")
    args = parser.parse_args()
    started = time.time()
    variants = {"one by one": partial(study, 1), "batches of 64": partial(study, 64)}
    with tempfile.TemporaryDirectory() as folder:
        measured = alternate(variants, args.rounds, Path(folder), checkpoints=args.checkpoints)
    found = medians(measured)
    alone, batched = found.values()
    record = circumstances(started) | {"processor": processor(), "checkpoints": args.checkpoints}
    record |= {"rounds": args.rounds, "variants": found, "ratios": ratios(alone, batched)}
    record["same_answers"] = alone["answers"] == batched["answers"]
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    rows = [[name, facts["num_answers"], facts["wall_s"], facts["cpu_s"]] for name, facts in found.items()]
    print(tabulate(rows, headers=["", "answers", "wall s", "CPU s"]))
    print(f"{record['ratios']['wall_times_faster']} times faster; same figures: {record['same_answers']}")


if __name__ == "__main__":
    main()
