"""mini_qwen/options.py: options score as if each stood after its prompt alone; corrections recover what is known."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from conftest import MakeModel
from transformers import PreTrainedModel, Qwen2ForCausalLM

from mini_qwen import options as options_module
from mini_qwen.chat import TokenRow
from mini_qwen.options import choose, rate_options, score_options
from mini_qwen.scoring import Score, score_rows

A, B, C, D, QUESTION, NEUTRAL = range(6)
# What comes after which token, with which probability: A is common after all of them.
BIGRAM = torch.full((6, 6), 0.02)
BIGRAM[QUESTION, [A, B, C, D]] = torch.tensor([0.5, 0.3, 0.1, 0.06])
BIGRAM[NEUTRAL, [A, B, C, D]] = torch.tensor([0.7, 0.1, 0.1, 0.06])
BIGRAM[A, [A, B, C, D]] = torch.tensor([0.1, 0.2, 0.6, 0.06])
BIGRAM[B, [A, B, C, D]] = torch.tensor([0.06, 0.1, 0.1, 0.7])
BIGRAM[C, [A, B, C, D]] = torch.tensor([0.9, 0.02, 0.02, 0.02])
BIGRAM[D, [A, B, C, D]] = torch.tensor([0.24, 0.24, 0.24, 0.24])


@pytest.fixture(scope="module")
def bigram(tiny_model: MakeModel) -> PreTrainedModel:
    """A Qwen2 whose layers add nothing: token t is the t-th unit vector, the head holds the logarithms of BIGRAM."""
    config = copy.deepcopy(tiny_model().config)
    config.tie_word_embeddings = False
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.zero_()
        model.model.embed_tokens.weight[:6, :6] = torch.eye(6)
        size = math.sqrt(config.hidden_size)  # of a unit vector after the last norm
        model.lm_head.weight[:6, :6] = BIGRAM.log().T / size
        model.lm_head.weight[6:, :6] = -100 / size
    return model


def by_hand(*tokens: int) -> float:
    return sum(math.log(BIGRAM[a, b] / BIGRAM[a].sum()) for a, b in zip(tokens, tokens[1:], strict=False))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_known_probabilities_are_recovered(bigram: PreTrainedModel, batch_size: int) -> None:
    prompts = [[QUESTION], [B, A, NEUTRAL]]
    options = [[[A], [A, C], [A, C, A], [B, D]], [[D, D], [B]]]  # each of the first three is the start of the next
    scores = score_options(bigram, prompts, options, "test", batch_size)
    for prompt, group, found in zip(prompts, options, scores, strict=True):
        expected = [by_hand(prompt[-1], *option) for option in group]
        assert [score.sum_log_prob for score in found] == pytest.approx(expected, abs=1e-4)
        assert [score.num_tokens for score in found] == [len(option) for option in group]


def test_prior_correction_undoes_that_a_label_is_common(bigram: PreTrainedModel) -> None:
    labels = [[A], [B], [C]]
    question, neutral = score_options(bigram, [[QUESTION], [NEUTRAL]], [labels, labels], "test")
    assert choose(question) == 0  # p 0.5, 0.3, 0.1
    assert choose(question, prior=neutral) == 1  # p / prior 5/7, 3, 1


def test_length_correction_undoes_that_an_option_is_long(bigram: PreTrainedModel) -> None:
    texts = [[C], [B, D]]  # p 0.1; 0.3 x 0.7 = 0.21
    (scores,) = score_options(bigram, [[QUESTION]], [[*texts, [A, C, A]]], "test")
    assert choose(scores) == 2  # 0.5 x 0.6 x 0.9 = 0.27
    assert choose(scores[:2]) == 1
    long = [Score(math.log(0.2), 1), Score(math.log(0.1), 4)]
    assert choose(long) == 0 and choose(long, lengths=[1, 4]) == 1  # 0.1 ** (1 / 4) = 0.56
    assert choose([Score(-1.0, 1)] * 3) == 0


def test_whether_an_option_is_what_the_model_would_write(bigram: PreTrainedModel) -> None:
    group = [[A], [B], [A, C], [A, C, A], [A, B, D], [B, D]]
    (rated,) = rate_options(bigram, [[QUESTION]], [group], "test")
    assert [greedy for _, greedy in rated] == [True, False, True, True, False, False]


@pytest.fixture(scope="module")
def questions() -> tuple[list[list[int]], list[list[list[int]]]]:
    """Nine prompts of 1 to 30 tokens, each with 1 to 5 options of 1 to 6 tokens."""
    rng = random.Random(0)

    def some(low: int, high: int) -> list[int]:
        return [rng.randrange(400) for _ in range(rng.randint(low, high))]

    return [some(1, 30) for _ in range(9)], [[some(1, 6) for _ in range(rng.randint(1, 5))] for _ in range(9)]


@pytest.mark.parametrize("batch_size", [1, 4, 20])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("rows_at_once", [0, 3, 1000])
def test_options_score_as_rows_of_their_own(
    tiny_model: MakeModel,
    questions: tuple[list[list[int]], list[list[list[int]]]],
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    attention: str,
    rows_at_once: int,
) -> None:
    model = tiny_model(attention=attention)
    prompts, options = questions
    rows = [
        TokenRow(np.array(prompt + option, np.uint32), np.arange(len(prompt + option)) >= len(prompt))
        for prompt, group in zip(prompts, options, strict=True)
        for option in group
    ]
    expected = score_rows(model, rows, "test")
    monkeypatch.setattr(options_module, "MAX_LOGITS", rows_at_once * 6 * model.config.vocab_size)
    found = [score for group in score_options(model, prompts, options, "test", batch_size) for score in group]
    assert [score.num_tokens for score in found] == [score.num_tokens for score in expected]
    sums = [score.sum_log_prob for score in expected]
    assert [score.sum_log_prob for score in found] == pytest.approx(sums, abs=1e-4)


def test_a_prompt_is_computed_once_and_its_logits_for_one_token(tiny_model: MakeModel) -> None:
    model = tiny_model()
    seen, made = [], []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: seen.append(args[0].numel()))
    model.lm_head.register_forward_hook(lambda module, args, output: made.append(output.shape[:-1].numel()))
    score_options(model, [list(range(50))], [[[1], [2], [3], [4]]], "test")
    assert (seen, made) == ([50], [1])
    score_options(model, [list(range(50))], [[[1, 5], [2, 6], [3, 7], [4]]], "test")
    assert (seen[1:], made[1:]) == ([50, 3], [1, 3])


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[1], []], [[[1]], [[1]]], "prompt 1 has no token"),
        ([[1]], [[[1], []]], "option 1 of prompt 0 has no token"),
        ([[1]], [], "1 prompts, but 0 lists"),
    ],
)
def test_nothing_to_score_is_refused(
    bigram: PreTrainedModel, prompts: list[list[int]], options: list[list[list[int]]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        score_options(bigram, prompts, options, "test")


def test_weights_that_are_not_finite_are_said(tiny_model: MakeModel) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(SystemExit, match="prompt 0 is not a number.*not finite"):
        score_options(model, [[1, 2]], [[[3]]], "test")


def test_no_prompts_no_scores(bigram: PreTrainedModel) -> None:
    assert score_options(bigram, [], [], "test") == []
    assert score_options(bigram, [[QUESTION]], [[]], "test") == [[]]
