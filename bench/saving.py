"""What a verified checkpoint costs over a plain one: hashing, the manifest, and waiting until it is on the disk.

    python bench/saving.py                      # checkpoints of 2 GB, three rounds
    python bench/saving.py --gigabytes 0.5      # a look

Each round saves tensors in the proportions of the 1B model's checkpoint, plainly, as the Trainer leaves them; then it
makes a verified checkpoint of them, with all of it on the disk, which the plain one has not waited for. From the rates
follows the share of the training time for the 14 GB of the 1B model at the full recipe's `save_steps`, by hashing
alone and with the wait for this machine's disk. Writes bench/results/saving.json.
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
from mini_qwen.checkpoint import publish, verify, write_manifest
from mini_qwen.circumstances import circumstances
from mini_qwen.integrity import hash_files

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "saving.json"
FULL_GIGABYTES = 14.0  # of the 1B model: 4 bytes a parameter for the weights, 8 for AdamW, and what ZeRO-2 adds
# Seconds of a step of the 1B recipe: of the run that it repeats (logs of qiufengqijun/mini_qwen), and at 75,000
# tokens a second on each of 6 GPUs, 2.5 times as fast, where a save weighs more.
STEP_SECONDS = {"as in the run that it repeats": 6.565, "at 75,000 tokens a second and GPU": 1_179_648 / 6 / 75_000}


def write_plainly(folder: Path, num_bytes: int) -> float:
    """Seconds to write weights and optimizer state, a third and two thirds, into the system's memory of files."""
    folder.mkdir()
    weights, moments = (torch.randn(int(num_bytes * share) // 4) for share in (1 / 3, 2 / 3))
    started = time.perf_counter()
    save_file({"weights": weights}, folder / "model.safetensors")
    torch.save({"state": moments}, folder / "optimizer.pt")
    return time.perf_counter() - started


def measure(folder: Path, num_bytes: int) -> dict[str, float]:
    plain = write_plainly(folder / "unfinished", num_bytes)
    started = time.perf_counter()
    write_manifest(folder / "unfinished", {}, 0.0)
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
    extra = {
        "hashing alone": FULL_GIGABYTES / medians["hashing_gb_per_s"],
        "hashing, and waiting for the disk": FULL_GIGABYTES * medians["manifest_s"] / args.gigabytes,
    }
    save_steps = yaml.safe_load((ROOT / "recipes" / "pt.yaml").read_text(encoding="utf-8"))["save_steps"]
    full: dict[str, Any] = {
        "gigabytes": FULL_GIGABYTES,
        "save_steps": save_steps,
        "extra_seconds_a_save": {name: round(seconds, 1) for name, seconds in extra.items()},
        "share_of_training_time": {
            f"{name}, {speed}": round(seconds / (save_steps * step), 5)
            for name, seconds in extra.items()
            for speed, step in STEP_SECONDS.items()
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
