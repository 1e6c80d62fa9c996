"""mini_qwen/sampling.py: draws follow the probabilities and the seed, and nothing else."""

import pytest
import torch

from mini_qwen.sampling import Sampling, SeededDraw

PAD = 9
IDS = torch.tensor([[1, 2]])


def chosen(scores: torch.Tensor) -> list[int]:
    """The one token a row that is left."""
    assert ((scores > -torch.inf).sum(dim=1) == 1).all()
    return scores.argmax(dim=1).tolist()


def test_a_draw_by_hand() -> None:
    """Cumulative probabilities 0.5, 0.8, 1.0: a number of 0.6 gives token 1."""
    draw = SeededDraw([0], num_tokens=4)
    draw.numbers = torch.tensor([[0.6, 0.49, 0.81, 0.0]], dtype=torch.float64)
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert [chosen(draw(IDS, logits))[0] for _ in range(4)] == [1, 0, 2, 0]


def test_an_impossible_token_is_never_drawn() -> None:
    """Not by the smallest number there is, nor by the largest."""
    draw = SeededDraw([0], num_tokens=2)
    draw.numbers = torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64)
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]])
    assert [chosen(draw(IDS, logits))[0] for _ in range(2)] == [1, 2]


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.1}, {"temperature": 1.0}, {"num_beams": 2}])
@pytest.mark.parametrize("row", [[1.0, torch.nan], [torch.nan, 1.0], [1.0, torch.inf], [-torch.inf, -torch.inf]])
def test_logits_that_are_no_numbers_are_refused(settings: dict[str, float], row: list[float]) -> None:
    """In any row, however the token is chosen; a single -inf is a token that cannot come."""
    sampling, ids = Sampling(**settings), torch.tensor([[0, 1], [0, 1]])
    with pytest.raises(SystemExit, match="not finite"):
        sampling.processors([0, 1], 1, PAD)(ids, torch.tensor([[1.0, 2.0], row]))
    sampling.processors([0, 1], 1, PAD)(ids, torch.tensor([[1.0, 2.0], [-torch.inf, 1.0]]))


def test_draws_follow_the_probabilities() -> None:
    """20,000 draws of 0.5, 0.3, 0.2: four standard errors are 1.4 points."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(20_000, 3)
    drawn = torch.tensor(chosen(SeededDraw(range(20_000), 1)(IDS.expand(20_000, 2), logits)))
    shares = torch.bincount(drawn, minlength=3) / 20_000
    assert shares.tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.014)


def test_a_row_draws_the_same_beside_others() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together = SeededDraw([4, 5, 6], 3)
    alone = [SeededDraw([seed], 3) for seed in (4, 5, 6)]
    for _ in range(3):
        one_by_one = [chosen(draw(IDS, logits[[row]]))[0] for row, draw in enumerate(alone)]
        assert chosen(together(IDS.expand(3, 2), logits)) == one_by_one


def apply(sampling: Sampling, ids: list[int], logits: list[float]) -> torch.Tensor:
    """The probabilities behind all steps but the draw."""
    scores = torch.tensor([logits])
    for step in sampling.processors([0], 1, PAD):
        if not isinstance(step, SeededDraw):
            scores = step(torch.tensor([ids]), scores)
    return torch.softmax(scores, dim=-1)[0]


def test_settings_by_hand() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().tolist()
    # Temperature 0.5 squares the probabilities: 0.25, 0.09, 0.04 of 0.38.
    assert apply(Sampling(temperature=0.5), [0], logits).tolist() == pytest.approx([25 / 38, 9 / 38, 4 / 38])
    assert apply(Sampling(temperature=1.0, top_k=2), [0], logits).tolist() == pytest.approx([5 / 8, 3 / 8, 0])
    assert apply(Sampling(temperature=1.0, top_p=0.5), [0], logits).tolist() == pytest.approx([1, 0, 0])
    assert apply(Sampling(temperature=1.0, top_p=0.7), [0], logits).tolist() == pytest.approx([5 / 8, 3 / 8, 0])


def test_a_penalty_does_not_see_the_pads() -> None:
    logits = [1.0, 2.0, 1.5, *[0.5] * 7]
    sampling = Sampling(repetition_penalty=2.0)
    assert torch.equal(apply(sampling, [PAD, PAD, 1, 0], logits), apply(sampling, [1, 0], logits))
    # 1 and 2 are halved where they stand already.
    assert apply(sampling, [1, 0], logits).log().diff()[:2].tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 2, "temperature": 0.5}, "beams do not draw"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sampling(**settings)
