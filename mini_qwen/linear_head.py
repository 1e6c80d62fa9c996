"""The head's matrix on a few hundred tokens at a time: scores and gradients, in buffers that all chunks share."""

import functools
import warnings
from typing import NamedTuple

import torch

# Numbers in the logits of one chunk, in fp32 128 MB and 1 GB: few enough for the cache and the memory of a CPU, many
# enough to fill a GPU. 220 and 1,766 tokens at Qwen's vocabulary.
CHUNK_NUMBERS = {"cpu": 2**25, "cuda": 2**28}
ROWS_AT_ONCE = 64


@functools.cache
def row_kernels_work() -> bool:
    """Whether Triton is there and can build its kernels for the GPU, for which it needs a C compiler."""
    try:
        from mini_qwen.row_kernels import score_rows

        score_rows(torch.zeros(1, 1, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda"))
    except Exception as error:
        warnings.warn(
            f"Triton cannot be used here ({type(error).__name__}: {error}): the loss head takes torch's own "
            "operations, which need more time and memory. Installing gcc and Python's headers usually mends it.",
            stacklevel=2,
        )
        return False
    return True


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
        self.has_kernels = hidden.is_cuda and row_kernels_work()
        if not self.has_kernels:
            self.probabilities = hidden.new_empty(shape, dtype=torch.float32)
        if with_gradients:
            self.to_hidden = torch.empty_like(hidden)
            self.to_weight = torch.zeros_like(weight, dtype=torch.float32)
            self.addend = torch.empty_like(self.weight) if dtype != torch.float32 and not hidden.is_cuda else None

    def compute(self, part: slice) -> None:
        """The logits [n, V] of a chunk and what is made of them, which last until the next call."""
        hidden = self.hidden[part]
        logits = torch.mm(hidden, self.weight.T, out=self.logits[: len(hidden)])
        if self.has_kernels:
            from mini_qwen.row_kernels import score_rows  # Triton is there with CUDA only

            self.log_z, *self.rows = score_rows(logits, self.labels[part, 0].contiguous())
            return
        probabilities = self.probabilities[: len(hidden)]
        source = logits
        if logits.dtype != torch.float32:  # softmax would make an fp32 copy of its own
            source = probabilities.copy_(logits)
        torch.softmax(source, dim=-1, out=probabilities)

    def scores(self, part: slice, with_entropy: bool) -> Scores:
        """Of the chunk that was computed last."""
        if self.has_kernels:
            chosen, is_top1, entropy = self.rows
            return Scores(chosen - self.log_z, is_top1, entropy)
        labels = self.labels[part]
        logits, probabilities = self.logits[: len(labels)], self.probabilities[: len(labels)]
        highest, chosen = logits.amax(dim=-1), logits.gather(1, labels)[:, 0]
        # By the most probable token, whose probability is at least 1 / V, so that its logarithm is exact.
        log_z = highest - probabilities.amax(dim=-1).log()
        entropy = log_z - expected_logits(logits, probabilities) if with_entropy else log_z[:0]
        return Scores(chosen - log_z, chosen == highest, entropy)

    def slopes(self, part: slice) -> torch.Tensor:
        """How the negative log-probability grows with the logits: by the probabilities, less 1 for the label."""
        labels = self.labels[part]
        logits = self.logits[: len(labels)]
        if self.has_kernels:
            from mini_qwen.row_kernels import slope_rows_

            return slope_rows_(logits, labels[:, 0].contiguous(), self.log_z)
        probabilities = self.probabilities[: len(labels)]
        probabilities.scatter_(1, labels, probabilities.gather(1, labels) - 1)
        return probabilities if logits.dtype == torch.float32 else logits.copy_(probabilities)

    def add_gradients(self, part: slice, factors: torch.Tensor | None = None) -> None:
        """Of the chunk that was computed last. `factors` [n, 1] weigh its tokens, else they weigh 1."""
        hidden, slope = self.hidden[part], self.slopes(part)
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
