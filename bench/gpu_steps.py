"""The 1B recipe's step on one GPU, lever by lever: a part of bench/gpu.py."""

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bench.measurement import Facts, to_words
from bench.sources import tokenizer_path, write_texts
from bench.step import documents
from mini_qwen.blocks import BlockCollator, Blocks
from mini_qwen.documents import DocumentData
from mini_qwen.model import NewModel, build_model, make_config, needs_flat_rows
from mini_qwen.plan_memory import Step, memory
from mini_qwen.plan_parameters import count_parameters
from mini_qwen.plan_time import GPUS, flops_per_token
from mini_qwen.recipe import parse_recipe
from mini_qwen.tokenizer import load_tokenizer
from mini_qwen.trainers import GuardedTrainer
from mini_qwen.training import PTConfig

ROWS, LENGTH, ACCUMULATION, STEPS = 12, 1024, 8, 3  # of which the first step does not count
QUIET = {"logging_steps": 1000000, "save_strategy": "no", "eval_strategy": "no", "report_to": "none"}
QUIET |= {"disable_tqdm": "true"}
PEAK = GPUS["H200"].teraflops * 1e12  # dense bf16; that of an H100 too
FASTEST = "ours"
BEST: dict[str, Any] = {"attn_implementation": "varlen", "compile_layers": True}
OURS: dict[str, dict[str, Any]] = {
    FASTEST: BEST,
    "ours, sdpa": BEST | {"attn_implementation": "sdpa"},
    "ours, not compiled": BEST | {"compile_layers": False},
    "ours, 24 rows": BEST | {"rows": 24},
    "ours, library's head": BEST | {"loss_head": "library"},
    "ours, sdpa, not compiled": {"attn_implementation": "sdpa"},
    "ours, low memory": BEST | {"low_memory": True},
    "ours, activation checkpointing": BEST | {"activation_checkpointing": True},
    "ours, flex": BEST | {"attn_implementation": "flex_attention"},
    "ours, Liger, not compiled": BEST | {"compile_layers": False, "liger": True},
}


class StepSeconds(TrainerCallback):
    """Seconds of each step, and of its micro-batches but the first and last, with all that the GPU does in them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.micro_batches: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self.started, self.micro_started = time.perf_counter(), 0.0

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        now = time.perf_counter()
        if self.micro_started and self.seconds:
            self.micro_batches.append(now - self.micro_started)
        self.micro_started = now

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)


def read_recipe(folder: Path, tiny: bool, **keys: Any) -> tuple[PTConfig, NewModel]:
    """recipes/pt.yaml with `keys` changed; tiny: of two layers."""
    changes = {"tokenizer": tokenizer_path(), "output_dir": folder / "out"} | QUIET | keys
    changes |= {"num_hidden_layers": 2} if tiny else {}
    return parse_recipe(DocumentData, PTConfig, NewModel, argv=to_words(changes), default="recipes/pt.yaml")[1:]


def naive(folder: Path, tiny: bool, liger: bool = False) -> Trainer:
    """As the seed's program has it on today's libraries: rows of lists, the mask of ones, all logits."""
    _, keys = read_recipe(folder, tiny)
    tokenizer = load_tokenizer(keys.tokenizer)
    if not (folder / "rows").is_dir():
        rows = [{"input_ids": block["input_ids"].tolist()} for block in Blocks(folder / "blocks")]
        rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
        Dataset.from_list(rows).save_to_disk(str(folder / "rows"))
    with torch.device("cuda"):
        config = make_config(keys, tokenizer)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    args = TrainingArguments(
        str(folder / "out"),
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=STEPS,
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        bf16=True,
        use_liger_kernel=liger,
        logging_steps=1000000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return Trainer(model, args, data_collator=collator, train_dataset=load_from_disk(str(folder / "rows")))


def ours(folder: Path, tiny: bool, rows: int = ROWS, liger: bool = False, **keys: Any) -> Trainer:
    """The recipe's trainer, with `keys` of the recipe changed."""
    keys |= {"per_device_train_batch_size": rows, "gradient_accumulation_steps": ACCUMULATION * ROWS // rows}
    args, model_args = read_recipe(folder, tiny, **({"max_steps": STEPS} | keys))
    tokenizer = load_tokenizer(model_args.tokenizer)
    with torch.device("cuda"):
        model = build_model(model_args, tokenizer, args.precision, "pt", args.low_memory)
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        apply_liger_kernel_to_qwen2(
            rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False, model=model
        )
    return GuardedTrainer(
        model=model,
        args=args,
        train_dataset=Blocks(folder / "blocks"),
        data_collator=BlockCollator(tokenizer.pad_token_id, flatten=needs_flat_rows(model)),
    )


def measure_steps(make: Callable[..., Trainer], folder: Path, **keys: Any) -> Facts:
    trainer = make(folder, **keys)
    torch.cuda.reset_peak_memory_stats()
    clock = StepSeconds()
    trainer.add_callback(clock)
    loss = trainer.train().training_loss
    step = statistics.median(clock.seconds[1:])
    tokens = ROWS * LENGTH * ACCUMULATION / step
    flops = flops_per_token(trainer.model.config, LENGTH)
    return {
        "tokens_per_s": round(tokens),
        "mfu": round(tokens * flops / PEAK, 4),
        "step_ms": round(step * 1000, 1),
        "micro_batch_ms": round(statistics.median(clock.micro_batches) * 1000, 1),
        "first_step_s": round(clock.seconds[0], 2),
        "all_steps_s": [round(seconds, 4) for seconds in clock.seconds],
        "peak_allocated_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "peak_reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
        "loss": round(loss, 4),
    }


def profile_step(folder: Path, tiny: bool, **keys: Any) -> Facts:
    """The kernels of one step that take longest: name, milliseconds a micro-batch, calls a micro-batch."""
    trainer = ours(folder, tiny, max_steps=1, **keys)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        trainer.train()
    kernels = sorted(profiler.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    total = sum(kernel.self_device_time_total for kernel in kernels) / 1000 / ACCUMULATION
    lines = [
        [kernel.key[:100], round(kernel.self_device_time_total / 1000 / ACCUMULATION, 2), kernel.count / ACCUMULATION]
        for kernel in kernels[:45]
    ]
    return {"all_kernels_ms": round(total, 1), "kernels": lines}


def forecast_gb(folder: Path, tiny: bool, masked: bool, loss_head: str) -> float:
    """What the planner says of a step on fp32 weights with layers that are not compiled."""
    _, keys = read_recipe(folder, tiny)
    config = make_config(keys, load_tokenizer(keys.tokenizer))
    step = Step(ROWS, LENGTH, "autocast", ACCUMULATION, masked, loss_head=loss_head)
    return round(sum(memory(config, step, 8 * count_parameters(config)).values()) / 1e9, 2)


def attempt(work: Callable[..., Facts], *args: Any, **kwargs: Any) -> Facts:
    """What a lever does not do is a result too."""
    try:
        return work(*args, **kwargs)
    except (Exception, SystemExit) as error:
        return {"failed": f"{type(error).__name__}: {error}"[:600]}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def step(folder: Path, tiny: bool, seconds: float) -> Facts:
    """The naive and ours in turns, three times, then every other variant once; nothing new begins after `seconds`."""
    end = time.monotonic() + seconds
    num_blocks = ROWS * ACCUMULATION * STEPS
    write_texts(folder / "texts", num_blocks * LENGTH * 6 / 1e6)
    data = documents(folder, LENGTH, num_blocks, tokenizer_path(), str(folder / "texts"))
    variants = {"naive": partial(measure_steps, naive, folder, tiny=tiny)}
    variants |= {name: partial(measure_steps, ours, folder, tiny=tiny, **keys) for name, keys in OURS.items()}
    variants["naive, use_liger_kernel"] = partial(measure_steps, naive, folder, tiny=tiny, liger=True)
    measured: dict[str, list[Facts]] = {name: [] for name in variants}
    profile: Facts = {}
    # Liger changes transformers' classes for good, so that it comes last.
    for name in [*["naive", FASTEST] * 3, *list(variants)[2:]]:
        if time.monotonic() < end:
            if name != FASTEST:
                torch._dynamo.reset()  # of one function so many versions are compiled, and no more
            measured[name].append(attempt(variants[name]))
            print(name, measured[name][-1], flush=True)
            if name == FASTEST and "failed" in measured[name][-1]:
                break
            if name == FASTEST and len(measured[name]) == 3:
                profile = attempt(profile_step, folder, tiny=tiny, **BEST)
    forecasts = {
        "ours, not compiled": forecast_gb(folder, tiny, False, "chunked"),
        "ours, sdpa, not compiled": forecast_gb(folder, tiny, True, "chunked"),
        "naive": forecast_gb(folder, tiny, False, "full"),
    }
    return {"data": data, "rows": ROWS, "accumulation": ACCUMULATION, "measured": measured} | {
        "profile": profile,
        "forecast_gb": forecasts,
    }
