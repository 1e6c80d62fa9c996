"""Do low-memory updates move the weights as fp32 masters do? And what the 1B model needs with them.

    python bench/low_memory.py                 # 3 seeds, 200 steps; 5 minutes on one core
    python bench/low_memory.py --seeds 1       # a look

A Qwen2 of 115,000 weights is trained for a while, rounded to bf16, and trained on at the learning rates of DPO and of
SFT from there, on the same rows each time: with fp32 masters and bf16 compute, and with each of the variants. Of where
a variant ends, compared with where the fp32 masters end:

    progress         share of their way that it has gone in their direction: 1 is right, 0 is not moved
    distance         from their end, in lengths of their way: 0 is right, 1 is as far as the start is
    logit_distance   the same, of the log-probabilities that the weights give in fp32

Sums of gradients: of 8 to 1,024 micro-batches in bf16, with and without the hook of low_memory_optimizer, against the
sum of the same gradients in fp32: how long they are in its direction, and how far off.

Memory: what two steps of a model of 101 million weights add to a process that has its weights, with low_memory and
with fp32 masters. Writes bench/results/low_memory.json; torchao's optimizer is among the variants where it is
installed.
"""

import argparse
import copy
import importlib.metadata
import importlib.util
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from bench.measurement import Work, measure, processor
from mini_qwen.circumstances import circumstances
from mini_qwen.low_memory import LowMemoryAdamW, adds_without_bias, widen
from mini_qwen.plan import Machine
from mini_qwen.plan_recipe import make_run, read_recipe
from mini_qwen.plan_time import GPUS
from mini_qwen.rounding import join, round_to_bf16

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results" / "low_memory.json"
RATES = (5e-7, 1e-5)
VOCAB, ROWS, LENGTH = 512, 4, 64
SUMS = (8, 64, 256, 1024)  # micro-batches
LARGE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4}
LARGE |= {"intermediate_size": 2304, "vocab_size": 16384}
RECIPES = Path("recipes/low_memory")

Optimizer = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]


class WithoutTheByte(LowMemoryAdamW):
    """Rounds its weights to bf16, at random, behind each step."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        super().step(closure)
        for weight, state in self.state.items():
            weight.copy_(round_to_bf16(join(weight, state["low"].view_as(weight))))
            state["low"].zero_()


def make_variants(rate: float) -> dict[str, Optimizer]:
    def adamw(weights: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(weights, rate, weight_decay=0.0)

    variants: dict[str, Optimizer] = {
        "fp32 masters": adamw,
        "plain bf16": adamw,
        "bf16 rounded at random": lambda weights: WithoutTheByte(weights, rate),
        "low_memory": lambda weights: LowMemoryAdamW(weights, rate),
    }
    if importlib.util.find_spec("torchao"):
        from torchao.optim import AdamW8bit

        variants["torchao AdamW8bit, bf16_stochastic_round"] = lambda weights: AdamW8bit(
            weights, rate, weight_decay=0.0, bf16_stochastic_round=True
        )
    return variants


def make_model(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(**sizes, intermediate_size=128, vocab_size=VOCAB, tie_word_embeddings=True, use_cache=False)
    return Qwen2ForCausalLM(config)


def batches(seed: int) -> Iterator[torch.Tensor]:
    """Rows [ROWS, LENGTH] of a language in which each token has eight that may follow it."""
    followers = torch.randint(0, VOCAB, (VOCAB, 8), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    while True:
        row = [torch.randint(0, VOCAB, (ROWS,), generator=generator)]
        for _ in range(LENGTH - 1):
            row.append(followers[row[-1], torch.randint(0, 8, (ROWS,), generator=generator)])
        yield torch.stack(row, dim=1)


def loss_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=ids, labels=ids).loss


def train(model: PreTrainedModel, make: Optimizer, seed: int, steps: int) -> PreTrainedModel:
    """In place; the model comes back with fp32 weights, those that its optimizer holds."""
    torch.manual_seed(seed)
    optimizer = make(model.parameters())
    for ids in itertools.islice(batches(seed), steps):
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    if type(optimizer) is LowMemoryAdamW:
        widen(model, optimizer)
    return model.float()


def start_model(seed: int, steps: int) -> PreTrainedModel:
    """Trained a little, with weights that are bf16 numbers."""
    model = train(make_model(seed), lambda weights: torch.optim.AdamW(weights, 2e-3), 1000 + seed, steps)
    return model.to(torch.bfloat16).float()


@torch.no_grad()
def positions(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All weights, and all log-probabilities of some rows, as two vectors in fp64."""
    weights = torch.cat([weight.flatten() for weight in model.parameters()]).double()
    return weights, model(input_ids=ids).logits.double().log_softmax(dim=-1).flatten()


def compare(start: PreTrainedModel, rate: float, seed: int, steps: int) -> dict[str, dict[str, float]]:
    ids = next(batches(9999))
    before, ends = positions(start, ids), {}
    for name, make in make_variants(rate).items():
        dtype = torch.float32 if name == "fp32 masters" else torch.bfloat16
        ends[name] = positions(train(copy.deepcopy(start).to(dtype), make, 2000 + seed, steps), ids)
    masters = ends.pop("fp32 masters")
    way, logit_way = masters[0] - before[0], (masters[1] - before[1]).norm()
    return {
        name: {
            "progress": round(float((end[0] - before[0]) @ way / (way @ way)), 4),
            "distance": round(float((end[0] - masters[0]).norm() / way.norm()), 4),
            "logit_distance": round(float((end[1] - masters[1]).norm() / logit_way), 4),
        }
        for name, end in ends.items()
    }


def sum_gradients(start: PreTrainedModel) -> dict[str, dict[str, dict[str, float]]]:
    """Of two bf16 models on the same rows, one with the hook, against the sum of the plain one's gradients in fp32."""
    plain, hooked = copy.deepcopy(start).to(torch.bfloat16), copy.deepcopy(start).to(torch.bfloat16)
    for weight in hooked.parameters():
        weight.register_hook(adds_without_bias(weight))
    exact = [torch.zeros_like(weight, dtype=torch.float64) for weight in plain.parameters()]
    sums = [torch.zeros_like(weight) for weight in plain.parameters()]
    found: dict[str, dict[str, dict[str, float]]] = {"nearest": {}, "at random": {}}
    torch.manual_seed(0)
    for number, ids in enumerate(itertools.islice(batches(3000), max(SUMS)), start=1):
        plain.zero_grad()
        for model in (plain, hooked):
            loss_of(model, ids).backward()
        for total, rounded, weight in zip(exact, sums, plain.parameters(), strict=True):
            total += weight.grad
            rounded += weight.grad
        if number in SUMS:
            right = torch.cat([total.flatten() for total in exact])
            ours = [weight.grad for weight in hooked.parameters()]
            for name, parts in {"nearest": sums, "at random": ours}.items():
                found_sum = torch.cat([part.flatten() for part in parts]).double()
                found[name][str(number)] = {
                    "length": round(float(found_sum @ right / (right @ right)), 4),
                    "off": round(float((found_sum - right).norm() / right.norm()), 4),
                }
    return found


def two_steps(folder: Path, low_memory: bool) -> Work:
    """Steps of two micro-batches of 64 tokens on 101 million weights, whose activations hardly count."""
    torch.manual_seed(0)
    config = Qwen2Config(**LARGE, use_cache=False, tie_word_embeddings=True)
    model = Qwen2ForCausalLM(config).to(torch.bfloat16 if low_memory else torch.float32)
    if low_memory:
        for weight in model.parameters():
            weight.register_hook(adds_without_bias(weight))
    optimizer = (LowMemoryAdamW if low_memory else torch.optim.AdamW)(model.parameters(), 1e-5)
    ids = torch.randint(0, config.vocab_size, (1, 64))

    def work() -> dict[str, int]:
        for _ in range(2):
            for _ in range(2):
                loss_of(model, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {"parameters": model.num_parameters()}

    return work


def bytes_each() -> dict[str, dict[str, float]]:
    """A weight's, measured: what it takes itself, and what the steps add at their peak."""
    found: dict[str, dict[str, float]] = {}
    for name, low_memory in {"low_memory": True, "fp32 masters": False}.items():
        with tempfile.TemporaryDirectory(prefix="mini_qwen_bench_") as folder:
            peak = measure(two_steps, sample_memory=True, folder=Path(folder), low_memory=low_memory)
            facts = measure(two_steps, sample_memory=False, folder=Path(folder), low_memory=low_memory)
        added = round(peak["peak_growth_mb"] * 1e6 / facts["parameters"], 2)
        found[name] = {"weights": 2.0 if low_memory else 4.0, "added_at_the_peak": added, "seconds": facts["wall_s"]}
    return found


def plan(name: str) -> dict[str, float]:
    """GB of recipes/low_memory/NAME.yaml on one GPU, part by part, as utils/plan.py computes them; none is measured.

    Comes on top: CUDA's own memory, about 0.5 GB.
    """
    machine = Machine(GPUS["RTX4090"])  # which also has bf16; a recipe for fp16 says so itself
    recipe = read_recipe(str(RECIPES / f"{name}.yaml"), [], model=str(RECIPES / "pt.yaml"))
    parts = make_run(recipe, machine, tokens=recipe.length, rows=1, loss_head=None).memory(machine)
    found = {part: round(size / 1e9, 2) for part, size in parts.items() if size}
    return found | {"sum": round(sum(parts.values()) / 1e9, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    started = time.time()
    torch.set_num_threads(1)
    each: dict[str, list[dict[str, dict[str, float]]]] = {}
    for seed in range(args.seeds):
        start = start_model(seed, args.steps)
        for rate in RATES:
            each.setdefault(f"{rate:g}", []).append(compare(start, rate, seed, args.steps))
            print(f"seed {seed}, learning rate {rate:g}: {json.dumps(each[f'{rate:g}'][-1], indent=1)}", flush=True)
    means: dict[str, Any] = {
        rate: {
            name: {key: round(statistics.mean(run[name][key] for run in runs), 4) for key in runs[0][name]}
            for name in runs[0]
        }
        for rate, runs in each.items()
    }
    record = circumstances(started) | {"processor": processor(), "seeds": args.seeds, "steps": args.steps}
    if importlib.util.find_spec("torchao"):
        record["versions"] |= {"torchao": importlib.metadata.version("torchao")}
    record |= {"means": means, "each": each, "sums_of_gradients": sum_gradients(start)}
    record["bytes_a_weight"] = bytes_each()
    record["1B_computed_gb"] = {name: plan(name) for name in ("pt", "sft", "dpo", "pt_t4")}
    record["seconds"] = round(time.time() - started, 1)
    RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(
        json.dumps(
            {key: record[key] for key in ("means", "sums_of_gradients", "bytes_a_weight", "1B_computed_gb")}, indent=1
        )
    )


if __name__ == "__main__":
    main()
