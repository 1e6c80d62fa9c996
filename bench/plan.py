"""Compare the planner's memory with real training steps on this CPU, each in a fresh process.

    python bench/plan.py                      # twelve runs, five minutes on one core
    python bench/plan.py --sizes 20M          # a look

Each process first takes a step with a model of a few thousand weights, so that what the libraries allocate once does
not count. Then it builds the model and takes two steps of two micro-batches in fp32, as the Trainer does: forward,
loss, backward, clipping, fused AdamW. The peak is the system's own high-water mark of the process, above what it held
before; looking at the memory every 20 ms, as bench/memory.py does, misses buffers that live shorter. What autograd
saves is counted as well, tensor by tensor, in fp32, under bf16 autocast and with bf16 weights. Writes
bench/results/plan.json.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# For the processes that are started: else the C library raises the size from which memory that is freed goes back to
# the system, up to 32 MB, as it sees such tensors come and go.
os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"

import torch
from tabulate import tabulate
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from bench.measurement import Facts, Work, measure, processor
from mini_qwen.circumstances import circumstances
from mini_qwen.linear_head import CHUNK_NUMBERS
from mini_qwen.loss_head import add_loss_head
from mini_qwen.plan_memory import Compute, LossHead, Step, activation_bytes, memory
from mini_qwen.plan_parameters import count_parameters, layer_matrices

RESULT = Path(__file__).parent / "results/plan.json"
KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
# The values of KEYS, and of the vocabulary; rows and tokens of a row. In three the head decides, and works in chunks;
# in one, of a small vocabulary, the layers do.
SIZES = {
    "20M": ((256, 4, 4, 2, 768, 65536), (4, 256)),
    "26M": ((384, 8, 6, 2, 1152, 32768), (6, 256)),
    "61M": ((512, 12, 8, 2, 1536, 49152), (4, 256)),
    "23M": ((512, 6, 8, 2, 2048, 1024), (6, 256)),
}
CASES = [
    *({"size": size, "loss_head": head} for head in ("full", "chunked") for size in ("20M", "26M", "61M")),
    *({"size": "23M", "loss_head": "chunked", "checkpointing": checkpointing} for checkpointing in (False, True)),
    *({"size": "26M", "loss_head": head, "checkpointing": True} for head in ("full", "chunked")),
    *({"size": "26M", "loss_head": head, "masked": True} for head in ("full", "chunked")),
]
SHOWN = ("size", "masked", "checkpointing", "loss_head", "forecast_mb", "measured_mb", "ratio", "seconds")
COMPUTES: list[Compute] = ["fp32", "autocast", "half"]


def make_config(values: tuple[int, ...]) -> Qwen2Config:
    sizes = dict(zip((*KEYS, "vocab_size"), values, strict=True))
    return Qwen2Config(**sizes, tie_word_embeddings=True, use_cache=False)


def make_batch(vocab_size: int, rows: int, length: int, masked: bool) -> dict[str, torch.Tensor]:
    """Random tokens. Masked: two documents a row, kept apart by positions that begin anew, as in our blocks."""
    ids = torch.randint(vocab_size, (rows, length))
    first = length // 3 if masked else length
    positions = torch.cat([torch.arange(first), torch.arange(length - first)]).expand(rows, length)
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": positions}


def build(config: Qwen2Config, loss_head: LossHead, checkpointing: bool) -> PreTrainedModel:
    model = Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa").train()
    if checkpointing:
        model.activation_checkpointing_enable()
    if loss_head == "chunked":
        add_loss_head(model, equal_weights=True)
    return model


def train(model: PreTrainedModel, batch: dict[str, torch.Tensor], num_steps: int) -> None:
    """Steps of two micro-batches each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for _ in range(num_steps):
        for _ in range(2):
            (model(**batch).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def resident_mb(line: str) -> float:
    """VmRSS, what the process holds, or VmHWM, the most that it held since the mark was set back."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(text.split()[1]) for text in status if text.startswith(line)) * 1024 / 1e6


def training_steps(
    folder: Path, size: str, loss_head: LossHead, checkpointing: bool = False, masked: bool = False
) -> Work:
    """Two steps of a model that is built within the measured work. `folder` is not used."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train(build(make_config((32, 2, 4, 2, 64, 512)), loss_head, checkpointing), make_batch(512, 2, 32, masked), 1)
    values, shape = SIZES[size]
    batch = make_batch(values[-1], *shape, masked)

    def work() -> Facts:
        before = resident_mb("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # sets the mark back
        train(build(make_config(values), loss_head, checkpointing), batch, num_steps=2)
        return {"measured_mb": round(resident_mb("VmHWM") - before, 1)}

    return work


def compare(case: dict[str, Any]) -> Facts:
    """Forecast and measured peak of one case."""
    values, (rows, length) = SIZES[case["size"]]
    config = make_config(values)
    choices = {"masked": False, "checkpointing": False} | {key: case[key] for key in case if key != "size"}
    step = Step(rows, length, "fp32", 2, chunk_numbers=CHUNK_NUMBERS["cpu"], row_kernels=False, **choices)
    parts = memory(config, step, state_bytes=8 * count_parameters(config))
    forecast = sum(parts.values()) / 1e6
    measured = measure(training_steps, sample_memory=False, folder=RESULT.parent, **case)
    return {
        **{"size": case["size"], "parameters": count_parameters(config), "rows": rows, "length": length, **choices},
        "forecast_mb": round(forecast, 1),
        "measured_mb": measured["measured_mb"],
        "ratio": round(forecast / measured["measured_mb"], 3),
        "seconds": measured["wall_s"],
        "parts_mb": {part: round(num_bytes / 1e6, 1) for part, num_bytes in parts.items()},
        "config": {key: getattr(config, key) for key in (*KEYS, "vocab_size", "tie_word_embeddings")},
    }


def count_saved(compute: Compute, masked: bool) -> Facts:
    """Bytes that autograd saves of a small model without its head: each storage once, weights left out."""
    values, shape = (256, 4, 8, 2, 768, 1024), (4, 256)
    config = make_config(values)
    model = build(config, "full", checkpointing=False)
    model = model.bfloat16() if compute == "half" else model
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is given out twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    batch = make_batch(config.vocab_size, *shape, masked)
    del batch["labels"]
    cast = torch.autocast("cpu", torch.bfloat16) if compute == "autocast" else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), cast:
        last = model.base_model(**batch).last_hidden_state
    counted = sum(storage.nbytes() for storage in saved.values()) / 1e6
    del last
    forecast = activation_bytes(config, Step(*shape, compute, masked=masked))
    forecast += 2 * layer_matrices(config) if compute == "autocast" else 0
    facts = {"forecast_mb": round(forecast / 1e6, 3), "counted_mb": round(counted, 3)}
    return {"compute": compute, "masked": masked, **facts, "ratio": round(forecast / 1e6 / counted, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    args = parser.parse_args()
    started = time.time()
    torch.set_num_threads(1)
    saved = [count_saved(compute, masked) for compute in COMPUTES for masked in (False, True)]
    print(tabulate(saved, headers="keys", tablefmt="github"), flush=True)
    peaks = []
    for case in CASES:
        if case["size"] in args.sizes:
            peaks.append(compare(case))
            print(peaks[-1], flush=True)
    print(tabulate([{key: peak[key] for key in peak if key in SHOWN} for peak in peaks], "keys", "github"))
    if args.sizes == list(SIZES):
        record = circumstances(started) | {"processor": processor(), "saved_by_autograd": saved, "peaks": peaks}
        RESULT.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
