"""Triton kernels over the rows of a matrix of logits: what each says of its label, and its gradient in its own place.

A chunk of logits is read twice and written once, in the type it has. Through torch's own operations it is read and
written nine times, most of them in fp32, and that takes longer on a GPU than a fifth of the head's matrix products.
"""

import torch
import triton
import triton.language as tl

BLOCK = 4096  # logits that a program holds at a time


@triton.jit
def score_kernel(
    logits: torch.Tensor,
    labels: torch.Tensor,
    log_z: torch.Tensor,
    chosen: torch.Tensor,
    is_top1: torch.Tensor,
    entropy: torch.Tensor,
    width: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One program a row: the logarithm of the sum of exp, by sums that move to a higher maximum as one is found."""
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * width
    highest, total, weighted = -float("inf"), 0.0, 0.0
    for first in range(0, width, block):
        at = first + tl.arange(0, block)
        values = tl.load(start + at, mask=at < width, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(values, axis=0))
        shrink, powers = tl.exp(highest - higher), tl.exp(values - higher)
        total = total * shrink + tl.sum(powers, axis=0)
        weighted = weighted * shrink + tl.sum(tl.where(at < width, powers * values, 0.0), axis=0)
        highest = higher
    label = tl.load(start + tl.load(labels + row)).to(tl.float32)
    normalizer = highest + tl.log(total)
    tl.store(log_z + row, normalizer)
    tl.store(chosen + row, label)
    tl.store(is_top1 + row, label == highest)
    tl.store(entropy + row, normalizer - weighted / total)


@triton.jit
def slope_kernel(
    logits: torch.Tensor, labels: torch.Tensor, log_z: torch.Tensor, width: tl.constexpr, block: tl.constexpr
) -> None:
    """How the negative log-probability grows with each logit: by its probability, less 1 for the label."""
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * width
    at = tl.program_id(1) * block + tl.arange(0, block)
    values = tl.load(start + at, mask=at < width, other=0.0).to(tl.float32)
    slopes = tl.exp(values - tl.load(log_z + row)) - tl.where(at == tl.load(labels + row), 1.0, 0.0)
    tl.store(start + at, slopes.to(logits.dtype.element_ty), mask=at < width)


def score_rows(
    logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of logits [n, V], contiguous, and labels [n] int64.

    Returns the logarithm of the sum of exp, the label's logit, whether none is higher, and the entropy in nats; each
    [n], fp32 but for the bool.
    """
    log_z, chosen, entropy = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(3))
    is_top1 = torch.empty_like(labels, dtype=torch.bool)
    if len(logits):
        score_kernel[(len(logits),)](logits, labels, log_z, chosen, is_top1, entropy, logits.shape[1], BLOCK)
    return log_z, chosen, is_top1, entropy


def slope_rows_(logits: torch.Tensor, labels: torch.Tensor, log_z: torch.Tensor) -> torch.Tensor:
    """Put in the place of logits [n, V] the gradients of the labels' negative log-probabilities."""
    if len(logits):
        grid = (len(logits), triton.cdiv(logits.shape[1], BLOCK))
        slope_kernel[grid](logits, labels, log_z, logits.shape[1], BLOCK)
    return logits
