"""Scores of tokens under a linear head: those of log_softmax, in values and gradients, without all logits."""

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.utils._python_dispatch import TorchDispatchMode

from mini_qwen.linear_head import chunks
from mini_qwen.token_scores import score_tokens


def make_input(num_tokens: int, width: int, vocab: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, width, generator=generator).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(vocab, (num_tokens,), generator=generator)


def exact_gradients(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, factors: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Log-probabilities in fp64, and the gradients of their sum weighed with `factors`."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    log_probs = (inputs[0] @ inputs[1].T).log_softmax(dim=-1).gather(1, labels[:, None])[:, 0]
    return log_probs.detach(), *torch.autograd.grad((log_probs * factors.double()).sum(), inputs)


def distance(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


def test_worked_example() -> None:
    hidden = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    scores = score_tokens(hidden, torch.eye(2), torch.tensor([1, 0]), with_entropy=True)
    assert scores.log_probs.tolist() == pytest.approx([math.log(1 / 2), math.log(3 / 4)])
    assert scores.is_top1.tolist()[1] is True
    entropy = -(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4))
    assert scores.entropy.tolist() == pytest.approx([math.log(2), entropy])


@given(st.integers(1, 30), st.integers(1, 40), st.booleans(), st.integers(0, 2**20))
def test_values_and_gradients_are_those_of_log_softmax(
    num_tokens: int, chunk_tokens: int, equal_weights: bool, seed: int
) -> None:
    hidden, weight, labels = make_input(num_tokens, 8, 23, seed)
    generator = torch.Generator().manual_seed(seed)
    factors = torch.full((num_tokens,), 0.3) if equal_weights else torch.randn(num_tokens, generator=generator)
    scores = score_tokens(hidden, weight, labels, equal_weights, chunk_tokens=chunk_tokens)
    (scores.log_probs * factors).sum().backward()
    log_probs, to_hidden, to_weight = exact_gradients(hidden, weight, labels, factors)
    assert torch.allclose(scores.log_probs.double(), log_probs, atol=1e-5)
    assert torch.allclose(hidden.grad.double(), to_hidden, atol=1e-5)
    assert torch.allclose(weight.grad.double(), to_weight, atol=1e-5)


def test_entropy_and_the_most_probable_token() -> None:
    hidden, weight, labels = make_input(40, 8, 5)
    scores = score_tokens(hidden, weight, labels, with_entropy=True, chunk_tokens=7)
    probabilities = (hidden.double() @ weight.double().T).softmax(dim=-1)
    assert torch.allclose(scores.entropy.double(), -(probabilities * probabilities.log()).sum(dim=-1), atol=1e-5)
    assert torch.equal(scores.is_top1, probabilities.argmax(dim=-1) == labels)
    assert 0 < scores.is_top1.sum() < 40


def test_a_token_that_is_all_but_impossible_has_a_finite_score() -> None:
    """Its probability is no number of fp32 any more."""
    scores = score_tokens(torch.tensor([[1.0]]), torch.tensor([[300.0], [0.0]]), torch.tensor([1]))
    assert scores.log_probs.tolist() == [-300.0]


@pytest.mark.parametrize("equal_weights", [True, False])
def test_in_bf16_the_error_is_that_of_the_products(equal_weights: bool) -> None:
    """Sums over chunks and tokens are in fp32: many chunks are as exact as one."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1024, 64, generator=generator).requires_grad_()
    weight = torch.randn(4096, 64, generator=generator).mul_(0.02).requires_grad_()
    labels = torch.randint(4096, (1024,), generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        loss = -score_tokens(hidden, weight, labels, equal_weights, chunk_tokens=16).log_probs.mean()
    loss.backward()
    log_probs, to_hidden, to_weight = exact_gradients(hidden, weight, labels, torch.full((1024,), -1 / 1024))
    assert loss.item() == pytest.approx(-log_probs.mean().item(), abs=1e-4)
    assert distance(hidden.grad, to_hidden) < 4e-3
    assert distance(weight.grad, to_weight) < 4e-3
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float()), "it was rounded on its way"


def test_weights_of_less_precision_get_gradients_of_their_own_type() -> None:
    hidden, weight, labels = (tensor.detach() for tensor in make_input(20, 8, 11))
    inputs = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    score_tokens(*inputs, labels, equal_weights=True).log_probs.sum().backward()
    _, to_hidden, to_weight = exact_gradients(*inputs, labels, torch.ones(20))
    assert inputs[0].grad.dtype == inputs[1].grad.dtype == torch.bfloat16
    assert distance(inputs[0].grad, to_hidden) < 2e-2 and distance(inputs[1].grad, to_weight) < 2e-2


def test_the_loss_is_gone_through_once_and_as_was_said() -> None:
    hidden, weight, labels = make_input(6, 4, 9)
    loss = score_tokens(hidden, weight, labels, equal_weights=True).log_probs.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()
    log_probs = score_tokens(hidden, weight, labels, equal_weights=True).log_probs
    with pytest.raises(RuntimeError, match="weighs its tokens differently"):
        (log_probs * torch.arange(6)).sum().backward()


@pytest.mark.parametrize("equal_weights", [True, False])
def test_no_tokens_are_no_loss(equal_weights: bool) -> None:
    hidden, weight, labels = make_input(0, 4, 9)
    loss = score_tokens(hidden, weight, labels, equal_weights).log_probs.sum()
    loss.backward()
    assert loss.item() == 0 and not weight.grad.any()


class Work(TorchDispatchMode):
    """Counts matrix products, and the most numbers that any operation's result has."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.products += function._opname in ("mm", "addmm", "addmm_")
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize(("equal_weights", "products"), [(True, 3), (False, 4)])
def test_products_of_each_chunk_and_nothing_as_large_as_the_logits(equal_weights: bool, products: int) -> None:
    hidden, weight, labels = make_input(96, 4, 1000)
    with Work() as work:
        score_tokens(hidden, weight, labels, equal_weights, chunk_tokens=8).log_probs.sum().backward()
    assert work.products == products * 12
    assert work.largest == 8 * 1000


def test_without_gradients_none_are_formed() -> None:
    hidden, weight, labels = make_input(96, 4, 1000)
    with torch.no_grad(), Work() as work:
        scores = score_tokens(hidden, weight, labels, equal_weights=True, chunk_tokens=8)
    assert work.products == 12
    assert torch.equal(scores.log_probs, score_tokens(hidden, weight, labels, True, chunk_tokens=8).log_probs)


@given(st.integers(0, 200), st.integers(1, 50))
def test_chunks_are_few_whole_and_alike(num_tokens: int, chunk_tokens: int) -> None:
    parts = [list(range(num_tokens))[part] for part in chunks(num_tokens, chunk_tokens)]
    assert [token for part in parts for token in part] == list(range(num_tokens))
    assert all(0 < len(part) <= chunk_tokens for part in parts)
    assert len(parts) == math.ceil(num_tokens / chunk_tokens)
