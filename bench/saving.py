"""What a verified checkpoint costs over a plain one: hashing, the manifest, and having it on the disk.

    python bench/saving.py                      # checkpoints of 2 GB, three rounds
    python bench/saving.py --gigabytes 0.5      # a look

Each round saves the same tensors as a checkpoint of the 1B model has them, in its proportions: plainly, as the Trainer
leaves them, then verified. From the rates follows the share of the training time for the 14 GB of the 1B model at the
full recipe's `save_steps`. Writes bench/results/saving.json.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml
from safetensors.torch import save_file

from bench.measurement import processor
from mini_qwen.checkpoint import hash_files, publish, sync, verify, write_manifest
from mini_qwen.circumstances import circumstances

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "saving.json"
FULL_GIGABYTES = 14.0  # of the 1B model: 4 bytes a parameter for the weights, 8 for AdamW, and what ZeRO-2 adds
# Seconds of a step of the 1B recipe: of the run that it repeats (logs of qiufengqijun/mini_qwen), and at 75,000
# tokens a second on each of 6 GPUs, 2.5 times as fast, where a save weighs more.
STEP_SECONDS = {"as in the run that it repeats": 6.565, "at 75,000 tokens a second and GPU": 1_179_648 / 6 / 75_000}


def write_plainly(folder: Path, num_bytes: int) -> float:
    """Seconds to write weights and optimizer state, a third and two thirds, with everything on the disk."""
    folder.mkdir()
    weights, moments = (torch.randn(int(num_bytes * share) // 4) for share in (1 / 3, 2 / 3))
    started = time.perf_counter()
    save_file({"weights": weights}, folder / "model.safetensors")
    torch.save({"state": moments}, folder / "optimizer.pt")
    for file in folder.iterdir():
        sync(file)
    return time.perf_counter() - started


def measure(folder: Path, num_bytes: int) -> dict[str, float]:
    plain = write_plainly(folder / "unfinished", num_bytes)
    started = time.perf_counter()
    write_manifest(folder / "unfinished", {})
    publish(folder / "unfinished", folder / "checkpoint-1")
    verified = time.perf_counter() - started
    started = time.perf_counter()
    hash_files(sorted((folder / "checkpoint-1").iterdir()))
    hashed = time.perf_counter() - started
    started = time.perf_counter()
    verify(folder / "checkpoint-1")
    return {
        "plain_s": plain,
        "manifest_s": verified,
        "hashing_gb_per_s": num_bytes / 1e9 / hashed,
        "verify_at_resume_s": time.perf_counter() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    started = time.time()
    rounds = []
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory(prefix="mini_qwen_bench_") as folder:
            facts = measure(Path(folder), int(args.gigabytes * 1e9))
        rounds.append({key: round(value, 3) for key, value in facts.items()})
        print(f"round {number}: {rounds[-1]}", flush=True)
    medians = {key: round(statistics.median(facts[key] for facts in rounds), 3) for key in rounds[0]}
    seconds_a_gigabyte = medians["manifest_s"] / args.gigabytes
    save_steps = yaml.safe_load((ROOT / "recipes" / "pt.yaml").read_text(encoding="utf-8"))["save_steps"]
    full: dict[str, Any] = {
        "gigabytes": FULL_GIGABYTES,
        "save_steps": save_steps,
        "extra_seconds_a_save": round(seconds_a_gigabyte * FULL_GIGABYTES, 1),
        "share_of_training_time": {
            name: round(seconds_a_gigabyte * FULL_GIGABYTES / (save_steps * seconds), 5)
            for name, seconds in STEP_SECONDS.items()
        },
    }
    record = circumstances(started) | {"processor": processor(), "gigabytes": args.gigabytes, "rounds": rounds}
    record |= {
        "medians": medians,
        "extra_over_plain": round(medians["manifest_s"] / medians["plain_s"], 3),
        "1B": full,
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: record[key] for key in ("medians", "extra_over_plain", "1B")}, indent=2))


if __name__ == "__main__":
    main()
