"""Two processes on this CPU: DDP, ZeRO-1, ZeRO-2 and ZeRO-2 with small buckets, by the real PT program.

    python bench/distribution.py                 # ten minutes on two cores
    python bench/distribution.py --rounds 1

A step has 8 micro-batches. DDP and ZeRO-1 send gradients once a step, ZeRO-2 with every micro-batch. Each variant
runs 4 steps and 16; what the 12 more take is measured, so that starting up does not count. On a CPU what is sent goes
through memory, by gloo: it says which way needs how many transfers, not what NVLink makes of them. Writes
bench/results/distribution.json.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"

import yaml
from tabulate import tabulate

from bench.measurement import Facts, processor, to_words
from bench.sources import MINI, ROOT
from bench.step import read_demo_texts
from mini_qwen.circumstances import circumstances
from mini_qwen.tokenizer import train_tokenizer

RESULT = Path(__file__).parent / "results/distribution.json"
FEW, MANY = 4, 16  # steps
KEYS: dict[str, Any] = {
    "config": "recipes/demo/pt.yaml",
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "intermediate_size": 768,
    "train_files": MINI / "pt",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1e-3,
    "muon_learning_rate": "null",
    "logging_steps": 4,
    "eval_strategy": "no",
}


def write_machine(folder: Path, stage: int, **zero: Any) -> list[str]:
    """An accelerate config for ZeRO of this stage, with DeepSpeed's own keys in `zero`; how to launch by it."""
    deepspeed = {
        "zero_optimization": {"stage": stage} | zero,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    name = "-".join(["zero", str(stage), *zero])
    (folder / f"{name}.json").write_text(json.dumps(deepspeed), encoding="utf-8")
    machine = yaml.safe_load((ROOT / "accelerate_config.yaml").read_text(encoding="utf-8"))
    machine["deepspeed_config"] = {"deepspeed_config_file": str(folder / f"{name}.json")}
    machine["use_cpu"] = True
    del machine["mixed_precision"]  # accelerate refuses it beside a file
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(machine), encoding="utf-8")
    return ["-m", "mini_qwen.launch", "--num_processes", "2", "--config_file", str(folder / f"{name}.yaml")]


def seconds_of(launch: list[str], folder: Path, steps: int) -> Facts:
    """The Trainer's own seconds of so many steps, and the last loss."""
    output_dir = folder / "out"
    shutil.rmtree(output_dir, ignore_errors=True)
    keys = KEYS | {"tokenizer": folder / "tokenizer", "cache_dir": folder / "cache", "output_dir": output_dir}
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launch, "mini_qwen_pt.py", *to_words(keys | {"max_steps": steps})]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(f"{' '.join(launch)} failed: {(done.stdout + done.stderr)[-3000:]}")
    history = json.loads((output_dir / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [line["loss"] for line in history if "loss" in line]
    return {"seconds": next(line["train_runtime"] for line in history if "train_runtime" in line), "loss": losses[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    started, load = time.time(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="mini_qwen_bench_") as place:
        folder = Path(place)
        train_tokenizer(read_demo_texts(), 1024).save_pretrained(folder / "tokenizer")
        variants = {
            "ZeRO-2": write_machine(folder, 2),
            "ZeRO-2, buckets of 1e5": write_machine(folder, 2, reduce_bucket_size=100_000),
            "ZeRO-1": write_machine(folder, 1),
            "DDP": ["-m", "torch.distributed.run", "--nproc_per_node", "2"],
        }
        measured: dict[str, list[Facts]] = {name: [] for name in variants}
        for launch in variants.values():  # prepares the data, compiles what DeepSpeed compiles
            seconds_of(launch, folder, 1)
        for _ in range(args.rounds):
            for name, launch in variants.items():
                few, many = (seconds_of(launch, folder, steps) for steps in (FEW, MANY))
                a_step = (many["seconds"] - few["seconds"]) / (MANY - FEW)
                measured[name].append({"step_s": round(a_step, 4), "loss": many["loss"]})
                print(name, measured[name][-1], flush=True)
    middle = {name: statistics.median(facts["step_s"] for facts in rounds) for name, rounds in measured.items()}
    base = middle["ZeRO-2"]
    rows = [[name, round(base / seconds, 2), measured[name][0]["loss"]] for name, seconds in middle.items()]
    print(tabulate(rows, ("distribution", "times as fast as ZeRO-2", "loss behind 16 steps"), "github"))
    record = circumstances(started) | {"processor": processor(), "load_before": load}
    record |= {"times_as_fast_as_zero_2": {name: ratio for name, ratio, _ in rows}, "rounds": measured}
    RESULT.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
