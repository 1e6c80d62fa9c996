"""Stage programs on mini_data with a model of a few thousand weights: their arguments, their runs, their results."""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
VOCAB = 512
STAGES = ("pt", "sft", "dpo")


def arguments(stage: str, road: Path, **overrides: object) -> list[str]:
    """The demo recipe of a stage, shrunk, with its folders under `road`."""
    values: dict[str, object] = {
        "config": ROOT / f"recipes/demo/{stage}.yaml",
        "output_dir": road / stage,
        "cache_dir": road / "cache",
        "max_steps": 6,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "eval_rows": 20,
    }
    if stage == "pt":
        values |= {"tokenizer": road / "tokenizer", "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
        values |= {"train_files": ROOT / "mini_data/pt/tourism_geography", "intermediate_size": 64}
    elif stage == "sft":
        values |= {"checkpoint": road / "pt", "train_files": ROOT / "mini_data/sft/Gen"}
    else:
        del values["eval_rows"]
        values |= {"checkpoint": road / "sft", "train_files": ROOT / "mini_data/dpo/train-00000-of-00001.parquet"}
        values |= {"test_files": ROOT / "mini_data/dpo/test-00000-of-00001.parquet", "max_length": 320}
    values |= overrides
    return [
        word
        for key, value in values.items()
        for word in (f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)]))
    ]


class Done(NamedTuple):
    """A program that has ended. `code` is negative where a signal ended it; `output` is all that it said."""

    code: int
    output: str


class Programs:
    """Runs stage programs as forks of processes that have imported everything, two at a time."""

    def __init__(self, folder: Path, num_processes: int = 2) -> None:
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.free: SimpleQueue[subprocess.Popen[str]] = SimpleQueue()
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "zygote.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
            for _ in range(num_processes)
        ]
        for process in self.processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            self.free.put(process)

    def run(self, stage: str, argv: list[str], kill_after: float | None = None, **faults: dict[str, Any]) -> Done:
        """Run a stage with faults planted into it; `kill_after` seconds it is ended by kill -9."""
        log = self.folder / f"{uuid.uuid4().hex}.log"
        job = {"stage": stage, "argv": argv, "faults": faults, "log": str(log), "kill_after": kill_after}
        process = self.free.get()
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            code = int(process.stdout.readline())
        finally:
            self.free.put(process)
        return Done(code, log.read_text(encoding="utf-8", errors="replace"))

    def map(self, function: Any, items: Iterable[Any]) -> list[Any]:
        """The results of `function` for each item, as many at a time as there are processes."""
        with ThreadPoolExecutor(len(self.processes)) as pool:
            return list(pool.map(function, items))

    def close(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


def losses(folder: Path) -> list[float]:
    """Those that a run logged, one by one."""
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def gradient_norms(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry["grad_norm"] for entry in history if "grad_norm" in entry]


def same_weights(one: Path, other: Path) -> bool:
    """Whether two folders hold the same weights, bit for bit."""
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
