"""Log-probabilities of given tokens under a linear head, and their gradients, a few hundred tokens at a time.

At a vocabulary of 151,936 the logits of a batch of 12 x 1,024 tokens are 7.5 GB in fp32, and a plain loss holds three
to four copies of them. Here the logits of a chunk are made, scored and turned into their part of the gradients before
those of the next are.

The three matrix products of a plain head remain three where every token's loss weighs the same, as in PT and SFT: the
gradients are formed in the forward pass, up to one factor that the backward pass brings. DPO weighs the tokens of each
answer differently, and knows how only when all are scored: there the backward pass makes the logits anew, a fourth.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mini_qwen.linear_head import CHUNK_NUMBERS, Head, Scores


class ScoreTokens(torch.autograd.Function):
    """Scores of tokens under a linear head, chunk by chunk; see `score_tokens`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        dtype: torch.dtype,
        form_gradients: bool,
        with_entropy: bool,
        chunk_tokens: int,
    ) -> tuple[torch.Tensor, ...]:
        head = Head(hidden, weight, labels, dtype, chunk_tokens, with_gradients=form_gradients)
        log_probs = hidden.new_empty(len(hidden), dtype=torch.float32)
        is_top1 = torch.empty_like(labels, dtype=torch.bool)
        entropy = log_probs.new_empty(len(hidden) if with_entropy else 0)
        for part in head.chunks:
            head.compute(part)
            scores = head.scores(part, with_entropy)
            log_probs[part], is_top1[part] = scores.log_probs, scores.is_top1
            if with_entropy:
                entropy[part] = scores.entropy
            if form_gradients:
                head.add_gradients(part)
        ctx.form_gradients, ctx.dtype, ctx.chunk_tokens = form_gradients, dtype, chunk_tokens
        if form_gradients:
            ctx.gradients = head.to_hidden, head.to_weight
        else:
            ctx.save_for_backward(hidden, weight, labels)
        ctx.mark_non_differentiable(is_top1, entropy)
        return log_probs, is_top1, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factors: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """`factors` [N]: of each token's log-probability, how much the loss grows with it."""
        if ctx.form_gradients:
            if ctx.gradients is None:
                raise RuntimeError("backward() goes through this loss once; its gradients were given out already.")
            if not torch.equal(factors, factors[:1].expand_as(factors)) and factors.isfinite().all():
                raise RuntimeError("equal_weights=True, but this loss weighs its tokens differently; pass False.")
            (to_hidden, to_weight), ctx.gradients = ctx.gradients, None
            factor = -factors[0] if len(factors) else 0.0
            return to_hidden.mul_(factor), to_weight.mul_(factor), None, None, None, None, None
        head = Head(*ctx.saved_tensors, ctx.dtype, ctx.chunk_tokens, with_gradients=True)
        for part in head.chunks:
            head.compute(part)
            head.add_gradients(part, -factors[part, None])
        return head.to_hidden, head.to_weight, None, None, None, None, None


def score_tokens(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    equal_weights: bool = False,
    with_entropy: bool = False,
    chunk_tokens: int | None = None,
) -> Scores:
    """log softmax(hidden @ weight.T)[labels], computed in the type that autocast says, summed up in fp32.

    With weight the 2 x 2 identity, hidden [[0, 0], [ln 3, 0]] and labels [1, 0] the probabilities are 1/2 and 3/4.

    Args:
        hidden: [N, H], the last layer's output where a token is to be predicted.
        weight: [V, H], the head's matrix.
        labels: [N], ids of the tokens to be predicted.
        equal_weights: the loss is one factor times the sum of all log_probs. Their gradients are then formed at once;
            backward() raises RuntimeError when it is not so.
        chunk_tokens: tokens whose logits exist at a time; else CHUNK_NUMBERS / V.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    size = chunk_tokens or max(1, CHUNK_NUMBERS[kind] // len(weight))
    form_gradients = equal_weights and torch.is_grad_enabled()
    with torch.autocast(kind, enabled=False):
        return Scores(*ScoreTokens.apply(hidden, weight, labels, dtype, form_gradients, with_entropy, size))
