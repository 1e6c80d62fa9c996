"""mini_qwen/scoring.py: the log-probabilities are the model's own, however the rows are batched."""

import math
import random

import numpy as np
import pytest
import torch
from conftest import MakeModel
from transformers import PreTrainedModel

from mini_qwen import scoring
from mini_qwen.chat import TokenRow
from mini_qwen.scoring import Score, score_rows


@pytest.fixture(scope="module")
def model(tiny_model: MakeModel) -> PreTrainedModel:
    return tiny_model()


def make_row(ids: list[int], trained: list[bool] | None = None) -> TokenRow:
    return TokenRow(np.array(ids, np.uint32), None if trained is None else np.array(trained, bool))


@pytest.fixture(scope="module")
def rows() -> list[TokenRow]:
    """Fifteen rows of 2 to 16 tokens in no order, trained here and there, the first token as well; one everywhere."""
    rng = random.Random(0)
    lengths = rng.sample(range(2, 17), 15)
    rows = [
        make_row([rng.randrange(400) for _ in range(length)], [rng.random() < 0.6 for _ in range(length)])
        for length in lengths
    ]
    return [*rows[:-1], rows[-1]._replace(trained=None)]


@torch.no_grad()
def score_alone(model: PreTrainedModel, row: TokenRow) -> Score:
    """From the loss that the model itself computes for labels, one row at a time."""
    ids = row.ids.tolist()
    flags = [True] * len(ids) if row.trained is None else row.trained.tolist()
    labels = [token if trained else -100 for token, trained in zip(ids, flags, strict=True)]
    count = sum(flags[1:])
    if not count:
        return Score(0.0, 0)
    loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
    return Score(-loss * count, count)


def assert_equal_scores(scores: list[Score], expected: list[Score]) -> None:
    assert [score.num_tokens for score in scores] == [score.num_tokens for score in expected]
    sums = [score.sum_log_prob for score in expected]
    assert [score.sum_log_prob for score in scores] == pytest.approx(sums, rel=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_scores_are_the_models_own_loss_row_by_row(
    tiny_model: MakeModel, rows: list[TokenRow], attention: str
) -> None:
    model = tiny_model(attention=attention)
    assert_equal_scores(score_rows(model, rows, "test"), [score_alone(model, row) for row in rows])


@pytest.mark.parametrize("rows_at_once", [0, 1, 3, 7])
def test_order_and_batch_size_do_not_matter(
    model: PreTrainedModel, rows: list[TokenRow], monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    expected = score_rows(model, rows, "test")
    monkeypatch.setattr(scoring, "MAX_LOGITS", rows_at_once * 16 * model.config.vocab_size)
    order = random.Random(1).sample(range(len(rows)), len(rows))
    shuffled = score_rows(model, [rows[at] for at in order], "test")
    assert_equal_scores(shuffled, [expected[at] for at in order])


def test_a_log_probability_by_hand(model: PreTrainedModel) -> None:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0]
    probability = torch.softmax(logits[0], dim=-1)[6] * torch.softmax(logits[1], dim=-1)[7]
    (score,) = score_rows(model, [make_row([5, 6, 7], [True] * 3)], "test")
    assert score.num_tokens == 2  # the first token has nothing before it
    assert score.sum_log_prob == pytest.approx(math.log(probability.item()), rel=1e-5)


@pytest.mark.parametrize(
    "row", [make_row([5], [True]), make_row([5]), make_row([5, 6, 7], [False] * 3), make_row([5, 6], [True, False])]
)
def test_a_row_without_a_target_scores_nothing(model: PreTrainedModel, row: TokenRow) -> None:
    assert score_rows(model, [row], "test") == [Score(0.0, 0)]
    with_others = score_rows(model, [row, make_row([1, 2, 3, 4])], "test")
    assert with_others[0] == Score(0.0, 0)
    assert with_others[1].num_tokens == 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused_with_the_row(
    tiny_model: MakeModel, rows: list[TokenRow], value: float
) -> None:
    """NaN compares as false, so that a broken checkpoint would have none of its pairs right."""
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(value)
    with pytest.raises(SystemExit, match=r"^test: the log-probability of row \d+ is not a finite number.*an earlier"):
        score_rows(model, rows, "test")


def test_no_rows_no_scores(model: PreTrainedModel) -> None:
    assert score_rows(model, [], "test") == []
