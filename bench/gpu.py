"""All that is to be known of one GPU, in one program: steps, loss head, memory, parity with the CPU, resuming, runs.

    python bench/gpu.py                      # fifteen minutes at most
    python bench/gpu.py --tiny true          # a look: two layers of the 1B model, a few steps of each run
    python bench/gpu.py --parts step head

Parts are processes of their own; those that are not timed run side by side, behind the others. Each writes
bench/results/gpu_PART.json, or into --output_dir. What fails or takes too long says so there and stops nothing else.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"

import torch
from tabulate import tabulate
from transformers.utils import logging

from bench import gpu_head, gpu_runs, gpu_steps
from bench.measurement import Facts
from mini_qwen.circumstances import circumstances

RESULTS = Path(__file__).parent / "results"


class Part(NamedTuple):
    measure: Callable[[Path, bool, float], Facts]  # in a folder; tiny or not; seconds that it may take
    seconds: float  # after which it is ended
    together: bool = False  # beside the other parts of which this is said


PARTS = {
    "head": Part(gpu_head.head, 60),
    "step": Part(gpu_steps.step, 270),
    "pretrain": Part(gpu_runs.pretrain, 240),
    "low_memory": Part(gpu_runs.low_memory, 300, together=True),
    "parity": Part(gpu_runs.parity, 300, together=True),
    "resume": Part(gpu_runs.resume, 300, together=True),
    "demo": Part(gpu_runs.demo, 300, together=True),
}
SHOWN = ("tokens_per_s", "mfu", "micro_batch_ms", "first_step_s", "peak_allocated_gb", "peak_reserved_gb", "failed")


def start(name: str, args: argparse.Namespace) -> subprocess.Popen:
    words = [sys.executable, __file__, "--only", name, "--tiny", str(args.tiny)]
    words += [] if args.output_dir == RESULTS else ["--output_dir", str(args.output_dir)]
    return subprocess.Popen(words, start_new_session=True)


def run(names: list[str], args: argparse.Namespace) -> None:
    """Parts side by side. One that reaches its limit is ended, with all that it has started."""
    begun = time.monotonic()
    for name, process in {name: start(name, args) for name in names}.items():
        try:
            process.wait(max(1, begun + PARTS[name].seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            limit = PARTS[name].seconds
            write(name, args, {"failed": f"ended at its limit of {limit} s"}, time.time() - limit)


def work(name: str, args: argparse.Namespace) -> None:
    """One part, in this process."""
    logging.set_verbosity_error()
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="mini_qwen_bench_") as folder:
        facts = gpu_steps.attempt(PARTS[name].measure, Path(folder), args.tiny, PARTS[name].seconds - 30)
        if (Path(folder) / "keep").is_dir():
            shutil.copytree(Path(folder) / "keep", args.output_dir / f"gpu_{name}", dirs_exist_ok=True)
    write(name, args, facts, started)


def write(name: str, args: argparse.Namespace, facts: Facts, started: float) -> None:
    machine = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "tiny": args.tiny}
    record = json.dumps(circumstances(started) | machine | facts, indent=1)
    (args.output_dir / f"gpu_{name}.json").write_text(record + "\n", encoding="utf-8")


def show(found: dict[str, Facts]) -> None:
    rows = []
    for name, measured in found.get("step", {}).get("measured", {}).items():
        for facts in measured:
            rows.append({"step": name} | {key: facts[key] for key in SHOWN if key in facts})
    print(tabulate(rows, headers="keys", tablefmt="github"))
    heads = [{"head": name} | facts for name, facts in found.get("head", {}).get("heads", {}).items()]
    print(tabulate(heads, headers="keys", tablefmt="github"))
    for name, facts in found.items():
        if name not in ("step", "head"):
            print(name, json.dumps(facts)[:1500])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", choices=PARTS, help="in this process; for the program itself")
    parser.add_argument("--tiny", type=lambda text: text.lower() == "true", default=False)
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; bench/step.py, head.py and plan.py are for CPUs.")
    if args.only:
        work(args.only, args)
        return
    apart = [] if args.tiny else [name for name in args.parts if not PARTS[name].together]
    for name in apart:
        run([name], args)
    run([name for name in args.parts if name not in apart], args)
    files = {name: args.output_dir / f"gpu_{name}.json" for name in args.parts}
    show({name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()})


if __name__ == "__main__":
    main()
