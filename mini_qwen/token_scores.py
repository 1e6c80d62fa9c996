"""Log-probabilities of given tokens under a linear head, and their gradients, a few hundred tokens at a time.

At a vocabulary of 151,936 the logits of a batch of 12 x 1,024 tokens are 7.5 GB in fp32, and a plain loss holds three
to four copies of them. Here the logits of a chunk are made, scored and turned into their part of the gradients before
those of the next are.

The three matrix products of a plain head remain three where every token's loss weighs the same, as in PT and SFT: the
gradients are formed in the forward pass, up to one factor that the backward pass brings. DPO weighs the tokens of each
answer differently, and knows how only when all are scored: there the backward pass makes the logits anew, a fourth.
"""

from typing import Any, NamedTuple

import torch

# Numbers in the logits of one chunk, in fp32 128 MB and 1 GB: few enough for the cache and the memory of a CPU, many
# enough to fill a GPU. 220 and 1,766 tokens at Qwen's vocabulary.
CHUNK_NUMBERS = {"cpu": 2**25, "cuda": 2**28}


class Scores(NamedTuple):
    """What the head says of N tokens; all but the first cannot be differentiated."""

    log_probs: torch.Tensor  # [N] fp32, natural logarithm
    is_top1: torch.Tensor  # [N] bool: the label is the most probable token
    entropy: torch.Tensor  # [N] fp32, nats; empty unless asked for


class Head:
    """A linear head on the tokens of one call, and the gradients of the sum of their negative log-probabilities.

    Products are in the compute type; sums over chunks in fp32, for in bf16 the later ones would hardly count.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        dtype: torch.dtype,
        with_gradients: bool,
    ) -> None:
        self.hidden, self.weight, self.labels = hidden.to(dtype), weight.to(dtype), labels[:, None]
        self.gradients: tuple[torch.Tensor, torch.Tensor] | None = None
        if with_gradients:
            self.gradients = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)

    def logits(self, part: slice) -> torch.Tensor:
        return self.hidden[part] @ self.weight.T

    def add_gradients(self, part: slice, probabilities: torch.Tensor, factors: torch.Tensor | None = None) -> None:
        """Of a chunk; destroys `probabilities` [n, V]. `factors` [n, 1] weigh its tokens, else they weigh 1."""
        assert self.gradients is not None
        hidden, labels = self.hidden[part], self.labels[part]
        # How the negative log-probability grows with the logits: by the probabilities, less 1 for the label.
        probabilities.scatter_(1, labels, probabilities.gather(1, labels) - 1)
        slope = probabilities.to(hidden.dtype)
        to_hidden = slope @ self.weight
        if factors is not None:
            to_hidden, hidden = to_hidden * factors, (hidden * factors).to(hidden.dtype)
        self.gradients[0][part] = to_hidden
        add_product(self.gradients[1], slope.T, hidden)


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
        head = Head(hidden, weight, labels, dtype, with_gradients=form_gradients)
        log_z = hidden.new_empty(len(hidden), dtype=torch.float32)
        label_logits, is_top1 = torch.empty_like(log_z), torch.empty_like(labels, dtype=torch.bool)
        entropy = log_z.new_empty(len(hidden) if with_entropy else 0)
        for part in chunks(len(hidden), chunk_tokens):
            logits = head.logits(part)
            highest, top1 = logits.max(dim=-1, keepdim=True)
            probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
            # Of the most probable token, whose probability is at least 1 / V, so that its logarithm is exact.
            log_z[part] = (highest - probabilities.gather(1, top1).log())[:, 0]
            label_logits[part] = logits.gather(1, head.labels[part])[:, 0].float()
            is_top1[part] = (top1 == head.labels[part])[:, 0]
            if with_entropy:
                expected = torch.bmm(probabilities[:, None], logits[:, :, None].float())
                entropy[part] = log_z[part] - expected[:, 0, 0]
            del logits  # else it stays beside what the gradients take, and while the next chunk's is made
            if form_gradients:
                head.add_gradients(part, probabilities)
            del probabilities
        ctx.gradients, ctx.form_gradients = head.gradients, form_gradients
        ctx.dtype, ctx.chunk_tokens = dtype, chunk_tokens
        if not form_gradients:
            ctx.save_for_backward(hidden, weight, labels, log_z)
        ctx.mark_non_differentiable(is_top1, entropy)
        return label_logits - log_z, is_top1, entropy

    @staticmethod
    def backward(ctx: Any, factors: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """`factors` [N]: of each token's log-probability, how much the loss grows with it."""
        if ctx.form_gradients:
            if ctx.gradients is None:
                raise RuntimeError("backward() goes through this loss once; its gradients were given out already.")
            if not torch.equal(factors, factors[:1].expand_as(factors)):
                raise RuntimeError("equal_weights=True, but this loss weighs its tokens differently; pass False.")
            (to_hidden, to_weight), ctx.gradients = ctx.gradients, None
            factor = -factors[0] if len(factors) else 0.0
            return to_hidden.mul_(factor), to_weight.mul_(factor), None, None, None, None, None
        hidden, weight, labels, log_z = ctx.saved_tensors
        head = Head(hidden, weight, labels, ctx.dtype, with_gradients=True)
        for part in chunks(len(hidden), ctx.chunk_tokens):
            probabilities = head.logits(part).float().sub_(log_z[part, None]).exp_()
            head.add_gradients(part, probabilities, -factors[part, None])
            del probabilities
        assert head.gradients is not None
        return *head.gradients, None, None, None, None, None


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, where total is fp32 and the others may be of less precision."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left @ right)


def chunks(num_tokens: int, chunk_tokens: int) -> list[slice]:
    """As few as there can be of at most `chunk_tokens`, of like size.

    >>> chunks(10, 4)
    [slice(0, 4, None), slice(4, 8, None), slice(8, 12, None)]
    """
    number = -(-num_tokens // chunk_tokens)
    size = -(-num_tokens // max(1, number))
    return [slice(start, start + size) for start in range(0, num_tokens, max(1, size))]


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
