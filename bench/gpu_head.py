"""The 1B recipe's loss head alone on one GPU, against its three matrix products: a part of bench/gpu.py."""

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu_steps import LENGTH, ROWS, attempt
from bench.head import Loss, ours, plain, trl
from bench.measurement import Facts


def liger_head(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight.bfloat16(), hidden.bfloat16(), labels)


HEADS: dict[str, Loss] = {
    "plain": plain,
    "Liger": liger_head,
    "trl": trl,
    "ours, tokens weigh the same": partial(ours, equal_weights=True),
    "ours, tokens weigh differently": partial(ours, equal_weights=False),
}


def milliseconds(work: Callable[[], Any], repeat: int = 5) -> float:
    """Median of `repeat`, behind two that do not count."""
    found = []
    for _ in range(repeat + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end))
    return statistics.median(found[2:])


def matrix_tflops() -> float:
    """Of a product of 8,192 x 8,192 matrices in bf16, random numbers."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return round(2 * 8192**3 / milliseconds(lambda: left @ right, 20) / 1e9, 1)


def products_ms(hidden: torch.Tensor, weight: torch.Tensor) -> float:
    """Of logits, and of the gradients of hidden and weight, in bf16."""
    hidden, weight = hidden.detach().bfloat16(), weight.detach().bfloat16()
    logits = hidden @ weight.T
    return (
        milliseconds(lambda: hidden @ weight.T)
        + milliseconds(lambda: logits @ weight)
        + milliseconds(lambda: logits.T @ hidden)
    )


def run(loss: Loss, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> float:
    hidden.grad = weight.grad = None
    with torch.autocast("cuda", torch.bfloat16):
        value = loss(hidden, weight, labels)
    value.backward()
    return value.item()


def measure_head(loss: Loss, expected: list[torch.Tensor], products: float, *tensors: torch.Tensor) -> Facts:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = run(loss, *tensors)
    peak = torch.cuda.max_memory_allocated() - before
    gradients = [tensor.grad for tensor in tensors[:2]]
    distances = [(own - true).norm() / true.norm() for own, true in zip(gradients, expected, strict=True)]
    took = milliseconds(lambda: run(loss, *tensors))
    return {
        "ms": round(took, 2),
        "times_three_products": round(took / products, 2),
        "peak_gb": round(peak / 1e9, 2),
        "loss": value,
        "gradients_from_plain": float(f"{max(distances).item():.2e}"),
    }


def head(folder: Path, tiny: bool, seconds: float) -> Facts:
    """Forward and backward pass of 12 x 1,023 tokens."""
    del folder, seconds
    tokens, width, vocabulary = ROWS * (LENGTH - 1), 1024, 2**15 if tiny else 151_936
    hidden = torch.randn(tokens, width, device="cuda", requires_grad=True)
    weight = (torch.randn(vocabulary, width, device="cuda") * 0.02).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), device="cuda")
    products = products_ms(hidden, weight)
    run(plain, hidden, weight, labels)
    gradients = [hidden.grad.clone(), weight.grad.clone()]
    found = {
        name: attempt(measure_head, loss, gradients, products, hidden, weight, labels) for name, loss in HEADS.items()
    }
    return {"matrix_tflops": matrix_tflops(), "three_products_ms": round(products, 2), "heads": found}
