"""Whole runs of the real programs on one GPU: parts of bench/gpu.py."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from bench.gpu_steps import attempt
from bench.measurement import Facts, to_words
from bench.sources import ROOT, SHARED, sample_files, tokenizer_path

CORPUS = SHARED / "corpus"
SMALL = {
    "config": "recipes/pt.yaml",
    "tokenizer": tokenizer_path(),
    "train_files": CORPUS / "tinyshakespeare.parquet",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
    "block_size": 256,
    "eval_rows": 20,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "eval_strategy": "no",
    "logging_steps": 1,
    "dataloader_num_workers": 0,
}
DEMO = ("tokenizer", "pt", "sft", "dpo", "eval")
OPENINGS = ["Once upon a time, there was a little", "The history of the", "床前", "中国的首都"]
# Runs a stage within a process, and prints what its GPU memory was at most.
MEASURED = (
    "import sys, json, torch, importlib; importlib.import_module(sys.argv[1]).main(sys.argv[2:]); "
    "print(json.dumps({'allocated': torch.cuda.max_memory_allocated(), 'reserved': torch.cuda.max_memory_reserved()}))"
)


def run(program: list[str], cpu: bool = False, seconds: float | None = None) -> str:
    """What it printed. Raises RuntimeError with the end of it when it failed, TimeoutExpired behind `seconds`."""
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
    )
    if done.returncode:
        raise RuntimeError(f"{program[:4]} ended with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
    return done.stdout


def losses(output_dir: Path) -> list[float]:
    history = json.loads((output_dir / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [line["loss"] for line in history if "loss" in line]


def low_memory(folder: Path, tiny: bool, seconds: float) -> Facts:
    """The low-memory recipes of PT, SFT and DPO one after the other, at 1 x 1,024 with two micro-batches a step."""
    end = time.monotonic() + seconds
    found: Facts = {}
    data: dict[str, dict[str, Any]] = {
        "pt": {"train_files": CORPUS / "tinyshakespeare.parquet", "eval_rows": 20, "tokenizer": tokenizer_path()},
        "sft": {"train_files": sample_files("sft/Gen"), "eval_rows": 20, "checkpoint": folder / "pt"},
        "dpo": {"train_files": sample_files("dpo", "train*"), "test_files": sample_files("dpo", "test*")}
        | {"max_drop_share": 1.0, "checkpoint": folder / "sft"},
    }
    data["pt"] |= {"num_hidden_layers": 2} if tiny else {}
    for stage, keys in data.items():
        keys |= {"config": f"recipes/low_memory/{stage}.yaml", "output_dir": folder / stage, "max_steps": 6}
        keys |= {"gradient_accumulation_steps": 2, "save_strategy": "no", "eval_strategy": "no", "logging_steps": 1}
        keys |= {"cache_dir": folder / "cache"}
        found[stage] = attempt(peaks_of, stage, keys, end - time.monotonic())
    return found


def peaks_of(stage: str, keys: dict[str, Any], seconds: float) -> Facts:
    started = time.monotonic()
    said = run(["-c", MEASURED, f"mini_qwen_{stage}", *to_words(keys)], seconds=seconds)
    peaks = {f"{key}_gb": round(value / 1e9, 2) for key, value in json.loads(said.splitlines()[-1]).items()}
    return peaks | {"losses": losses(Path(keys["output_dir"])), "seconds": round(time.monotonic() - started, 1)}


def parity(folder: Path, tiny: bool, seconds: float) -> Facts:
    """50 steps of a small model with Qwen's vocabulary: the GPU in bf16 against the CPU in fp32, same rows."""
    del seconds
    keys = SMALL | {"max_steps": 5 if tiny else 50, "cache_dir": folder / "cache", "save_strategy": "no"}
    run(["mini_qwen_pt.py", *to_words(keys | {"output_dir": folder / "cpu", "needs_gpu": "false"})], cpu=True)
    of_cpu, found = losses(folder / "cpu"), {}
    for name, levers in {
        "varlen, compiled": {"attn_implementation": "varlen", "compile_layers": "true"},
        "sdpa": {"attn_implementation": "sdpa"},
    }.items():
        run(["mini_qwen_pt.py", *to_words(keys | levers | {"output_dir": folder / name})])
        of_gpu = losses(folder / name)
        furthest = max(abs(gpu - cpu) / cpu for gpu, cpu in zip(of_gpu, of_cpu, strict=True))
        found[name] = {"steps": len(of_gpu), "largest_relative_difference": round(furthest, 6), "last": of_gpu[-1]}
    return {"cpu_last": of_cpu[-1], "attention": found}


def resume(folder: Path, tiny: bool, seconds: float) -> Facts:
    """12 steps in one go, the same again, and from the checkpoint of the sixth: the largest difference of a weight."""
    del tiny, seconds
    found: Facts = {}
    for attention in ("varlen", "sdpa"):
        keys = SMALL | {"max_steps": 12, "save_steps": 6, "cache_dir": folder / "cache"}
        keys |= {"attn_implementation": attention}
        whole, again, resumed = (folder / f"{attention}-{name}" for name in ("whole", "again", "resumed"))
        for place in (whole, again):
            run(["mini_qwen_pt.py", *to_words(keys | {"output_dir": place})])
        shutil.copytree(whole / "checkpoint-6", resumed / "checkpoint-6")
        keys |= {"output_dir": resumed, "resume_from_checkpoint": resumed / "checkpoint-6"}
        run(["mini_qwen_pt.py", *to_words(keys)])
        found[attention] = {name: difference(whole, other) for name, other in (("again", again), ("resumed", resumed))}
    return found


def difference(one: Path, other: Path) -> float:
    left, right = (load_file(folder / "model.safetensors") for folder in (one, other))
    return max((left[name].float() - right[name].float()).abs().max().item() for name in left)


def demo(folder: Path, tiny: bool, seconds: float) -> Facts:
    """The demo's five stages with their recipes as they are, in demo_results, which is emptied; seconds, tables."""
    del folder, tiny
    end = time.monotonic() + seconds
    shutil.rmtree(ROOT / "demo_results", ignore_errors=True)
    return {stage: attempt(demo_stage, stage, end - time.monotonic()) for stage in DEMO}


def demo_stage(stage: str, seconds: float) -> Facts:
    started = time.monotonic()
    said = run([f"mini_qwen_{stage}.py", "--config", f"recipes/demo/{stage}.yaml"], seconds=seconds)
    rows = [line for line in said.splitlines() if line.startswith("|")]
    return {"seconds": round(time.monotonic() - started, 1), "table": rows}


def pretrain(folder: Path, tiny: bool, seconds: float) -> Facts:
    """A real run: recipes/small/pt_110m.yaml as it is, and how it goes on with four openings."""
    del seconds
    keys: dict[str, Any] = {"config": "recipes/small/pt_110m.yaml", "train_files": CORPUS, "output_dir": folder / "pt"}
    keys |= {"tokenizer": SHARED / "tokenizer8k"}
    keys |= {"max_steps": 20, "lr_scheduler_kwargs": '{"num_decay_steps": 6}'} if tiny else {}
    started = time.monotonic()
    run(["mini_qwen_pt.py", *to_words(keys)])
    took = time.monotonic() - started
    (folder / "prompts.txt").write_text("\n".join(OPENINGS) + "\n", encoding="utf-8")
    keys = {"checkpoints": folder / "pt", "parts": "prompts", "prompts": folder / "prompts.txt"}
    run(["mini_qwen_eval.py", *to_words(keys | {"output_dir": folder / "eval"})])
    keep = folder / "keep"
    keep.mkdir()
    for file in ("trainer_state.json", "run.json", "training_loss.png", "data_ledger.json"):
        shutil.copy(folder / "pt" / file, keep)
    shutil.copy(folder / "eval/report.md", keep)
    history = json.loads((folder / "pt/trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    evals = [(line["step"], round(line["eval_loss"], 4)) for line in history if "eval_loss" in line]
    last = next(line for line in reversed(history) if "train_runtime" in line)
    return {"seconds": round(took, 1), "train_runtime": last["train_runtime"], "eval_losses": evals}
