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
from torch.autograd.function import once_differentiable

# Numbers in the logits of one chunk, in fp32 128 MB and 1 GB: few enough for the cache and the memory of a CPU, many
# enough to fill a GPU. 220 and 1,766 tokens at Qwen's vocabulary.
CHUNK_NUMBERS = {"cpu": 2**25, "cuda": 2**28}
ROWS_AT_ONCE = 64


class Scores(NamedTuple):
    """What the head says of N tokens; all but the first cannot be differentiated."""

    log_probs: torch.Tensor  # [N] fp32, natural logarithm
    is_top1: torch.Tensor  # [N] bool: no token is more probable than the label
    entropy: torch.Tensor  # [N] fp32, nats; empty unless asked for


class Head:
    """A linear head on the tokens of one call, and the gradients of the sum of their negative log-probabilities.

    Products are in the compute type; sums over chunks in fp32, for in bf16 the later ones would hardly count. All
    chunks use the same two buffers: fresh memory costs a CPU more than what is computed in it.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        dtype: torch.dtype,
        chunk_tokens: int,
        with_gradients: bool,
    ) -> None:
        self.hidden, self.weight, self.labels = hidden.to(dtype), weight.to(dtype), labels[:, None]
        self.chunks = chunks(len(hidden), chunk_tokens)
        shape = (self.chunks[0].stop if self.chunks else 0, len(weight))
        self.logits = hidden.new_empty(shape, dtype=dtype)
        self.probabilities = hidden.new_empty(shape, dtype=torch.float32)
        if with_gradients:
            self.to_hidden = torch.empty_like(hidden)
            self.to_weight = torch.zeros_like(weight, dtype=torch.float32)
            self.addend = torch.empty_like(self.weight) if dtype != torch.float32 and not hidden.is_cuda else None

    def score(self, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and probabilities [n, V] of a chunk, which last until the next call."""
        hidden = self.hidden[part]
        logits = torch.mm(hidden, self.weight.T, out=self.logits[: len(hidden)])
        probabilities = self.probabilities[: len(hidden)]
        source = logits
        if logits.dtype != torch.float32:  # softmax would make an fp32 copy of its own
            source = probabilities.copy_(logits)
        return logits, torch.softmax(source, dim=-1, out=probabilities)

    def add_gradients(self, part: slice, factors: torch.Tensor | None = None) -> None:
        """Of the chunk that was scored last. `factors` [n, 1] weigh its tokens, else they weigh 1."""
        hidden, labels = self.hidden[part], self.labels[part]
        probabilities = self.probabilities[: len(hidden)]
        # How the negative log-probability grows with the logits: by the probabilities, less 1 for the label.
        probabilities.scatter_(1, labels, probabilities.gather(1, labels) - 1)
        slope = probabilities
        if hidden.dtype != torch.float32:
            slope = self.logits[: len(hidden)].copy_(probabilities)
        to_hidden = slope @ self.weight
        if factors is not None:
            to_hidden, hidden = to_hidden * factors, (hidden * factors).to(hidden.dtype)
        self.to_hidden[part] = to_hidden
        if slope.dtype == torch.float32:
            self.to_weight.addmm_(slope.T, hidden)
        elif self.addend is None:
            torch.addmm(self.to_weight, slope.T, hidden, out_dtype=torch.float32, out=self.to_weight)
        else:
            self.to_weight.add_(torch.mm(slope.T, hidden, out=self.addend))


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
            logits, probabilities = head.score(part)
            highest, chosen = logits.amax(dim=-1), logits.gather(1, head.labels[part])[:, 0]
            # By the most probable token, whose probability is at least 1 / V, so that its logarithm is exact.
            log_z = highest - probabilities.amax(dim=-1).log()
            log_probs[part] = chosen - log_z
            is_top1[part] = chosen == highest
            if with_entropy:
                entropy[part] = log_z - expected_logits(logits, probabilities)
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
            head.score(part)
            head.add_gradients(part, -factors[part, None])
        return head.to_hidden, head.to_weight, None, None, None, None, None


def expected_logits(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """[n] fp32, each token's logits weighed with their probabilities [n, V]; a few rows are copied at a time."""
    pairs = zip(logits.split(ROWS_AT_ONCE), probabilities.split(ROWS_AT_ONCE), strict=True)
    return torch.cat([torch.bmm(weights[:, None], rows[:, :, None].float())[:, 0, 0] for rows, weights in pairs])


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
