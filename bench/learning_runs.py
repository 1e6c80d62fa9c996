"""Runs of the pretraining program for bench/learning.py: each in a process of its own, kept and not repeated."""

import json
import multiprocessing
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mini_qwen_pt
from bench.measurement import to_words
from mini_qwen.documents import prepare_documents
from mini_qwen.model import SIZES as SIZE_KEYS

ROOT = Path(__file__).resolve().parents[1]
DATA_SEED = 42  # of what is held out and how documents are packed, in all runs
SIZES = {
    "hidden 64": (64, 3, 2, 1, 192, 4096),
    "hidden 96": (96, 4, 3, 1, 288, 4096),
    "A": (128, 4, 4, 2, 384, 4096),
    "B": (192, 6, 6, 2, 576, 4096),
}
Facts = dict[str, Any]


def adamw(rate: float) -> Facts:
    """The way of recipes/pt.yaml: AdamW, cosine, a tenth of the run for warming up."""
    return {"muon_learning_rate": "null", "learning_rate": rate, "weight_decay": 0.0, "warmup_steps": 0.1}


def muon(rate: float, adamw_rate: float, **keys: Any) -> Facts:
    return {"muon_learning_rate": rate, "learning_rate": adamw_rate, "weight_decay": 0.01, "warmup_steps": 0.05} | keys


def decay(steps: int) -> Facts:
    """Warm up, stay, and come down over the last 40% of the steps."""
    return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": round(0.4 * steps)}}


class Run(NamedTuple):
    size: str
    steps: int
    seed: int
    keys: Facts  # of the recipe, beside those that all runs have

    @property
    def name(self) -> str:
        keys = "_".join(f"{key}={json.dumps(value)}" for key, value in sorted(self.keys.items()))
        return f"{self.size}_{self.steps}_{self.seed}_{keys}".translate(str.maketrans(' ":{}', "-----"))


@dataclass
class Study:
    folder: Path  # of finished runs, a file each
    corpus: str
    ends_at: float  # no run is begun behind this moment
    runs: dict[str, Facts] = field(default_factory=dict)  # all that were asked for so far

    def run(self, run: Run) -> Facts:
        """What is known of a run; it is trained first if that has not been done, with some evaluations on the way.

        Raises SystemExit when it fails, or when there is no time left for it.
        """
        if run.name not in self.runs:
            self.runs[run.name] = self.find_or_train(run, eval_every=max(20, run.steps // 10))
        return self.runs[run.name]

    def best(self, runs: list[Run]) -> Facts:
        """The recipe keys of the run that ends lowest."""
        return min(runs, key=lambda run: self.run(run)["final_loss"]).keys

    def find_or_train(self, run: Run, eval_every: int) -> Facts:
        place = self.folder / f"{run.name}.json"
        if place.exists():
            return json.loads(place.read_text(encoding="utf-8"))
        if time.time() > self.ends_at:
            raise SystemExit(f"{run.name} is not begun: --minutes have passed. The same command goes on from here.")
        work = self.folder / f"{run.name}.unfinished"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        child = multiprocessing.get_context("fork").Process(target=train, args=(run, work, self.corpus, eval_every))
        child.start()
        child.join()
        if child.exitcode:
            raise SystemExit(f"{run.name} ended with {child.exitcode}; its words are in {work / 'log'}.")
        facts = read_facts(run, work / "run")
        place.write_text(json.dumps(facts) + "\n", encoding="utf-8")
        shutil.rmtree(work)
        print(f"{run.name}: {facts['final_loss']}, {facts['seconds_per_step']} s a step", flush=True)
        return facts


def train(run: Run, folder: Path, corpus: str, eval_every: int) -> None:
    """The program, in a process of its own, with `folder`/log for what it says."""
    with (folder / "log").open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    keys: Facts = {"output_dir": folder / "run", "cache_dir": folder.parent / "cache", "seed": run.seed}
    keys |= {"max_steps": run.steps, "eval_strategy": "steps", "eval_steps": eval_every, "save_strategy": "no"}
    # The recipe's seed would also decide what is held out; here that is the same for all seeds.
    mini_qwen_pt.prepare_documents = lambda data, tokenizer, _: prepare_documents(data, tokenizer, DATA_SEED)
    keys |= {"config": ROOT / "recipes/small/pt.yaml", "train_files": corpus, "eval_rows": 200, "logging_steps": 10}
    mini_qwen_pt.main(to_words(keys | dict(zip(SIZE_KEYS, SIZES[run.size], strict=True)) | run.keys))


def read_facts(run: Run, output_dir: Path) -> Facts:
    record = json.loads((output_dir / "run.json").read_text(encoding="utf-8"))
    history = json.loads((output_dir / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    evaluations = [entry for entry in history if "eval_loss" in entry]
    within = evaluations[:-1] if len(evaluations) > 1 else []  # the last one follows the training
    training = record["metrics"]["train_runtime"] - sum(entry["eval_runtime"] for entry in within)
    return run._asdict() | {
        "parameters": record["parameters"],
        "held_out_loss": {str(entry["step"]): round(entry["eval_loss"], 4) for entry in evaluations},
        "final_loss": round(record["metrics"]["eval_loss"], 4),
        "seconds_per_step": round(training / run.steps, 4),
    }
