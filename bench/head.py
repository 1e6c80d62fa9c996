"""The loss head at Qwen's vocabulary: a plain one with all logits, TRL's, torch's and ours; time, memory, exactness.

    python bench/head.py                    # about ten minutes on two cores
    python bench/head.py --rounds 1

1,024 tokens of width 256, in fp32 and in bf16; forward and backward pass. Writes bench/results/head.json.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tabulate import tabulate
from torch.nn.functional import cross_entropy, linear
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

from bench.measurement import Facts, Work, alternate, medians, processor
from mini_qwen.circumstances import circumstances
from mini_qwen.token_scores import score_tokens

RESULT = Path(__file__).parent / "results/head.json"
VOCABULARY, WIDTH, TOKENS = 151_936, 256, 1024
REPETITIONS = 3

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # hidden, weight, labels -> their mean loss


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(linear(hidden, weight).float(), labels)


def trl(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    chunk = _CHUNKED_LOGPROB_CHUNK_SIZE
    outputs = ("log_probs",)
    return -_ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, chunk, None, 1.0, outputs)[0].mean()


def torchs(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """torch.nn.functional.linear_cross_entropy, with chunks of a size that suits a CPU."""
    # Imported here, so that bench/gpu_head.py has the other heads with a torch that lacks this one.
    from torch.nn.functional import linear_cross_entropy
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions(batch_chunk_size=256)
    return linear_cross_entropy(hidden, weight, labels, options=options)


def ours(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, equal_weights: bool) -> torch.Tensor:
    return -score_tokens(hidden, weight, labels, equal_weights).log_probs.mean()


HEADS: dict[str, Loss] = {
    "plain": plain,
    "trl": trl,
    "torch": torchs,
    "ours, tokens weigh the same": partial(ours, equal_weights=True),
    "ours, tokens weigh differently": partial(ours, equal_weights=False),
}


def make_input(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    weight = torch.randn(vocabulary, WIDTH, generator=generator).mul_(0.02)
    return hidden, weight, torch.randint(vocabulary, (TOKENS,), generator=generator)


def run(head: Loss, dtype: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, and the gradients of hidden and weight."""
    hidden, weight, labels = tensors[0].clone().requires_grad_(), tensors[1].detach().requires_grad_(), tensors[2]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        loss = head(hidden, weight, labels)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


def variant(folder: Path, head: str, dtype: str) -> Work:
    tensors = make_input(VOCABULARY)

    def work() -> Facts:
        for _ in range(REPETITIONS):
            run(HEADS[head], dtype, *tensors)
        return {}

    return work


def errors(dtype: str) -> dict[str, Facts]:
    """Against the plain head in fp64: of the loss, and of the gradients relative to their norm. Vocabulary 32,768."""
    hidden, weight, labels = make_input(2**15)
    exact = hidden.double().requires_grad_(), weight.double().requires_grad_()
    true_loss = cross_entropy(linear(*exact), labels)
    true_loss.backward()
    found = {}
    for name, head in HEADS.items():
        loss, *gradients = run(head, dtype, hidden, weight, labels)
        distances = [
            ((ours - true.grad).norm() / true.grad.norm()).item()
            for ours, true in zip(gradients, exact, strict=True)
            if true.grad is not None
        ]
        found[name] = {
            "loss_error": float(f"{abs(loss.double() - true_loss).item():.2e}"),
            "gradient_error": float(f"{max(distances):.2e}"),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    started, load = time.time(), os.getloadavg()[0]
    record, rows = {}, []
    for dtype in ("fp32", "bf16"):
        with tempfile.TemporaryDirectory(prefix="mini_qwen_bench_") as folder:
            variants = {name: partial(variant, head=name, dtype=dtype) for name in HEADS}
            measured = alternate(variants, args.rounds, Path(folder))
        middle, wrong = medians(measured), errors(dtype)
        for name, facts in middle.items():
            against = middle["plain"]
            ratios = {
                "wall_ratio": round(facts["wall_s"] / against["wall_s"], 3),
                "cpu_ratio": round(facts["cpu_s"] / against["cpu_s"], 3),
                "memory_ratio": round(facts["peak_growth_mb"] / against["peak_growth_mb"], 3),
            }
            rows.append({"type": dtype, "head": name} | ratios | wrong[name])
        record[dtype] = {"medians": middle, "errors": wrong, "rounds": measured}
    print(tabulate(rows, headers="keys", tablefmt="github"))
    sizes = {"vocabulary": VOCABULARY, "width": WIDTH, "tokens": TOKENS, "repetitions": REPETITIONS}
    machine = {"processor": processor(), "load_before": load, "threads": torch.get_num_threads()}
    RESULT.write_text(
        json.dumps(circumstances(started) | machine | sizes | {"ratios_to_plain": rows} | record, indent=2) + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
